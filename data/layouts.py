"""Find the chips: every layout of the challenge's releases, the official class order.

| release  | EO and SAR for training                            | labelled SAR | test           |
|----------|----------------------------------------------------|--------------|----------------|
| 2024/25  | [train/]EO_Train/<class>/, [train/]SAR_Train/<class>/ | val/ + CSV | test/          |
| 2021/22  | train_images/<0..9>/EO_*, SAR_*                    |              | test_images/   |
| method's | EO/<class>/, SAR/<class>/                          |              | test/          |
"""

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, named

import numpy as np

# By frequency, which is the challenge's index; the folders' alphabetical order is not.
OFFICIAL_CLASSES = (
    "sedan",
    "SUV",
    "pickup_truck",
    "van",
    "box_truck",
    "motorcycle",
    "flatbed_truck",
    "bus",
    "pickup_truck_w_trailer",
    "semi_w_trailer",
)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Pairs:
    """Co-registered training chips, sorted by class, then by name.

    eo, sar: N paths each (strings), of the same names; labels: [N] int64 position in `classes`;
    class_ids: for each class the index that a submission writes.
    """

    eo: list
    sar: list
    labels: np.ndarray
    classes: tuple
    class_ids: tuple


@dataclass(frozen=True)
class Labelled:
    """Chips with their reference: labels [N] int64 (-1 where out of distribution), ood [N] bool."""

    paths: list
    labels: np.ndarray
    ood: np.ndarray


