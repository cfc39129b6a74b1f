from pathlib import Path

from data.errors import DataError
from data.labelled import find_chips, find_test, image_ids
from data.layouts import OFFICIAL_CLASSES, find_pairs, find_unlabelled, find_unpaired
from tests.conftest import write_chip

import pytest
from PIL import Image


def pairs_in(root, eo, sar, classes=("bus", "sedan", "SUV")):
    for name in classes:
        for i in range(3):
            write_chip(root / eo / name / f"{name}_{i}.png")
            write_chip(root / sar / name / f"{name}_{i}.png")


@pytest.mark.parametrize(
    "eo, sar", [("train/EO_Train", "train/SAR_Train"), ("EO_Train", "SAR_Train"), ("EO", "SAR")]
)
def test_folder_layouts_in_official_order(tmp_path, eo, sar):
    pairs_in(tmp_path, eo, sar)
    pairs = find_pairs(tmp_path)
    assert pairs.classes == ("sedan", "SUV", "bus") and pairs.class_ids == (0, 1, 7)
    assert pairs.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for left, right, label in zip(map(Path, pairs.eo), map(Path, pairs.sar), pairs.labels, strict=True):
        assert left.stem == right.stem and left.parent.name == pairs.classes[label]
        assert left.is_relative_to(tmp_path / eo) and right.is_relative_to(tmp_path / sar)


def test_release_of_2021(tmp_path):
    for label in range(10):
        for number in (1, 12):
            write_chip(tmp_path / "train_images" / str(label) / f"EO_{number}.png", label)
            write_chip(tmp_path / "train_images" / str(label) / f"SAR_{number}.png", label)
    write_chip(tmp_path / "test_images" / "-1" / "SAR_77.png")
    pairs = find_pairs(tmp_path)
    assert pairs.classes == OFFICIAL_CLASSES and pairs.class_ids == tuple(range(10))
    assert [Path(p).name for p in pairs.eo[:2]] == ["EO_1.png", "EO_12.png"]
    assert [Path(p).name for p in pairs.sar[:2]] == ["SAR_1.png", "SAR_12.png"]
    assert [int(Path(p).parent.name) for p in pairs.sar] == pairs.labels.tolist()
    assert image_ids(find_chips(find_test(tmp_path))) == ["77"]


def test_other_classes_are_alphabetical_and_can_be_ordered(tmp_path):
    pairs_in(tmp_path, "EO", "SAR", ("T72", "2S1", "D7"))
    assert find_pairs(tmp_path).classes == ("2S1", "D7", "T72")
    chosen = find_pairs(tmp_path, ("T72", "D7", "2S1"))
    assert chosen.classes == ("T72", "D7", "2S1") and chosen.class_ids == (0, 1, 2)
    assert [Path(p).parent.name for p in chosen.eo[:3]] == ["T72"] * 3
    assert find_pairs(tmp_path, ("T72", "D7", "2S1"), (5, 3, 4)).class_ids == (5, 3, 4)
    with pytest.raises(DataError, match="CLASSES"):
        find_pairs(tmp_path, ("T72", "D7"))


def test_sides_that_do_not_match(tmp_path):
    pairs_in(tmp_path, "EO", "SAR")
    (tmp_path / "SAR" / "bus" / "bus_1.png").unlink()
    with pytest.raises(DataError, match=r"class bus: 1 EO chips without SAR \(bus_1\)"):
        find_pairs(tmp_path)


def test_missing_roots_and_empty_classes(tmp_path):
    with pytest.raises(DataError, match="DATA_ROOT"):
        find_pairs(tmp_path / "none")
    with pytest.raises(DataError, match="holds none of .* _find_sides in data/layouts.py"):
        find_pairs(tmp_path)
    pairs_in(tmp_path, "EO", "SAR")
    (tmp_path / "EO" / "van").mkdir()
    with pytest.raises(DataError, match="van holds no chips"):
        find_pairs(tmp_path)


