"""Find the chips of a data set, in every layout of the challenge's releases, and order the classes.

| release  | EO and SAR for training                               | labelled SAR | test         |
|----------|-------------------------------------------------------|--------------|--------------|
| 2024/25  | [train/]EO_Train/<class>/, [train/]SAR_Train/<class>/ | val/ + CSV   | test/        |
| 2021/22  | train_images/<0..9>/EO_*, SAR_*                       |              | test_images/ |
| method's | EO/<class>/, SAR/<class>/                             |              | test/        |

Beside these, unlabelled/EO/ and unlabelled/SAR/ may hold pairs without labels, and unpaired/EO/<class>/ labelled EO
chips without a SAR chip.

The folders val and test, and TEST_DIR, may also hold the chips in several subfolders. If a subfolder has the
name of a class, or its number in a submission, the subfolders are the labels of the chips: those in any other
subfolder are out of distribution. A reference CSV in the folder takes precedence over the subfolders. A single
subfolder, such as the `-1` of 2021/22, is no label.
"""

import csv
import difflib
import os
import re
from collections import Counter
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from data.errors import DataError, named, reason

import numpy as np

# In the order of the challenge's class index, which is by frequency and not alphabetical.
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
SUFFIXES = {".npy", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
COLUMNS = ("image_id", "class", "OOD_flag")  # of a reference CSV
FLAG_NOTE = "without unknown objects the OOD_flag is 0"
OOD_FLAGS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
NEAR = 0.8  # similarity, 0..1, from which a folder name counts as a misspelt class name


@dataclass(frozen=True)
class Pairs:
    """Co-registered training chips, sorted by class, then by name.

    eo, sar: N paths (strings) each; paths of the same position have the same file name.
    labels: int64 [N], positions in `classes`.
    classes: class names.
    class_ids: for each class its index in a submission.
    """

    eo: list
    sar: list
    labels: np.ndarray
    classes: tuple
    class_ids: tuple

    @property
    def counts(self):
        """Number of pairs of each class, as a list."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()


@dataclass(frozen=True)
class Labelled:
    """Chips with their reference: labels [N] int64 (-1 where out of distribution), ood [N] bool."""

    paths: list
    labels: np.ndarray
    ood: np.ndarray

    def subset(self, indices):
        """The chips at `indices`, int64 array."""
        return Labelled([self.paths[i] for i in indices], self.labels[indices], self.ood[indices])


def find_pairs(root, classes=(), class_ids=()):
    """The training pairs of the data set in `root`, in any of the layouts above.

    Args:
        root: folder of the data set.
        classes: class folders in the order of their index; empty: the official order for
            the challenge's classes, alphabetical for any other set.
        class_ids: for each of `classes` its index in a submission, as a checkpoint has them; empty: the official
            index, the numbers that are the names, or the positions; the positions if `classes` are given.

    Raises:
        DataError: no layout fits, a class is empty or unknown, there is only one class, a chip has no
            counterpart of the other sensor, or the same pair lies in two classes.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"DATA_ROOT {root} is not a folder; set it to the folder of the data set")
    sides = _find_sides(root)
    order = class_order(set(sides[0]) | set(sides[1]), tuple(map(str, classes)))
    _check_sides(root, order, *sides)
    _check_labels(root, order, *sides)
    keys = [(label, key) for label, name in enumerate(order) for key in sorted(sides[0][name])]
    return Pairs(
        eo=[sides[0][order[label]][key] for label, key in keys],
        sar=[sides[1][order[label]][key] for label, key in keys],
        labels=np.array([label for label, _ in keys], dtype=np.int64),
        classes=order,
        class_ids=tuple(class_ids) or _class_ids(order, chosen=bool(classes)),
    )


def _find_sides(root):
    """{class: {name: path}} of the EO chips and of the SAR chips, in the first layout that the folder has."""
    for eo, sar in (("train/EO_Train", "train/SAR_Train"), ("EO_Train", "SAR_Train"), ("EO", "SAR")):
        if (root / eo).is_dir() or (root / sar).is_dir():
            return _by_class(root / eo), _by_class(root / sar)
    if (root / "train_images").is_dir():
        folders = _by_class(root / "train_images")
        sides = [_with_prefix(folders, "EO_"), _with_prefix(folders, "SAR_")]
        return [{_official_name(name): chips for name, chips in side.items()} for side in sides]
    raise DataError(
        f"{root} holds none of train/EO_Train, EO_Train, EO or train_images; "
        "the README shows the layouts, and _find_sides in data/layouts.py takes further ones"
    )


