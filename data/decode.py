"""Image files to grey levels: one file, or all files of a data set on all cores.

It does not import torch, so that a worker process starts quickly.
"""

import contextlib
import hashlib
import io
import math
import os
import struct
import tokenize
from typing import NamedTuple

from data.errors import DataError, reason
from data.workers import map_in_processes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

MAX_SIDE = 512  # px; larger chips are resized to it
CHUNK = 512  # chips that a worker decodes at a time
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # tried by content, not by name; none executes code
READ_AT_ONCE = 2**16  # bytes; a smaller file is read with one system call, which saves an eighth of the time
MAX_PIXELS = 2**24  # an image with more pixels is a whole scene and needs too much memory
NUMPY = b"\x93NUMPY"  # the first bytes of a .npy file
EIGHT_BITS, SIXTEEN_BITS = (0.0, 255.0), (0.0, 65535.0)  # black and white of files
DEPTHS = (8, 10, 12, 14, 16)  # bits that integers in wider files have, each four times the range of the one before
PERCENTILES = (0.1, 99.9)  # of the pixels, which become black and white
SURVEYED = 250  # files of a data set whose headers are read, and ...
COMMON = 0.2  # share of these files from which a side is the common one; below it the sides are all different
SURVEYED_PIXELS = 10_000  # ... pixels of each, if it has more than 8 bits
OUTSIDE = 0.9  # share of pixels above white, or below black, from which a file cannot belong to the others
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO = 0  # value of PHOTOMETRIC
ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # of Pillow's image.info
# What Pillow and numpy raise for files that are not images; it depends on their versions.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
UNREADABLE += (AttributeError, MemoryError, struct.error, tokenize.TokenError, Image.DecompressionBombError)


class Decoded(NamedTuple):
    """What is known of a data set once all files are decoded.

    unreadable: {index: "file (what is wrong with it)"}; their chips are black.
    multipage: files with more than one page, of which the first is taken.
    not_finite: {file: number of its pixels that are NaN or infinite}; these pixels are black.
    outside: share of all pixels that are darker than black or brighter than white.
    digest: hex string, equal for equal pixels in equal order, whatever the files are called.
    """

    unreadable: dict
    multipage: list
    not_finite: dict
    outside: float
    digest: str


class Survey(NamedTuple):
    """What some hundred files, spread evenly over a data set, say of it.

    side: the most common longest side, px; the median, if fewer than a fifth have that; at most MAX_SIDE.
    grey_range: (black, white) of `decode`, floats: (0, 255) if all of these files have 8 bits; of unsigned
        integers (0, 2^b - 1) for the least b of DEPTHS that holds 99.9 % of the pixels; else two percentiles.
    """

    side: int
    grey_range: tuple


class _File(NamedTuple):
    """A decoded file: levels uint8 [H, W], whether it has several pages, number of its pixels that are not finite,
    share of its pixels outside black and white."""

    levels: np.ndarray
    multipage: bool
    not_finite: int
    outside: float


def decode(path, side=None, grey_range=None):
    """One image file as grey levels, uint8 [H, W], or [side, side] where `side` is given.

    8-bit grey levels stay as they are. Those of 16 bits, signed or floating-point levels, and 2-D arrays in .npy
    files become 255 (v - black) / (white - black), rounded and clipped; NaN and infinite pixels become black.
    Colour and palette images become luma (ITU-R 601, exact for grey), transparency is ignored. The EXIF
    orientation is obeyed. A file of several pages gives its first page.

    Args:
        path: image file.
        side: px.
        grey_range: (black, white) of files that have more than 8 bits; None = (0, 65535) for integers, while
            floating-point levels are refused.

    Raises:
        DataError: the file is not a readable image, too large for a chip, or nearly all above white or below black.
    """
    return _decode(path, side, grey_range).levels


def grey_levels(image, side=None, grey_range=None):
    """A PIL image, which may be opened from a file, or an array [H, W] as `decode` gives a file with its pixels.

    Args, raises: of `decode`.
    """
    try:
        values = _values_of_array(image) if isinstance(image, np.ndarray) else _values_of_image(image)
        return _resized(_to_levels(values, grey_range)[0], side)
    except UNREADABLE as error:
        raise DataError(reason(error)) from error


def _decode(path, side, grey_range):
    """The file as `_File`."""
    values, multipage = _values(path)
    try:
        levels, not_finite, outside = _to_levels(values, grey_range)
        return _File(_resized(levels, side), multipage, not_finite, outside)
    except UNREADABLE as error:
        raise DataError(reason(error)) from error


