"""Read folders of image files, and CSVs."""

import csv
import os
import re

from data.errors import DataError, named, reason

SUFFIXES = {".npy", ".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}


def read_table(path, columns, kind, note):
    """Line number and the cells of the columns, strings, of each row of a CSV.

    Args:
        path: CSV in UTF-8.
        columns: names of the columns, in the order of the cells, in any case; others are ignored.
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
    header = [name.lower() for name in lines[0][1]] if lines else []
    if absent := [name for name in columns if name.lower() not in header]:
        raise DataError(
            f"{path} has no column {' and no '.join(absent)}; {kind} starts with the line {','.join(columns)} ({note})"
        )
    wanted = [header.index(name.lower()) for name in columns]
    for number, row in lines[1:]:
        if any(row[len(header) :]) or len(row) < len(header) or "\0" in "".join(row):
            raise DataError(
                f"{path}, line {number}: {len(row)} cells where the header has {len(header)}, or a NUL "
                "byte; put cells with commas in quotes, and save the file as plain text"
            )
        yield number, *(row[i] for i in wanted)


def images_in(folder):
    """{stem: path, a string} of the image files directly in a folder."""
    images, broken, twice = {}, [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_image(entry.name):
                continue
            stem = os.path.splitext(entry.name)[0]
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


def images_below(folder):
    """Paths, strings, of the image files directly in a folder, else of those in its subfolders."""
    if chips := images_in(folder):
        return list(chips.values())
    return [path for sub in _subfolders(folder) for path in images_in(sub).values()]


def subfolders_with_images(folder):
    """Names of the subfolders in which image files lie, whatever else may be wrong with them."""
    return [sub.name for sub in _subfolders(folder) if any(_is_image(name) for name in os.listdir(sub))]


def _is_image(name):
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


def _subfolders(folder):
    return [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.name.startswith(".")]


def plain_name(name):
    """A name in lower case, its letters and digits only."""
    return re.sub(r"[\W_]", "", name.lower())
