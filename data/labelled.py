"""Find chips to predict or to validate on, and their labels.

The chips of val/, test/ and TEST_DIR lie directly in the folder or in several subfolders. A reference CSV in the folder
has their labels. Without one, if a subfolder has the name of a class, or its number in a submission, the subfolders are
the labels of the chips: those in any other subfolder are out of distribution. A single subfolder, such as the `-1` of
2021/22, is no label.
"""

import csv
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, named
from data.files import SUFFIXES, images_below, plain_name, read_table, subfolders_with_images

import numpy as np

COLUMNS = ("image_id", "class", "OOD_flag")  # of a reference CSV
LIKE_VAL = "val", "valid", "validate", "validation"  # names, in lower case, of folders that may be meant by val
FLAG_NOTE = "without unknown objects the OOD_flag is 0"
OOD_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


@dataclass(frozen=True)
class Labelled:
    """Chips with their reference: labels [N] int64 (-1 where out of distribution), ood [N] bool."""

    paths: list
    labels: np.ndarray
    ood: np.ndarray

    def subset(self, indices):
        """The chips at `indices`, int64 array."""
        return Labelled([self.paths[i] for i in indices], self.labels[indices], self.ood[indices])


def find_chips(folder):
    """Image files directly in `folder`, else those in its subfolders; sorted by subfolder, then by name.

    Hidden files (also macOS's `._*`), hidden folders and files of other types are ignored.

    Raises:
        DataError: there is no such folder, it holds no chips, two chips have the same name, or a link is
            broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder of chips {folder}")
    chips = images_below(folder)
    if not chips:
        raise DataError(f"{folder} holds no chips ({', '.join(sorted(SUFFIXES))}); add some, or set another folder")
    if Path(chips[0]).parent == folder and (aside := subfolders_with_images(folder)):
        print(
            f"{folder}: its chips are the {len(chips)} images directly in it; those in subfolders are left aside: "
            f"{named(aside)}"
        )
    return sorted(map(Path, chips), key=lambda path: (_natural(path.parent.name), _natural(path.name)))


def read_chips(folder, classes, class_ids):
    """The chips in a folder, and their labels if it has a reference CSV or class folders.

    Args:
        folder: of `find_chips`.
        classes, class_ids: of `read_labelled`.

    Returns:
        paths, and `Labelled` or None.

    Raises:
        DataError: of `find_chips`, `find_reference` and `read_labelled`; or a subfolder has the name of a
            class in another spelling, or two meanings.
    """
    paths = find_chips(folder)
    if reference := find_reference(folder):
        return paths, read_labelled(paths, reference, classes, class_ids)
    several = len({path.parent for path in paths}) > 1
    return paths, _labelled_by_folder(folder, paths, classes, class_ids) if several else None


def find_validation(root, classes, class_ids):
    """The labelled SAR validation chips (`Labelled`) of a data set, or None, with a printed sentence, if it has none.

    Nothing is printed where there is no folder for them, or an empty one. classes, class_ids: of `read_labelled`.
    """
    folder = Path(root) / "val"
    if not folder.is_dir():
        others = [path.name for path in Path(root).iterdir() if path.name.lower() in LIKE_VAL and path.is_dir()]
        if others:
            print(f"{root}: {named(others)} is not read; labelled SAR chips that validate lie in {folder}")
        return None
    holds_chips = find_reference(folder) or images_below(folder)
    labelled = read_chips(folder, classes, class_ids)[1] if holds_chips else None
    files = [path for path in folder.rglob("*") if path.is_file()] if labelled is None else ()
    if files:
        csvs = sorted(path.name for path in files if path.suffix.lower() == ".csv")
        print(
            f"{folder} has no labels, so it does not validate: labelled chips lie directly in it, with a CSV in UTF-8 "
            f"that has the columns {','.join(COLUMNS)}, or in class folders"
            + (f"; CSVs there: {named(csvs)}" if csvs else "")
        )
    return labelled


def find_test(root):
    """The folder of the test chips of a data set.

    Raises:
        DataError: there is none.
    """
    for name in ("test", "test_images"):
        if (Path(root) / name).is_dir():
            return Path(root) / name
    raise DataError(f"{root} has no folder test or test_images; set TEST_DIR")


def find_reference(folder):
    """The reference CSV in a folder of chips, or None.

    A CSV is a reference if its header has at least two of the columns image_id, class and OOD_flag, in any case, or if
    its name contains "reference"; `read_labelled` needs all three. Other CSVs are ignored.

    Raises:
        DataError: there are several.
    """
    references = []
    for path in sorted(Path(folder).glob("*.[cC][sS][vV]")):
        if path.is_file() and not path.name.startswith("."):
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                header = re.split(r"[\s,;\"]+", next(filter(str.strip, file), ""))
            if len(set(map(str.lower, COLUMNS)) & set(map(str.lower, header))) > 1 or "reference" in path.name.lower():
                references.append(path)
    if len(references) > 1:
        raise DataError(f"{folder} holds several reference CSVs: {named(p.name for p in references)}")
    return references[0] if references else None


def read_labelled(paths, reference, classes, class_ids):
    """Join chips with their reference.

    Args:
        paths: chips.
        reference: CSV with the columns image_id (with or without extension, and without the prefix if the chips'
            numbers differ), class (a name of `classes`, or a number of `class_ids`) and OOD_flag (0 or 1; for 1 the
            class is ignored).
        classes: class names, position = label.
        class_ids: for each class its number in a submission.

    Raises:
        DataError: the file is not a CSV in UTF-8 with these columns, a chip has no row, two chips have
            the same image_id, a row has no chip or comes twice, or a class is unknown or ambiguous.
    """
    label_of, rows, key_of = _labels_by_text(classes, class_ids), {}, _key(paths)
    for line, image_id, name, flag in read_table(reference, COLUMNS, "a reference", FLAG_NOTE):
        where, key, ood = f"{reference}, line {line}", key_of(image_id), OOD_FLAGS.get(flag.lower())
        if ood is None:
            raise DataError(f"{where}: the OOD_flag of {image_id} is {flag!r}; write 0 or 1")
        if not ood and name not in label_of:
            known = f"the classes are {named(classes)}; their numbers, as in a submission, {named(class_ids)}"
            raise DataError(f"{where}: {image_id} has the unknown class {name!r}; {known}")
        if not ood and label_of[name] is None:
            raise DataError(f"{where}: {_ambiguous(name)}; write other class names")
        if key in rows:
            raise DataError(f"{where}: {image_id} stands there twice; remove one row")
        rows[key] = (-1 if ood else label_of[name], ood)
    keys = [key_of(path.name) for path in paths]
    if alike := sorted(key for key, count in Counter(keys).items() if count > 1):
        raise DataError(f"{reference} cannot tell the chips of one name apart: {named(alike)}")
    if missing := [path.name for path, key in zip(paths, keys, strict=True) if key not in rows]:
        raise DataError(f"{reference} has no row for {len(missing)} chips: {named(missing)}")
    if extra := sorted(set(rows) - set(keys)):
        raise DataError(f"{reference} names {len(extra)} chips that are not there: {named(extra)}")
    labels, ood = zip(*(rows[key] for key in keys), strict=True)
    return Labelled(paths, np.array(labels, dtype=np.int64), np.array(ood, dtype=bool))


def image_ids(paths):
    """The image_id of each chip in a submission: its number.

    If two numbers are equal: the file stem; if two stems are equal: folder/stem.
    """
    ids = list(map(_key(paths), (path.name for path in paths)))
    return ids if len(set(ids)) == len(ids) else [f"{path.parent.name}/{path.stem}" for path in paths]


def write_reference(path, rows):
    """Write a reference CSV; rows: (image_id, class, OOD flag) of each chip."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((image_id, name, int(ood)) for image_id, name, ood in rows)