def _resized(levels, side):
    """Levels, uint8 [H, W], as [side, side]; unchanged if `side` is None."""
    if side is None or levels.shape == (side, side):
        return levels
    image = Image.fromarray(levels).resize((side, side), Image.Resampling.BILINEAR)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(side, side)


def _values(path):
    """The values in a file, [H, W], uint8 if they have 8 bits; and whether the file has more than one page."""
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(READ_AT_ONCE)
        source = path if len(start) == READ_AT_ONCE else io.BytesIO(start)
        if start.startswith(NUMPY):
            return _array(source), False
        with Image.open(source, formats=FORMATS) as image:
            _check_size(image.height, image.width)
            multipage = image.format == "TIFF" and image.is_animated
            image.load()  # a PNG may hold its EXIF block behind the pixels
            may_be_turned = image.format == "TIFF" or not ORIENTATION_KEYS.isdisjoint(image.info)
            return _values_of_image(image, may_be_turned), multipage
    except UnidentifiedImageError as error:
        raise DataError("cannot identify image file") from error
    except UNREADABLE as error:
        raise DataError(reason(error)) from error


def _array(source):
    """The array in a .npy file, [H, W]; no code in it is executed."""
    if isinstance(source, io.BytesIO):
        array = np.load(source, allow_pickle=False)
    else:  # mapped, or a huge file would be read before its size is known
        array = np.load(source, mmap_mode="r", allow_pickle=False)
    return _values_of_array(array)


def _values_of_array(array):
    """The values, [H, W], of an array that is a chip."""
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"it holds {array.dtype} {list(array.shape)}; a chip is an array [H, W] of real numbers")
    _check_size(*array.shape)
    return array.astype(np.uint8) * 255 if array.dtype == bool else np.ascontiguousarray(array)


def _values_of_image(image, may_be_turned=True):
    """The values of a PIL image, [H, W], upright as its EXIF orientation says. A damaged EXIF block is ignored."""
    signed, tags = _is_signed(image), image.tag_v2 if image.format == "TIFF" else {}
    if may_be_turned:
        with contextlib.suppress(*UNREADABLE):
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _wide_values(image, tags)
    image = _grey(image)
    return np.frombuffer(image.tobytes(), np.int8 if signed else np.uint8).reshape(image.height, image.width)


def _wide_values(image, tags):
    """The values of an image of more than 8 bits; Pillow ignores two tags of a TIFF there.

    tags: {number: value} of a TIFF.
    """
    values = np.asarray(image)
    if values.dtype == np.int32 and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow takes them as signed
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        if values.dtype.kind != "u":
            raise ValueError("0 is white in it, as its tag PhotometricInterpretation says; save it with 0 as black")
        values = np.iinfo(values.dtype).max - values
    return values


def _check_size(height, width):
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} px are no chip; cut it into chips")


def _is_signed(image):
    """Whether an image of 8 bits is a TIFF of signed integers, which Pillow gives as unsigned ones."""
    return image.format == "TIFF" and image.mode == "L" and tuple(image.tag_v2.get(SAMPLE_FORMAT, ())) == (2,)


def _to_levels(values, grey_range):
    """Levels, uint8 [H, W], of values [H, W]; number of pixels that are not finite, and share of those outside."""
    if values.dtype == np.uint8:
        return values, 0, 0.0
    if grey_range is None:
        if values.dtype.kind == "f":
            raise ValueError("floating-point levels have no fixed black and white; set GREY_RANGE")
        grey_range = SIXTEEN_BITS
    (black, white), numbers, finite = grey_range, values.astype(np.float64), np.isfinite(values)
    low, high = numbers.min(initial=math.inf, where=finite), numbers.max(initial=-math.inf, where=finite)
    brighter, darker = (numbers[finite] > white).sum(), (numbers[finite] < black).sum()
    if low < high and max(brighter, darker) > OUTSIDE * finite.sum():  # a chip of one level is an empty one
        fitting = "{:g},{:g}".format(*_choose_range([values]))
        raise ValueError(
            f"nearly all of its levels, {low:g} to {high:g}, are outside GREY_RANGE={black:g},{white:g}; train with "
            f"GREY_RANGE={fitting}, or convert the file to levels of {black:g} to {white:g}"
        )
    shares = ((np.where(finite, numbers, black) - black) / (white - black)).clip(0, 1)
    return np.rint(255 * shares).astype(np.uint8), int((~finite).sum()), float(brighter + darker) / values.size


