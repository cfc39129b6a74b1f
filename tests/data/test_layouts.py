from pathlib import Path

from data.errors import DataError
from data.layouts import (
    OFFICIAL_CLASSES,
    find_chips,
    find_pairs,
    find_reference,
    find_test,
    find_unlabelled,
    find_unpaired,
    find_validation,
    image_ids,
    read_chips,
    read_labelled,
)

import numpy as np
import pytest
from PIL import Image


def chip(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), level, np.uint8)).save(path)


def pairs_in(root, eo, sar, classes=("bus", "sedan", "SUV")):
    for name in classes:
        for i in range(3):
            chip(root / eo / name / f"{name}_{i}.png")
            chip(root / sar / name / f"{name}_{i}.png")


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
            chip(tmp_path / "train_images" / str(label) / f"EO_{number}.png", label)
            chip(tmp_path / "train_images" / str(label) / f"SAR_{number}.png", label)
    chip(tmp_path / "test_images" / "-1" / "SAR_77.png")
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


def test_other_files_are_left_aside(tmp_path):
    for name in ("Gotcha9.PNG", "Gotcha10.png", "Gotcha8.JPG"):
        chip(tmp_path / name)
    for name in ("._Gotcha9.png", "Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find_chips(tmp_path)] == ["Gotcha8.JPG", "Gotcha9.PNG", "Gotcha10.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no chips"):
        find_chips(tmp_path / "empty")


@pytest.mark.parametrize("written", ["Gotcha{}", "{}", "Gotcha{}.png"])
def test_reference(tmp_path, written):
    for number in (5, 17, 300):
        chip(tmp_path / "val" / f"Gotcha{number}.png")
    rows = [f"{written.format(n)},{c},{o}" for n, c, o in ((17, "bus", 0), (5, "nothing", 1), (300, "7", 0))]
    text = "\ufeff" + "\r\n".join(["image_id,class,OOD_flag", *rows, ""])
    (tmp_path / "val" / "validation_reference.csv").write_bytes(text.encode())
    labelled = find_validation(tmp_path, ("sedan", "bus"), (0, 7))
    assert [p.stem for p in labelled.paths] == ["Gotcha5", "Gotcha17", "Gotcha300"]
    assert labelled.labels.tolist() == [-1, 1, 1] and labelled.ood.tolist() == [True, False, False]


def labels_of(tmp_path, classes, class_ids, written):
    """Labels of the chips Gotcha0, Gotcha1, ... whose classes in the reference are `written`."""
    paths = [tmp_path / f"Gotcha{i}.png" for i in range(len(written))]
    rows = [f"Gotcha{i},{name},0" for i, name in enumerate(written)]
    (tmp_path / "r.csv").write_text("\n".join(["image_id,class,OOD_flag", *rows]))
    return read_labelled(paths, tmp_path / "r.csv", classes, class_ids).labels.tolist()


def test_chips_of_one_number_are_told_apart_by_their_names(tmp_path):
    paths = [tmp_path / "a_0000.png", tmp_path / "b_0000.png", tmp_path / "b_0001.png"]
    (tmp_path / "r.csv").write_text("image_id,class,OOD_flag\nb_0000.png,bus,0\nb_0001,x,1\na_0000,sedan,0\n")
    assert read_labelled(paths, tmp_path / "r.csv", ("sedan", "bus"), (0, 7)).labels.tolist() == [0, 1, -1]
    for row, message in (("a_0000,bus,0", "a_0000 stands there twice"), ("0000,bus,0", "1 chips .* not there: 0000")):
        with open(tmp_path / "r.csv", "a") as file:
            file.write(f"{row}\n")
        with pytest.raises(DataError, match=message):
            read_labelled(paths, tmp_path / "r.csv", ("sedan", "bus"), (0, 7))
        (tmp_path / "r.csv").write_text((tmp_path / "r.csv").read_text().replace(f"{row}\n", ""))


def test_numbers_in_a_reference_are_those_of_a_submission(tmp_path):
    """A subset of the ten classes is trained: positions and official numbers differ."""
    subset = ("sedan", "van", "bus"), (0, 3, 7)
    assert labels_of(tmp_path, *subset, ["0", "3", "7", "bus"]) == [0, 1, 2, 2]
    for position in ("1", "2"):
        with pytest.raises(DataError, match=f"class '{position}'; the classes are sedan, .*submission, 0, 3, 7"):
            labels_of(tmp_path, *subset, [position])
    chosen = ("bus", "sedan"), (0, 1)  # CLASSES=bus,sedan
    assert labels_of(tmp_path, *chosen, ["0", "1", "sedan"]) == [0, 1, 1]


def test_a_number_that_means_two_classes_is_refused(tmp_path):
    assert labels_of(tmp_path, ("3", "5", "12"), (3, 5, 12), ["12", "3", "5"]) == [2, 0, 1]
    chosen = ("3", "1", "7"), (0, 1, 2)  # CLASSES=3,1,7; 1 means the same class both ways
    assert labels_of(tmp_path, *chosen, ["3", "1", "7", "0", "2"]) == [0, 1, 2, 0, 2]
    with pytest.raises(DataError, match="line 3: '1' is the name of one class and the number of another one"):
        labels_of(tmp_path, ("1", "2"), (0, 1), ["2", "1"])


@pytest.mark.parametrize("bus", ["bus", "7"])
def test_class_folders_are_labels_and_others_are_out_of_distribution(tmp_path, capsys, bus):
    for name, number in (("sedan", 3), (bus, 1), (bus, 10), ("tank", 2), ("plane", 5), ("-1", 7), (".hidden", 9)):
        chip(tmp_path / "val" / name / f"Gotcha{number}.png")
    (tmp_path / "val" / "empty").mkdir()
    for read in (
        lambda: find_validation(tmp_path, ("sedan", "bus"), (0, 7)),
        lambda: read_chips(tmp_path / "val", ("sedan", "bus"), (0, 7))[1],
    ):
        labelled = read()
        label_of = {path.stem: label for path, label in zip(labelled.paths, labelled.labels.tolist(), strict=True)}
        assert label_of == {"Gotcha1": 1, "Gotcha10": 1, "Gotcha3": 0, "Gotcha2": -1, "Gotcha5": -1, "Gotcha7": -1}
        np.testing.assert_array_equal(labelled.ood, labelled.labels < 0)
        printed = capsys.readouterr().out
        assert "3 of 6 chips are out of distribution, those in the subfolders -1, plane, tank" in printed
        assert printed.count("\n") == 1


def test_names_that_repeat_between_class_folders_have_different_image_ids(tmp_path):
    for name in ("bus", "sedan"):
        [chip(tmp_path / name / f"{i}.png") for i in range(2)]
    paths, labelled = read_chips(tmp_path, ("sedan", "bus"), (0, 7))
    assert image_ids(paths) == ["bus/0", "bus/1", "sedan/0", "sedan/1"] and labelled.labels.tolist() == [1, 1, 0, 0]


def test_a_reference_comes_before_the_folders(tmp_path):
    chip(tmp_path / "bus" / "1.png"), chip(tmp_path / "sedan" / "2.png")
    (tmp_path / "reference.csv").write_text("image_id,class,OOD_flag\n1,sedan,0\n2,x,1\n")
    assert read_chips(tmp_path, ("sedan", "bus"), (0, 7))[1].labels.tolist() == [0, -1]


def test_folders_that_are_no_classes_are_no_labels(tmp_path, capsys):
    chip(tmp_path / "one" / "-1" / "SAR_1.png")
    assert read_chips(tmp_path / "one", ("sedan", "bus"), (0, 7))[1] is None
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None  # there is no folder val
    (tmp_path / "val").mkdir()
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None
    assert not capsys.readouterr().out
    chip(tmp_path / "val" / "north" / "SAR_1.png"), chip(tmp_path / "val" / "south" / "SAR_2.png")
    paths, labelled = read_chips(tmp_path / "val", ("sedan", "bus"), (0, 7))
    assert len(paths) == 2 and labelled is None
    assert "none of the subfolders is named like a class" in capsys.readouterr().out


@pytest.mark.parametrize("name, classes, class_ids, message", [
    ("Sedan", ("sedan", "bus"), (0, 7), "subfolder Sedan: it is the class sedan; rename it so"),
    ("pickup-truck", ("pickup_truck", "bus"), (2, 7), "it is the class pickup_truck"),
    ("1", ("1", "2"), (0, 1), "subfolder 1: '1' is the name of one class and the number of another one"),
])  # fmt: skip
def test_folders_whose_class_is_uncertain_are_refused(tmp_path, name, classes, class_ids, message):
    chip(tmp_path / name / "1.png"), chip(tmp_path / "tank" / "2.png")
    with pytest.raises(DataError, match=message):
        read_chips(tmp_path, classes, class_ids)


@pytest.mark.parametrize(
    "rows, message",
    [
        (["Gotcha1,bus,0"], "no row for 1 chips: Gotcha2.png"),
        (["Gotcha1,bus,0", "Gotcha2,bus,0", "Gotcha3,bus,0"], "names 1 chips that are not there: 3"),
        (["Gotcha1,bus,0", "Gotcha1,bus,0"], "Gotcha1 stands there twice"),
        (["Gotcha1,boat,0"], "unknown class 'boat'"),
    ],
)
def test_wrong_references(tmp_path, rows, message):
    paths = [tmp_path / f"Gotcha{n}.png" for n in (1, 2)]
    (tmp_path / "r.csv").write_text("\n".join(["image_id,class,OOD_flag", *rows]))
    with pytest.raises(DataError, match=message):
        read_labelled(paths, find_reference(tmp_path), ("sedan", "bus"), (0, 7))


def test_image_ids():
    assert image_ids([Path("Gotcha17.png"), Path("SAR_42.png"), Path("100.PNG")]) == ["17", "42", "100"]
    assert image_ids([Path("2S1_0001.png"), Path("other.png")]) == ["2S1_0001", "other"]
    assert image_ids([Path("SAR_1.png"), Path("EO_1.png")]) == ["SAR_1", "EO_1"]
    assert image_ids([Path("HB01001.006.png"), Path("a.b.npy")]) == ["HB01001.006", "a.b"]


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