def find_pairs(root, classes=()):
    """The training pairs below `root`, in any of the layouts above.

    Args:
        root: folder of the data set.
        classes: class folders in the order of their index; empty: the official order for
            the challenge's classes, alphabetical for any other set.

    Raises:
        DataError: no layout fits, a class is empty or unknown, or the sides do not match.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"DATA_ROOT {root} is not a folder; set it to where the chips lie")
    for eo, sar in (("train/EO_Train", "train/SAR_Train"), ("EO_Train", "SAR_Train"), ("EO", "SAR")):
        if (root / eo).is_dir() or (root / sar).is_dir():
            sides = [_by_class(root / eo), _by_class(root / sar)]
            break
    else:
        if not (root / "train_images").is_dir():
            raise DataError(
                f"{root} holds none of train/EO_Train, EO_Train, EO or train_images; "
                "the README shows the layouts"
            )
        folders = _by_class(root / "train_images")
        sides = [_with_prefix(folders, "EO_"), _with_prefix(folders, "SAR_")]
        sides = [{_official_name(name): chips for name, chips in side.items()} for side in sides]
    order = class_order(set(sides[0]) | set(sides[1]), tuple(map(str, classes)))
    _check_sides(root, order, *sides)
    keys = [(label, key) for label, name in enumerate(order) for key in sorted(sides[0][name])]
    return Pairs(
        eo=[sides[0][order[label]][key] for label, key in keys],
        sar=[sides[1][order[label]][key] for label, key in keys],
        labels=np.array([label for label, _ in keys], dtype=np.int64),
        classes=order,
        class_ids=_class_ids(order, chosen=bool(classes)),
    )


def class_order(names, chosen=()):
    """Class names in the order of their index: `chosen`, else official, else alphabetical."""
    if chosen:
        if set(chosen) != set(names):
            raise DataError(
                f"CLASSES and the class folders differ: only in CLASSES: "
                f"{named(sorted(set(chosen) - set(names))) or '-'}; only folders: "
                f"{named(sorted(set(names) - set(chosen))) or '-'}"
            )
        return tuple(chosen)
    if set(names) <= set(OFFICIAL_CLASSES):
        return tuple(name for name in OFFICIAL_CLASSES if name in names)
    return tuple(sorted(names))


def find_chips(folder):
    """Image files directly in `folder`, else in its only subfolder that has any; sorted by name.

    Hidden files (also macOS's `._*`) and other files are left aside.

    Raises:
        DataError: no such folder, or no chips.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder of chips {folder}")
    chips = _images(folder)
    if not chips:
        below = [found for sub in sorted(folder.iterdir()) if sub.is_dir() and (found := _images(sub))]
        chips = below[0] if len(below) == 1 else []
    if not chips:
        raise DataError(f"{folder} holds no chips ({', '.join(sorted(SUFFIXES))})")
    return [Path(chips[name]) for name in sorted(chips, key=_natural)]


def find_validation(root, classes):
    """The labelled SAR validation chips, or None where the data set has none."""
    folder = Path(root) / "val"
    reference = find_reference(folder)
    return read_labelled(find_chips(folder), reference, classes) if reference else None


def find_test(root):
    """The folder of the test chips of a data set."""
    for name in ("test", "test_images"):
        if (Path(root) / name).is_dir():
            return Path(root) / name
    raise DataError(f"{root} has no folder test or test_images; set TEST_DIR")


def find_reference(folder):
    """The reference CSV beside the chips (a header with image_id and class), or None."""
    found = []
    for path in sorted(Path(folder).glob("*.[cC][sS][vV]")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = [name.strip() for name in next(csv.reader(file), [])]
        if {"image_id", "class"} <= set(header):
            found.append(path)
    if len(found) > 1:
        raise DataError(f"{folder} holds several reference CSVs: {named(p.name for p in found)}")
    return found[0] if found else None


def read_labelled(paths, reference, classes):
    """Join chips with their reference.

    Args:
        paths: chips.
        reference: CSV with the columns image_id (with or without prefix and extension), class
            (a name of `classes`, or its index), OOD_flag (1: the class means nothing).
        classes: class names, position = label.

    Raises:
        DataError: a chip without row, a row twice or without chip, an unknown class.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    rows = {}
    with open(reference, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, skipinitialspace=True):
            row = {key.strip(): (value or "").strip() for key, value in row.items() if key}
            key, ood = _bare(row["image_id"]), row.get("OOD_flag", "0") in ("1", "1.0", "True", "true")
            name = row["class"]
            if name not in label_of and name.isdigit() and int(name) < len(classes):
                name = classes[int(name)]
            if not ood and name not in label_of:
                raise DataError(f"{reference}: {row['image_id']} has the unknown class {row['class']!r}")
            if key in rows:
                raise DataError(f"{reference}: {row['image_id']} stands there twice")
            rows[key] = (-1 if ood else label_of[name], ood)
    keys = [_bare(path.name) for path in paths]
    if missing := [path.name for path, key in zip(paths, keys, strict=True) if key not in rows]:
        raise DataError(f"{reference} has no row for {len(missing)} chips: {named(missing)}")
    if lost := sorted(set(rows) - set(keys)):
        raise DataError(f"{reference} names {len(lost)} chips that are not there: {named(lost)}")
    labels, ood = zip(*(rows[key] for key in keys), strict=True)
    return Labelled(paths, np.array(labels, dtype=np.int64), np.array(ood, dtype=bool))


def image_ids(paths):
    """The submission's image_id of each chip: the bare number, or the stem where none is unique."""
    ids = [_bare(path.name) for path in paths]
    return ids if len(set(ids)) == len(ids) else [path.stem for path in paths]


def _bare(name):
    """`Gotcha17.png`, `SAR_17` and `17` are all chip 17; any other name is its stem."""
    stem = re.sub(r"\.[A-Za-z]+$", "", name)
    match = re.fullmatch(r"(?:[A-Za-z]+_?)?(\d+)", stem)
    return match[1] if match else stem


def _natural(name):
    """Sort key that puts Gotcha9 before Gotcha10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _images(folder):
    """{file name: path, a string} of the image files directly in a folder."""
    with os.scandir(folder) as entries:
        return {
            entry.name: entry.path  # not a Path, of which a million take their time
            for entry in entries
            if os.path.splitext(entry.name)[1].lower() in SUFFIXES
            and not entry.name.startswith(".")
            and entry.is_file()
        }


def _by_class(folder):
    """{class: {stem: path}} of a folder of class folders."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing, its counterpart of the other sensor is there")
    found = {}
    for sub in sorted(folder.iterdir()):
        if sub.is_dir() and not sub.name.startswith("."):
            found[sub.name] = {os.path.splitext(name)[0]: path for name, path in _images(sub).items()}
            if not found[sub.name]:
                raise DataError(f"the class folder {sub} holds no chips; fill or remove it")
    if not found:
        raise DataError(f"{folder} holds no class folders")
    return found


def _with_prefix(folders, prefix):
    """One sensor of folders that hold both, the prefix cut off so that pairs share a key."""
    return {
        name: {s.removeprefix(prefix): path for s, path in chips.items() if s.startswith(prefix)}
        for name, chips in folders.items()
    }


def _official_name(folder):
    """The 2021/22 release names its class folders by the official index."""
    known = folder.isdigit() and int(folder) < len(OFFICIAL_CLASSES)
    return OFFICIAL_CLASSES[int(folder)] if known else folder


def _class_ids(order, chosen):
    """Index of each class in a submission: the official one, else its position."""
    if not chosen and set(order) <= set(OFFICIAL_CLASSES):
        return tuple(OFFICIAL_CLASSES.index(name) for name in order)
    if not chosen and all(name.isdigit() for name in order):
        return tuple(map(int, order))
    return tuple(range(len(order)))


def _check_sides(root, order, eo, sar):
    """Every EO chip has its SAR chip and the reverse."""
    for name in order:
        left, right = set(eo.get(name, ())), set(sar.get(name, ()))
        if left != right:
            raise DataError(
                f"{root}, class {name}: {len(left - right)} EO chips without SAR "
                f"({named(sorted(left - right), 5) or '-'}), {len(right - left)} SAR chips without "
                f"EO ({named(sorted(right - left), 5) or '-'}); pairs carry the same name"
            )
