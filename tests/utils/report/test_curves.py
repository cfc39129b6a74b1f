from utils.report import curves
from utils.report.figures import save_png

import pytest
from PIL import Image


@pytest.mark.slow
def test_every_column_is_drawn_in_its_panel(tmp_path, monkeypatch):
    """One epoch and several; a column that no panel names, such as the epoch, is not drawn."""
    drawn = []
    monkeypatch.setattr(curves, "save_png", lambda figure, file: drawn.append(figure) or save_png(figure, file))
    columns = ("loss", "accuracy", "learning rate", "images/s", "val accuracy", "val mean per-class accuracy")
    history = [{"epoch": e} | {name: e + i for i, name in enumerate(columns)} | {"seconds": 1} for e in (1, 2, 3)]
    for epochs in (1, 3):
        curves.plot_history(tmp_path / "curves.png", history[:epochs])
        lines = [[line.get_label() for line in axis.lines] for axis in drawn[-1].axes]
        assert lines == [["loss"], ["accuracy", *columns[4:]], ["learning rate"], ["images/s"]]
        assert drawn[-1].axes[1].lines[2].get_ydata().tolist() == [6, 7, 8][:epochs]
        with Image.open(tmp_path / "curves.png") as image:
            assert image.format == "PNG" and image.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
