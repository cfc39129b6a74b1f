"""The chip store: every chip decoded once into one uint8 array, kept on disk, held on the device.

On disk a store is a .npy file whose name says from which files it was made: the files'
names, sizes and times. It is reused while these are the same, and replaced when they change.
"""

import hashlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from data.errors import DataError, named

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

MAX_SIDE = 512  # px; larger chips are reduced to it
CHUNK = 512  # chips that a worker decodes at a time
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises


def open_store(paths, folder):
    """The chips of `paths` as one array, decoded on the first call, memory-mapped afterwards.

    The side S is the most common longest side among the files, at most MAX_SIDE; chips of
    other sizes or not square are resized to S x S, as they would be for the network.

    Args:
        paths: N image files.
        folder: where stores are kept.

    Returns:
        uint8 [N, S, S], read-only, in the order of `paths`.

    Raises:
        DataError: files that are not images, all listed at once.
    """
    folder = Path(folder)
    place, state = _fingerprint(paths)
    path = folder / f"{place}-{state}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{place}-{state}.{os.getpid()}.part"
        try:
            _decode_all(paths, part)
            for old in folder.glob(f"{place}-*.npy"):
                old.unlink()
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def decode(path, side=None):
    """One image file as grey levels, uint8 [H, W], or [side, side].

    8-bit grey stays as it is, 16-bit is divided by 257, colour and palette become luma
    (ITU-R 601, exact for grey), transparency is ignored.

    Raises:
        OSError, ValueError, SyntaxError: from Pillow, for files that are no images.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
            image = Image.fromarray(np.rint(levels).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point images have no fixed grey scale; save them as 8 bit")
        elif image.mode != "L":
            # A palette's own entries, not their numbers; then luma.
            image = (image.convert("RGB") if image.mode in ("P", "PA") else image).convert("L")
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(image)


class ChipStore:
    """Chips of one sensor on the device, gathered by the batch.

    Args:
        chips: uint8 [N, S, S], numpy array.
        device: where the batches are wanted.
    """

    def __init__(self, chips, device):
        self.chips = torch.from_numpy(np.array(chips)).to(device)

    def __len__(self):
        return len(self.chips)

    def __getitem__(self, indices):
        """uint8 [B, S, S] of the chips at `indices`, int64 [B] on the device, or a slice."""
        return self.chips[indices]

    def subset(self, indices):
        """A store of the chips at `indices`, int64 on the device."""
        part = object.__new__(ChipStore)
        part.chips = self.chips[indices]
        return part


def grey_statistics(chips, indices):
    """Mean and standard deviation of the grey level, 0..1, over the chips that are not empty."""
    total = square = pixels = 0.0
    for part in np.array_split(np.sort(indices), max(1, len(indices) // 4096)):
        block = chips[part].reshape(len(part), -1).astype(np.float64) / 255
        block = block[block.any(axis=1)]
        total, square = total + block.sum(), square + (block**2).sum()
        pixels += block.size
    if not pixels:
        raise DataError("all training chips are empty (every pixel zero)")
    mean = total / pixels
    return float(mean), float(max(square / pixels - mean**2, 1e-6) ** 0.5)


def _fingerprint(paths):
    """Two hashes: of where the chips lie, and of the names, sizes and times of the files."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        info = os.stat(path)
        state.update(f"{path.name}\0{info.st_size}\0{info.st_mtime_ns}\n".encode(errors="replace"))
    folders = sorted({str(path.parent) for path in paths})
    place = hashlib.blake2b("\n".join(map(os.path.abspath, folders)).encode(), digest_size=8)
    place.update(Path(paths[0]).name.encode(errors="replace")[:3])  # EO_ and SAR_ share folders
    return place.hexdigest(), state.hexdigest()


def _decode_all(paths, target):
    """Decode all files on all cores into the .npy file `target`, with bounded memory."""
    side = _common_side(paths)
    array = np.lib.format.open_memmap(
        target, mode="w+", dtype=np.uint8, shape=(len(paths), side, side)
    )
    starts = range(0, len(paths), CHUNK)
    chunks = [paths[start : start + CHUNK] for start in starts]
    bad = []
    with tqdm(total=len(paths), desc=f"decode {paths[0].parent}", unit=" chips") as bar:
        for start, (block, wrong) in zip(starts, _map(_decode_chunk, chunks, side), strict=True):
            array[start : start + len(block)] = block
            bad += wrong
            bar.update(len(block))
    array.flush()
    if bad:
        raise DataError(f"{len(bad)} files are no readable images: {named(bad)}; replace them")


def _map(function, chunks, side):
    """function(chunk, side) for every chunk, in order; in processes where there is much to do."""
    workers = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(), 32)
    if workers < 2 or len(chunks) < 4:
        yield from (function(chunk, side) for chunk in chunks)
        return
    # Forked workers start at once and only decode; elsewhere fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(function, chunks, [side] * len(chunks))


def _decode_chunk(paths, side):
    """uint8 [len(paths), side, side], and what is wrong with which file."""
    block, bad = np.zeros((len(paths), side, side), np.uint8), []
    for i, path in enumerate(paths):
        try:
            block[i] = decode(path, side)
        except UNREADABLE as error:
            bad.append(f"{path} ({str(error).splitlines()[0]})")
    return block, bad


def _common_side(paths):
    """The most common longest side, px, among a thousand files spread over all."""
    sides = []
    for path in paths[:: max(1, len(paths) // 1000)]:
        try:
            with Image.open(path) as image:
                sides.append(max(image.size))
        except UNREADABLE:
            continue  # reported with all others by _decode_all
    return min(int(np.bincount(sides).argmax()), MAX_SIDE) if sides else 1
