"""Image files to grey levels: one file, or all files of a data set on all cores.

It does not import torch, so that a worker process starts quickly.
"""

import contextlib
import hashlib
import io
import multiprocessing
import os
import struct
import sys
import threading
import types
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from typing import NamedTuple

from data.errors import DataError, reason

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

MAX_SIDE = 512  # px; larger chips are resized to it
CHUNK = 512  # chips that a worker decodes at a time
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # tried by content, not by name; none executes code
READ_AT_ONCE = 2**16  # bytes; a smaller file is read with one system call, which saves an eighth of the time
MAX_PIXELS = 2**24  # an image with more pixels is a whole scene and needs too much memory
ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # of Pillow's image.info
# What Pillow raises for files that are not images; it depends on its version.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
UNREADABLE += (AttributeError, MemoryError, struct.error, Image.DecompressionBombError)


class Decoded(NamedTuple):
    """What is known of a data set once all files are decoded.

    unreadable: {index: "file (what is wrong with it)"}; their chips are black.
    multipage: files with more than one page, of which the first is taken.
    digest: hex string, equal for equal pixels in equal order, whatever the files are called.
    """

    unreadable: dict
    multipage: list
    digest: str


def decode(path, side=None):
    """One image file as grey levels, uint8 [H, W], or [side, side] where `side` is given.

    8-bit grey levels stay as they are, 16-bit ones are divided by 257, colour and palette images become
    luma (ITU-R 601, exact for grey), transparency is ignored. The EXIF orientation is obeyed.
    A file of several pages gives its first page.

    Raises:
        DataError: the file is not a readable image, or too large for a chip.
    """
    return _decode(path, side)[0]


def _decode(path, side):
    """The grey levels, and whether the file has more than one page."""
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(READ_AT_ONCE)
        source = path if len(start) == READ_AT_ONCE else io.BytesIO(start)
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px are no chip; cut it into chips")
            multipage = image.format == "TIFF" and image.is_animated
            image = _grey(_upright(image))
            if side is not None and image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            levels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width)
            return levels, multipage
    except UnidentifiedImageError as error:
        raise DataError("cannot identify image file") from error
    except UNREADABLE as error:
        raise DataError(reason(error)) from error


def _upright(image):
    """The image, turned as its EXIF orientation says. A damaged EXIF block is ignored."""
    image.load()  # a PNG may hold its EXIF block behind the pixels
    if image.format == "TIFF" or not ORIENTATION_KEYS.isdisjoint(image.info):
        with contextlib.suppress(*UNREADABLE):
            ImageOps.exif_transpose(image, in_place=True)
    return image


def _grey(image):
    """The image in 8-bit grey levels."""
    if image.mode == "L":
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.rint(levels).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed grey scale; save them as 8 bit")
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")  # the palette's colours; converted directly, their numbers would count
    return image.convert("L")


def common_side(paths):
    """The most common longest side, px, among some hundred files spread over all; at most MAX_SIDE."""
    sides = []
    for path in paths[:: max(1, len(paths) // 250)]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.append(max(image.size))
        except UNREADABLE:
            continue  # `decode_all` reports it with all others
    return min(int(np.bincount(sides).argmax()), MAX_SIDE) if sides else 1


def decode_all(paths, target, side, fork):
    """Decode all files on all cores into the .npy file `target`, uint8 [N, side, side], in bounded memory.

    Args:
        paths: N image files.
        target: file to write.
        side: px.
        fork: whether worker processes may be forked, which starts them at once.

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
    chunks = [(target, start, paths[start : start + CHUNK], side) for start in starts]
    unreadable, multipage, digest = {}, [], hashlib.blake2b(digest_size=16)
    with tqdm(total=len(paths), desc=f"decode {os.path.dirname(paths[0])}", unit=" chips") as bar:
        for bad, paged, digests in _map(_decode_chunk, chunks, fork):
            unreadable |= bad
            multipage += paged
            digest.update(b"".join(digests))
            bar.update(len(digests))
    array.flush()
    return Decoded(unreadable, multipage, digest.hexdigest())


def _decode_chunk(chunk):
    """Decode some files into their rows of the .npy file; returns unreadable, multipage, a digest of each."""
    target, start, paths, side = chunk
    array = np.asarray(np.load(target, mmap_mode="r+"))
    unreadable, multipage, digests = {}, [], []
    for index, path in enumerate(paths, start):
        pixels = b""
        try:
            array[index], has_pages = _decode(path, side)
            pixels = array[index]
            multipage += [os.fspath(path)] * has_pages
        except DataError as error:
            unreadable[index] = f"{path} ({error})"
        digests.append(hashlib.blake2b(pixels, digest_size=16).digest())
    return unreadable, multipage, digests


def _map(function, chunks, fork):
    """function(chunk) of each chunk, in order; in worker processes if there are many chunks."""
    workers = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(), 32)
    if workers < 2 or len(chunks) < 4:
        yield from map(function, chunks)
        return
    context = multiprocessing.get_context("fork" if fork else "spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            with contextlib.nullcontext() if fork else _without_main_module():
                results = pool.map(function, chunks)  # starts the workers
            yield from results
    except BrokenExecutor as error:
        raise OSError("a process that decodes chips was killed; memory may be short, try again") from error


@contextlib.contextmanager
def _without_main_module():
    """Workers that start here do not import the user's script.

    Python imports it in each worker that is not forked. That takes seconds, and would run a script that
    has no `if __name__ == "__main__"` once more.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent():
    """End this worker when its parent is killed; otherwise it waits for work forever and holds the lock."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
