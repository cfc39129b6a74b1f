from pathlib import Path

from data.errors import DataError
from data.labelled import (
    find_chips,
    find_reference,
    find_validation,
    image_ids,
    read_chips,
    read_labelled,
    write_reference,
)
from tests.conftest import write_chip

import numpy as np
import pytest


def test_other_files_are_left_aside(tmp_path):
    for name in ("Gotcha9.PNG", "Gotcha10.png", "Gotcha8.JPG"):
        write_chip(tmp_path / name)
    for name in ("._Gotcha9.png", "Thumbs.db", ".DS_Store", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find_chips(tmp_path)] == ["Gotcha8.JPG", "Gotcha9.PNG", "Gotcha10.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no chips"):
        find_chips(tmp_path / "empty")


@pytest.mark.parametrize("written", ["Gotcha{}", "{}", "Gotcha{}.png"])
def test_reference(tmp_path, written):
    for number in (5, 17, 300):
        write_chip(tmp_path / "val" / f"Gotcha{number}.png")
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
        write_chip(tmp_path / "val" / name / f"Gotcha{number}.png")
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
        [write_chip(tmp_path / name / f"{i}.png") for i in range(2)]
    paths, labelled = read_chips(tmp_path, ("sedan", "bus"), (0, 7))
    assert image_ids(paths) == ["bus/0", "bus/1", "sedan/0", "sedan/1"] and labelled.labels.tolist() == [1, 1, 0, 0]


def test_a_reference_comes_before_the_folders(tmp_path):
    write_chip(tmp_path / "bus" / "1.png"), write_chip(tmp_path / "sedan" / "2.png")
    (tmp_path / "reference.csv").write_text("image_id,class,OOD_flag\n1,sedan,0\n2,x,1\n")
    assert read_chips(tmp_path, ("sedan", "bus"), (0, 7))[1].labels.tolist() == [0, -1]


def test_folders_that_are_no_classes_are_no_labels(tmp_path, capsys):
    write_chip(tmp_path / "one" / "-1" / "SAR_1.png")
    assert read_chips(tmp_path / "one", ("sedan", "bus"), (0, 7))[1] is None
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None  # there is no folder val
    (tmp_path / "val").mkdir()
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None
    assert not capsys.readouterr().out
    write_chip(tmp_path / "val" / "north" / "SAR_1.png"), write_chip(tmp_path / "val" / "south" / "SAR_2.png")
    paths, labelled = read_chips(tmp_path / "val", ("sedan", "bus"), (0, 7))
    assert len(paths) == 2 and labelled is None
    assert "none of the subfolders is named like a class" in capsys.readouterr().out


@pytest.mark.parametrize("name, classes, class_ids, message", [
    ("Sedan", ("sedan", "bus"), (0, 7), "subfolder Sedan: it is the class sedan; rename it so"),
    ("pickup-truck", ("pickup_truck", "bus"), (2, 7), "it is the class pickup_truck"),
    ("1", ("1", "2"), (0, 1), "subfolder 1: '1' is the name of one class and the number of another one"),
])  # fmt: skip
def test_folders_whose_class_is_uncertain_are_refused(tmp_path, name, classes, class_ids, message):
    write_chip(tmp_path / name / "1.png"), write_chip(tmp_path / "tank" / "2.png")
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


def test_a_reference_that_was_written_is_read(tmp_path):
    for name in ("a,b", "2"):
        write_chip(tmp_path / f"{name}.png")
    write_reference(tmp_path / "reference.csv", [("2", "bus", False), ("a,b", "tank", np.True_)])
    paths, labelled = read_chips(tmp_path, ("sedan", "bus"), (0, 7))
    assert [path.stem for path in paths] == ["2", "a,b"] and labelled.labels.tolist() == [1, -1]


@pytest.mark.parametrize("files", [
    {"labels.csv": b"id,label\n1,sedan\n"},
    {"labels.csv": "image_id,class,OOD_flag\n1,sedan,0\n".encode("utf-16")},
])  # fmt: skip
def test_validation_chips_that_are_not_used_are_announced(tmp_path, capsys, files):
    write_chip(tmp_path / "val" / "Gotcha1.png")
    for name, content in files.items():
        (tmp_path / "val" / name).write_bytes(content)
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None
    said = capsys.readouterr().out
    assert "val has no labels, so it does not validate" in said and said.endswith("CSVs there: labels.csv\n")


def test_chips_in_deeper_folders_and_in_folders_of_other_names_are_announced(tmp_path, capsys):
    write_chip(tmp_path / "Validation" / "bus" / "1.png")
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None
    assert "Validation is not read; labelled SAR chips that validate lie in" in capsys.readouterr().out
    write_chip(tmp_path / "val" / "SAR" / "bus" / "1.png")
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)) is None
    assert "val has no labels" in capsys.readouterr().out


def test_subfolders_beside_chips_are_left_aside_with_a_sentence(tmp_path, capsys):
    write_chip(tmp_path / "bus" / "1.png"), write_chip(tmp_path / "sedan" / "2.png"), (tmp_path / "empty").mkdir()
    assert len(find_chips(tmp_path)) == 2
    assert not capsys.readouterr().out
    write_chip(tmp_path / "preview.png"), write_chip(tmp_path / "bus" / "1.jpg")  # of one name with 1.png
    assert [path.name for path in find_chips(tmp_path)] == ["preview.png"]
    assert "its chips are the 1 images directly in it; those in subfolders are left aside: bus, sedan" in (
        capsys.readouterr().out
    )


def test_columns_of_a_reference_may_be_written_in_any_case(tmp_path):
    write_chip(tmp_path / "val" / "Gotcha5.png"), write_chip(tmp_path / "val" / "Gotcha6.png")
    (tmp_path / "val" / "labels.csv").write_text("Image_ID,Class,ood_flag\n5,bus,0\n6,x,1\n")
    assert find_validation(tmp_path, ("sedan", "bus"), (0, 7)).labels.tolist() == [1, -1]