def _grey(image):
    """The image in 8-bit grey levels."""
    if image.mode == "L":
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")  # the palette's colours; converted directly, their numbers would count
    return image.convert("L")


def survey(paths):
    """The `Survey` of a data set of these files."""
    sides, values = [], []
    for path in paths[:: max(1, len(paths) // SURVEYED)]:
        try:
            side, has_8_bits = _header(path)
            sides.append(side)
            if not has_8_bits:
                values.append(_values(path)[0])
        except (DataError, *UNREADABLE):
            continue  # `decode_all` reports it with all others
    counts = np.bincount(sides or [1])
    side = int(counts.argmax() if counts.max() >= COMMON * len(sides) else np.median(sides))
    side = min(side, MAX_SIDE)
    return Survey(side, _choose_range(values) if values else EIGHT_BITS)


def _header(path):
    """Longest side of an image, px, and whether its levels have 8 bits."""
    if os.fspath(path).lower().endswith(".npy"):
        values = _values(path)[0]
        return max(values.shape), values.dtype == np.uint8
    with Image.open(path, formats=FORMATS) as image:
        return max(image.size), not (image.mode.startswith(("I", "F")) or _is_signed(image))


def _choose_range(arrays):
    """(black, white), floats, of arrays of values that have more than 8 bits."""
    unsigned = all(array.dtype.kind in "ui" and array.min() >= 0 for array in arrays)
    pixels = [array.ravel()[:: -(-array.size // SURVEYED_PIXELS)] for array in arrays]
    pixels = [array[np.isfinite(array)].astype(np.float64) for array in pixels]
    varied = [array for array in pixels if len(array) and array.min() < array.max()]  # others are empty chips
    if not varied:
        return SIXTEEN_BITS if unsigned else (0.0, 1.0)
    black, white = np.percentile(np.concatenate(varied), PERCENTILES)
    if unsigned and white <= SIXTEEN_BITS[1]:
        return 0.0, float(next(2**bits - 1 for bits in DEPTHS if white <= 2**bits - 1))
    # Six digits, so that the last ones of a percentile do not make another store.
    black, white = float(f"{black:.6g}"), float(f"{white:.6g}")
    return black, white if white > black else black + 1


def decode_all(paths, target, side, fork, grey_range=None):
    """Decode all files on all cores into the .npy file `target`, uint8 [N, side, side], in bounded memory.

    Args:
        paths: N image files.
        target: file to write.
        side: px.
        fork: whether worker processes may be forked, which starts them at once.
        grey_range: of `decode`.

    Returns:
        Decoded.

    Raises:
        OSError: the disk is full, or a worker was killed.
    """
    shape = (len(paths), side, side)
    array = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk raises an error here, and kills no worker later
        with open(target, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(target))
    starts = range(0, len(paths), CHUNK)
    chunks = [(target, start, paths[start : start + CHUNK], side, grey_range) for start in starts]
    unreadable, multipage, not_finite, outside, digest = {}, [], {}, 0.0, hashlib.blake2b(digest_size=16)
    with tqdm(total=len(paths), desc=f"decode {os.path.dirname(paths[0])}", unit=" chips", disable=None) as bar:
        for bad, paged, with_gaps, out, digests in map_in_processes(_decode_chunk, chunks, fork):
            unreadable |= bad
            multipage += paged
            not_finite |= with_gaps
            outside += out
            digest.update(b"".join(digests))
            bar.update(len(digests))
    array.flush()
    return Decoded(unreadable, multipage, not_finite, outside / len(paths), digest.hexdigest())


def _decode_chunk(chunk):
    """Decode some files into their rows of the .npy file.

    Returns unreadable, multipage and not_finite of `Decoded`, the sum of the files' shares outside, and their digests.
    """
    target, start, paths, side, grey_range = chunk
    array = np.asarray(np.load(target, mmap_mode="r+"))
    unreadable, multipage, not_finite, outside, digests = {}, [], {}, 0.0, []
    for index, path in enumerate(paths, start):
        pixels = b""
        try:
            file = _decode(path, side, grey_range)
            array[index] = file.levels
            pixels = array[index]
            multipage += [os.fspath(path)] * file.multipage
            not_finite |= {os.fspath(path): file.not_finite} if file.not_finite else {}
            outside += file.outside
        except DataError as error:
            unreadable[index] = f"{path} ({error})"
        digests.append(hashlib.blake2b(pixels, digest_size=16).digest())
    return unreadable, multipage, not_finite, outside, digests