def class_order(names, chosen=()):
    """Class names in the order of their index: `chosen`, else official, else alphabetical.

    If most names are those of the challenge, in any spelling, a name that differs from them is refused:
    otherwise a misspelt name would silently replace the official order by the alphabetical one.

    Raises:
        DataError: there are fewer than two classes, `chosen` are not the same names, or a misspelt name.
    """
    if len(set(names)) < 2:
        raise DataError(f"there is one class alone, {named(names)}; a classifier needs two or more")
    if chosen:
        if sorted(chosen) != sorted(set(names)):
            raise DataError(
                f"the classes asked for, by CLASSES or the checkpoint, are not the class folders: only "
                f"asked for: {named(sorted(set(chosen) - set(names))) or '-'}; only folders: "
                f"{named(sorted(set(names) - set(chosen))) or '-'}; asked for twice: "
                f"{named(sorted({name for name in chosen if chosen.count(name) > 1})) or '-'}. "
                "Mend CLASSES, or set the DATA_ROOT that the checkpoint was trained on"
            )
        return tuple(chosen)
    near = {name: _official_like(name) for name in sorted(names)}
    if strange := [name for name in near if name not in OFFICIAL_CLASSES]:
        if 2 * sum(like is not None for like in near.values()) > len(near):
            meant = (f"{name} ({near[name]}?)" if near[name] else name for name in strange)
            raise DataError(
                f"class folders that are none of the challenge's classes, beside such that are: "
                f"{named(meant)}. Rename them, or take them as they are: CLASSES={','.join(near)}"
            )
        return tuple(near)
    return tuple(name for name in OFFICIAL_CLASSES if name in names)


def find_unlabelled(root):
    """Pairs without labels, which teach by the teacher alone: EO and SAR paths, two lists in the same order.

    They lie in unlabelled/EO and unlabelled/SAR of the data set, the same name on both sides. Both lists are empty
    if the data set has no folder unlabelled. Prints how many there are.

    Raises:
        DataError: one side is missing or holds no chips, a chip has no counterpart, or the folder's name is misspelt.
    """
    folder = _folder_beside(root, "unlabelled")
    if folder is None:
        return [], []
    for side in ("EO", "SAR"):
        if not (folder / side).is_dir():
            raise DataError(f"{folder} has no folder {side}; pairs without labels need both, EO and SAR")
    eo, sar = _images(folder / "EO"), _images(folder / "SAR")
    _check_names(folder, eo, sar)
    if not eo:
        raise DataError(f"{folder} holds no pairs; its chips lie directly in EO and SAR, without class folders")
    print(f"{len(eo)} pairs without labels are trained on as well")
    return [eo[key] for key in sorted(eo)], [sar[key] for key in sorted(sar)]


def find_unpaired(root, classes):
    """Labelled EO chips without a SAR chip, which teach the EO classifier alone: paths, and labels int64 [N].

    They lie in unpaired/EO/<class>/ of the data set. Both are empty if it has no folder unpaired. Prints how many.

    Raises:
        DataError: there are no class folders, one is empty or none of `classes`, or the folder's name is misspelt.
    """
    folder = _folder_beside(root, "unpaired")
    if folder is None:
        return [], np.zeros(0, np.int64)
    if not (folder / "EO").is_dir():
        raise DataError(f"{folder} has no folder EO; labelled EO chips without a SAR chip lie in {folder}/EO/<class>")
    chips = _by_class(folder / "EO")
    if strange := sorted(set(chips) - set(classes)):
        raise DataError(f"{folder}/EO: no classes of the pairs: {named(strange)}; rename them to {named(classes)}")
    keys = [(label, name, key) for label, name in enumerate(classes) for key in sorted(chips.get(name, ()))]
    print(f"{len(keys)} labelled EO chips without a SAR chip are trained on as well")
    return [chips[name][key] for _, name, key in keys], np.array([label for label, *_ in keys], np.int64)