def test_pairs_without_labels(tmp_path):
    assert find_unlabelled(tmp_path) == ([], [])
    folder = tmp_path / "unlabelled"
    (folder / "EO").mkdir(parents=True)
    with pytest.raises(DataError, match="has no folder SAR"):
        find_unlabelled(tmp_path)
    (folder / "SAR").mkdir()
    with pytest.raises(DataError, match="unlabelled holds no pairs; its chips lie directly in EO and SAR"):
        find_unlabelled(tmp_path)
    for name in ("b", "a"):
        for side in ("EO", "SAR"):
            Image.new("L", (8, 8)).save(folder / side / f"{name}.png")
    eo, sar = find_unlabelled(tmp_path)
    assert [Path(path).name for path in eo] == [Path(path).name for path in sar] == ["a.png", "b.png"]
    assert all("/EO/" in path for path in eo) and all("/SAR/" in path for path in sar)
    (folder / "EO" / "c.png").write_bytes((folder / "EO" / "a.png").read_bytes())
    with pytest.raises(DataError, match="unlabelled: 1 EO chips without SAR .c."):
        find_unlabelled(tmp_path)


def test_photographs_without_a_radar_chip(tmp_path):
    classes = ("ant", "bee", "bus")
    paths, labels = find_unpaired(tmp_path, classes)
    assert paths == [] and labels.tolist() == []
    (tmp_path / "unpaired/bus").mkdir(parents=True)
    with pytest.raises(DataError, match="unpaired has no folder EO; labelled"):
        find_unpaired(tmp_path, classes)
    for name in ("bee/2.png", "bee/10.png", "bus/1.png"):
        (tmp_path / "unpaired/EO" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "unpaired/EO" / name).touch()
    paths, labels = find_unpaired(tmp_path, classes)
    assert [Path(path).name for path in paths] == ["10.png", "2.png", "1.png"] and labels.tolist() == [1, 1, 2]
    with pytest.raises(DataError, match="unpaired/EO: no classes of the pairs: bee; rename them to ant, bus"):
        find_unpaired(tmp_path, ("ant", "bus"))


@pytest.mark.parametrize("misspelt, find", [
    ("unlabeled", find_unlabelled),
    ("Unlabelled", find_unlabelled),
    ("un-paired", lambda root: find_unpaired(root, ("ant", "bee"))),
])  # fmt: skip
def test_a_misspelt_folder_is_not_left_out_in_silence(tmp_path, misspelt, find):
    for other in ("train", "labelled", "paired"):
        (tmp_path / other).mkdir()
    assert not len(find(tmp_path)[0])
    (tmp_path / misspelt).mkdir()
    with pytest.raises(DataError, match=f"{misspelt}: rename it to un"):
        find(tmp_path)


def test_the_advice_for_a_misspelt_class_keeps_the_official_numbers(tmp_path, capsys):
    folders = [{"flatbed_truck": "flatbed-trucks"}.get(name, name) for name in OFFICIAL_CLASSES]
    pairs_in(tmp_path, "EO", "SAR", [*folders[::-1], "tram"])
    with pytest.raises(DataError, match=r"flatbed-trucks \(flatbed_truck\?\)") as error:
        find_pairs(tmp_path)
    advised = str(error.value).partition("CLASSES=")[2].partition(" (numbered")[0].split(",")
    assert advised == [*folders, "tram"]
    pairs = find_pairs(tmp_path, advised)
    assert pairs.classes == (*folders, "tram") and pairs.class_ids == tuple(range(11))
    assert not capsys.readouterr().out


def test_official_classes_with_other_numbers_are_announced(tmp_path, capsys):
    pairs_in(tmp_path, "EO", "SAR")
    assert find_pairs(tmp_path, ("bus", "SUV", "sedan")).class_ids == (0, 1, 2)
    assert "CLASSES numbers the classes in a submission 0 bus, 1 SUV, 2 sedan;" in capsys.readouterr().out
    assert find_pairs(tmp_path, ("bus", "SUV", "sedan"), (7, 1, 0)).class_ids == (7, 1, 0)  # of a checkpoint
    assert not capsys.readouterr().out


def test_chips_of_2021_with_another_prefix_are_not_left_out(tmp_path):
    for label in range(2):
        for name in ("EO_1", "SAR_1", "eo_2", "sar_2"):
            write_chip(tmp_path / "train_images" / str(label) / f"{name}.png")
    with pytest.raises(DataError, match=r"4 chips are named neither EO_ nor SAR_: .*eo_2\.png"):
        find_pairs(tmp_path)
