"""Find the training chips of a data set, in every layout of the challenge's releases, and order the classes.

| release  | EO and SAR for training                               | labelled SAR | test         |
|----------|-------------------------------------------------------|--------------|--------------|
| 2024/25  | [train/]EO_Train/<class>/, [train/]SAR_Train/<class>/ | val/ + CSV   | test/        |
| 2021/22  | train_images/<0..9>/EO_*, SAR_*                       |              | test_images/ |
| method's | EO/<class>/, SAR/<class>/                             |              | test/        |

Beside these, unlabelled/EO/ and unlabelled/SAR/ may hold pairs without labels, and unpaired/EO/<class>/ labelled EO
chips without a SAR chip.

The labelled SAR chips and the test chips: `data.labelled`.
"""

import difflib
import re
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path

from data.errors import DataError, named
from data.files import images_in, plain_name

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
PREFIXES = "EO_", "SAR_"  # of the names of 2021/22, where the chips of both sensors lie in one folder
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
    class_ids = tuple(class_ids) or _class_ids(order, chosen=bool(classes))
    keys = [(label, key) for label, name in enumerate(order) for key in sorted(sides[0][name])]
    return Pairs(
        eo=[sides[0][order[label]][key] for label, key in keys],
        sar=[sides[1][order[label]][key] for label, key in keys],
        labels=np.array([label for label, _ in keys], dtype=np.int64),
        classes=order,
        class_ids=class_ids,
    )


def _find_sides(root):
    """{class: {name: path}} of the EO chips and of the SAR chips, in the first layout that the folder has."""
    for eo, sar in (("train/EO_Train", "train/SAR_Train"), ("EO_Train", "SAR_Train"), ("EO", "SAR")):
        if (root / eo).is_dir() or (root / sar).is_dir():
            return _by_class(root / eo), _by_class(root / sar)
    if (root / "train_images").is_dir():
        folders = _by_class(root / "train_images")
        sides = [_with_prefix(folders, prefix) for prefix in PREFIXES]
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
            # In the official order, since with CLASSES the position is the number in a submission.
            by_index = sorted(near, key=lambda name: (*OFFICIAL_CLASSES, None).index(near[name]))
            raise DataError(
                f"class folders that are none of the challenge's classes, beside such that are: "
                f"{named(meant)}. Rename them, or take them as they are: CLASSES={','.join(by_index)} "
                "(numbered 0, 1, ... in a submission)"
            )
        return tuple(near)
    return tuple(name for name in OFFICIAL_CLASSES if name in names)


def find_unlabelled(root):
    """Pairs without labels, which teach by the teacher alone: EO and SAR paths, two lists in the same order.

    They lie in unlabelled/EO and unlabelled/SAR of the data set, the same name on both sides. Both lists are empty
    if the data set has no folder unlabelled.

    Raises:
        DataError: one side is missing or holds no chips, a chip has no counterpart, or the folder's name is misspelt.
    """
    folder = _folder_beside(root, "unlabelled")
    if folder is None:
        return [], []
    for side in ("EO", "SAR"):
        if not (folder / side).is_dir():
            raise DataError(f"{folder} has no folder {side}; pairs without labels need both, EO and SAR")
    eo, sar = images_in(folder / "EO"), images_in(folder / "SAR")
    _check_names(folder, eo, sar)
    if not eo:
        raise DataError(f"{folder} holds no pairs; its chips lie directly in EO and SAR, without class folders")
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


def _by_class(folder):
    """{class: {stem: path}} of a folder of class folders."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing, its counterpart of the other sensor is there")
    classes = {}
    for sub in sorted(folder.iterdir()):
        if sub.is_dir() and not sub.name.startswith("."):
            classes[sub.name] = images_in(sub)
            if not classes[sub.name]:
                raise DataError(f"the class folder {sub} holds no chips; fill or remove it")
    if not classes:
        raise DataError(f"{folder} holds no class folders")
    return classes


def _with_prefix(folders, prefix):
    """The chips of one sensor in folders that hold both. Keys lose the prefix, so that pairs share a key."""
    mixed = (chips for chips in folders.values() if any(stem.startswith(PREFIXES) for stem in chips))
    if strange := [path for chips in mixed for stem, path in chips.items() if not stem.startswith(PREFIXES)]:
        raise DataError(f"{len(strange)} chips are named neither EO_ nor SAR_: {named(strange, 5)}; rename them")
    return {
        name: {s.removeprefix(prefix): path for s, path in chips.items() if s.startswith(prefix)}
        for name, chips in folders.items()
    }


def _official_name(folder):
    """The class name of a folder; the 2021/22 release names its class folders by the official index."""
    return dict(zip("0123456789", OFFICIAL_CLASSES, strict=True)).get(folder, folder)


def _official_like(name):
    """The official class whose name, perhaps misspelt, a folder has; None if there is none."""
    plain = {plain_name(official): official for official in OFFICIAL_CLASSES}
    near = difflib.get_close_matches(plain_name(name), plain, n=1, cutoff=NEAR)
    return plain[near[0]] if near else None


def _class_ids(order, chosen):
    """Index of each class in a submission: the official index, the number in its name, or its position."""
    if set(order) <= set(OFFICIAL_CLASSES):
        official = tuple(OFFICIAL_CLASSES.index(name) for name in order)
        if not chosen:
            return official
        if official != tuple(range(len(order))):
            numbers = named(f"{number} {name}" for number, name in enumerate(order))
            print(f"CLASSES numbers the classes in a submission {numbers}; the challenge's own numbers are others")
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