def _folder_beside(root, name):
    """The folder of this name in a data set, or None; a name that is nearly it would silently be left out."""
    for folder in Path(root).iterdir():
        plain = folder.name.lower()
        near = plain.startswith("un") and difflib.SequenceMatcher(None, plain, name).ratio() > NEAR
        if near and folder.name != name and folder.is_dir():
            raise DataError(f"{folder}: rename it to {name}, or to something else if it is not meant")
    return Path(root, name) if Path(root, name).is_dir() else None


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
    chips = _images_below(folder)
    if not chips:
        raise DataError(f"{folder} holds no chips ({', '.join(sorted(SUFFIXES))}); add some, or set another folder")
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
    """The labelled SAR validation chips (`Labelled`) of a data set, or None if it has none.

    classes, class_ids: of `read_labelled`.
    """
    folder = Path(root) / "val"
    if not folder.is_dir() or not (find_reference(folder) or _images_below(folder)):
        return None
    return read_chips(folder, classes, class_ids)[1]


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

    A CSV is a reference if its header has at least two of the columns image_id, class and OOD_flag, or if
    its name contains "reference"; `read_labelled` needs all three. Other CSVs are ignored.

    Raises:
        DataError: there are several.
    """
    references = []
    for path in sorted(Path(folder).glob("*.[cC][sS][vV]")):
        if path.is_file() and not path.name.startswith("."):
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                header = re.split(r"[\s,;\"]+", next(filter(str.strip, file), ""))
            if len(set(COLUMNS) & set(header)) > 1 or "reference" in path.name.lower():
                references.append(path)
    if len(references) > 1:
        raise DataError(f"{folder} holds several reference CSVs: {named(p.name for p in references)}")
    return references[0] if references else None


def read_labelled(paths, reference, classes, class_ids):
    """Join chips with their reference.

    Args:
        paths: chips.
        reference: CSV with the columns image_id (with or without extension, and without the prefix if the chips'
            numbers differ), class
            (a name of `classes`, or a number of `class_ids`) and OOD_flag (0 or 1; for 1 the class is
            ignored).
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
    plain = {_plain(name): name for name in classes if re.search("[A-Za-z]", name)}  # "-1" is not "1"
    parents = [path.parent.name for path in paths]
    for name in sorted(set(parents)):
        if label_of.get(name, -1) is None:
            raise DataError(f"{folder}, subfolder {name}: {_ambiguous(name)}; rename it")
        if name not in label_of and _plain(name) in plain:
            raise DataError(f"{folder}, subfolder {name}: it is the class {plain[_plain(name)]}; rename it so")
    labels = np.array([label_of.get(name, -1) for name in parents], np.int64)
    ood = labels < 0
    unknown = sorted(set(parents) - set(label_of))
    if ood.all():
        print(f"{folder}: none of the subfolders is named like a class, so its chips have no labels: {named(unknown)}")
        return None
    others = f", those in the subfolders {named(unknown)}" if unknown else ""
    print(f"{folder}: the subfolders are the labels; {ood.sum()} of {len(ood)} chips are out of distribution{others}")
    return Labelled(paths, labels, ood)