def _labels_by_text(classes, class_ids):
    """{text: label} of the names of classes and of their numbers; None for a text that means two classes."""
    labels = {name: label for label, name in enumerate(classes)}
    for label, number in enumerate(class_ids):
        labels[str(number)] = label if labels.get(str(number), label) == label else None
    return labels


def _ambiguous(text):
    return f"{text!r} is the name of one class and the number of another one in a submission"


def _labelled_by_folder(folder, paths, classes, class_ids):
    """`Labelled` of chips in class folders; None, with a printed sentence, if none is named like a class."""
    label_of = _labels_by_text(classes, class_ids)
    plain = {plain_name(name): name for name in classes if re.search("[A-Za-z]", name)}  # "-1" is not "1"
    parents = [path.parent.name for path in paths]
    for name in sorted(set(parents)):
        if label_of.get(name, -1) is None:
            raise DataError(f"{folder}, subfolder {name}: {_ambiguous(name)}; rename it")
        if name not in label_of and plain_name(name) in plain:
            raise DataError(f"{folder}, subfolder {name}: it is the class {plain[plain_name(name)]}; rename it so")
    labels = np.array([label_of.get(name, -1) for name in parents], np.int64)
    ood = labels < 0
    unknown = sorted(set(parents) - set(label_of))
    if ood.all():
        print(f"{folder}: none of the subfolders is named like a class, so its chips have no labels: {named(unknown)}")
        return None
    others = f", those in the subfolders {named(unknown)}" if unknown else ""
    print(f"{folder}: the subfolders are the labels; {ood.sum()} of {len(ood)} chips are out of distribution{others}")
    return Labelled(paths, labels, ood)


def _key(paths):
    """The function of a name that tells these chips apart: `_bare` if their numbers differ, else `_stem`."""
    numbers = {_bare(path.name) for path in paths}
    return _bare if len(numbers) == len(paths) else _stem


def _bare(name):
    """The number in names such as `Gotcha17.png`, `SAR_17` and `17`; of any other name the stem."""
    match = re.fullmatch(r"(?:[A-Za-z]+_?)?(\d+)", _stem(name))
    return match[1] if match else _stem(name)


def _stem(name):
    """A file name without the extension of an image."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _natural(name):
    """Sort key that puts Gotcha9 before Gotcha10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
