"""Training curves."""

import itertools

from utils.report.figures import COLOURS, save_png, subplots
from utils.run.files import atomic_file

PANELS = ("loss", "accuracy", "learning rate", "images/s")


def plot_history(path, history):
    """Draw loss, accuracy, learning rate and images/s over the epochs, as a PNG.

    Args:
        path: file to write.
        history: one {column: number} per epoch; a column is drawn in the panel whose name it contains.
    """
    epochs = [row["epoch"] for row in history]
    figure, axes = subplots(1, len(PANELS), size=(14, 3.4))
    for axis, panel in zip(axes, PANELS, strict=True):
        columns = [name for name in history[-1] if panel in name]
        # Lines that coincide, such as the two accuracies of balanced classes, stay visible by their styles.
        for name, colour, style in zip(columns, COLOURS, itertools.cycle(("-", "-", "--")), strict=False):
            axis.plot(epochs, [row[name] for row in history], style, marker=".", label=name, color=colour)
        axis.set(title=panel, xlabel="epoch")
        axis.grid(alpha=0.3)
    handles, names = axes[PANELS.index("accuracy")].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    with atomic_file(path, "wb") as file:
        save_png(figure, file)