def read_table(path, columns, kind, note):
    """Line number and the cells of the columns, strings, of each row of a CSV.

    Args:
        path: CSV in UTF-8.
        columns: names of the columns, in the order of the cells; others are ignored.
        kind, note: what the file is, "a reference", and what to know of its columns; for the message.

    Raises:
        DataError: the file cannot be read, is no CSV, has not these columns, or a row has too few or too many cells.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV in UTF-8 ({reason(error)}); save it as one") from error
    lines = [(number, row) for number, row in lines if any(row)]
    header = lines[0][1] if lines else []
    if absent := [name for name in columns if name not in header]:
        raise DataError(
            f"{path} has no column {' and no '.join(absent)}; {kind} starts with the line {','.join(columns)} ({note})"
        )
    wanted = [header.index(name) for name in columns]
    for number, row in lines[1:]:
        if any(row[len(header) :]) or len(row) < len(header) or "\0" in "".join(row):
            raise DataError(
                f"{path}, line {number}: {len(row)} cells where the header has {len(header)}, or a NUL "
                "byte; put cells with commas in quotes, and save the file as plain text"
            )
        yield number, *(row[i] for i in wanted)


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


def _images_below(folder):
    """Paths, strings, of the image files directly in a folder, else of those in its subfolders."""
    if chips := _images(folder):
        return list(chips.values())
    subfolders = (sub for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.name.startswith("."))
    return [path for sub in subfolders for path in _images(sub).values()]


def _images(folder):
    """{stem: path, a string} of the image files directly in a folder."""
    images, broken, twice = {}, [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            if suffix.lower() not in SUFFIXES or entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                broken.append(entry.path)
            elif entry.is_file():
                twice += [stem] if stem in images else []
                images[stem] = entry.path  # a string; a million Path objects would be slow
    if broken:
        raise DataError(f"links that lead nowhere: {named(sorted(broken))}; mend or remove them")
    if twice:
        raise DataError(f"{folder} holds two files of one name: {named(sorted(twice))}; keep one")
    return images


def _by_class(folder):
    """{class: {stem: path}} of a folder of class folders."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing, its counterpart of the other sensor is there")
    classes = {}
    for sub in sorted(folder.iterdir()):
        if sub.is_dir() and not sub.name.startswith("."):
            classes[sub.name] = _images(sub)
            if not classes[sub.name]:
                raise DataError(f"the class folder {sub} holds no chips; fill or remove it")
    if not classes:
        raise DataError(f"{folder} holds no class folders")
    return classes


def _with_prefix(folders, prefix):
    """The chips of one sensor in folders that hold both. Keys lose the prefix, so that pairs share a key."""
    return {
        name: {s.removeprefix(prefix): path for s, path in chips.items() if s.startswith(prefix)}
        for name, chips in folders.items()
    }


def _official_name(folder):
    """The class name of a folder; the 2021/22 release names its class folders by the official index."""
    return dict(zip("0123456789", OFFICIAL_CLASSES, strict=True)).get(folder, folder)


def _plain(name):
    """A name in lower case, its letters and digits only."""
    return re.sub(r"[\W_]", "", name.lower())


def _official_like(name):
    """The official class whose name, perhaps misspelt, a folder has; None if there is none."""
    plain = {_plain(official): official for official in OFFICIAL_CLASSES}
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=NEAR)
    return plain[near[0]] if near else None


def _class_ids(order, chosen):
    """Index of each class in a submission: the official index, the number in its name, or its position."""
    if not chosen and set(order) <= set(OFFICIAL_CLASSES):
        return tuple(OFFICIAL_CLASSES.index(name) for name in order)
    if not chosen and all(re.fullmatch("0|[1-9][0-9]{0,8}", name) for name in order):
        return tuple(map(int, order))
    return tuple(range(len(order)))


def _check_sides(root, order, eo, sar):
    """Raise DataError unless each EO chip has its SAR chip, and the reverse."""
    for name in order:
        left, right = eo.get(name, ()), sar.get(name, ())
        if not left and not right:
            raise DataError(f"{root}, class {name}: no chip is named EO_<number> or SAR_<number>")
        _check_names(f"{root}, class {name}", left, right)


def _check_names(where, eo, sar):
    """Raise DataError unless the names of both sensors' chips are the same."""
    left, right = set(eo), set(sar)
    if left != right:
        raise DataError(
            f"{where}: {len(left - right)} EO chips without SAR "
            f"({named(sorted(left - right), 5) or '-'}), {len(right - left)} SAR chips without "
            f"EO ({named(sorted(right - left), 5) or '-'}); pairs carry the same name"
        )


def _check_labels(root, order, eo, sar):
    """Raise DataError if a pair lies in two classes. The same name with other pixels is allowed."""
    class_of, twice = {}, []
    for name in order:
        for key in eo[name]:
            other = class_of.setdefault(key, name)
            if other != name and all(cmp(side[other][key], side[name][key], False) for side in (eo, sar)):
                twice.append(f"{key} ({other}, {name})")
    if twice:
        raise DataError(
            f"{root}: {len(twice)} pairs lie in two classes: {named(twice, 5)}; keep each in its own"
        )
