"""The chip store: every chip decoded once into one uint8 array, kept on disk, held on the device.

On disk a store is a .npy file whose name says from which files it was made: the files'
names, sizes and times. It is reused while these are the same, and replaced when they change.
In a run its chips live in the fastest memory that takes them: the device's, else the host's
(pinned, where the device is a GPU), else they are read from the disk as they are drawn.
"""

import copy
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import re
import struct
import sys
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

from data.errors import DataError, named, reason
from data.lock import locked

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

MAX_SIDE = 512  # px; larger chips are reduced to it
CHUNK = 512  # chips that a worker decodes at a time
UNTOLD = 2**32  # bytes taken to be free where the system does not tell
SHARE = 0.5  # of the free memory that chips may take where no budget is set
LET_GO = 2**24  # bytes read from disk after which their pages are given back
GREY_SAMPLE = 20_000  # chips that show the grey levels as well as all of them do
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")  # whatever the name says; none runs a program
SMALL = 2**16  # bytes; a file with fewer is read at once, which takes an eighth off the decoding
MAX_PIXELS = 2**24  # an image with more is a whole scene, and takes the memory of one
# What Pillow raises for files that are no images, in one version or another.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
UNREADABLE += (AttributeError, MemoryError, struct.error, Image.DecompressionBombError)


def open_store(paths, folder, skip_bad=False):
    """The chips of `paths` as one array, decoded on the first call, memory-mapped afterwards.

    The side S is the most common longest side among the files, at most MAX_SIDE; chips of
    other sizes or not square are resized to S x S, as they would be for the network.

    Args:
        paths: N image files.
        folder: where stores are kept.
        skip_bad: True leaves a chip whose file is no image black, and `unreadable` names it.

    Returns:
        uint8 [N, S, S], in the order of `paths`; writing to it does not reach the disk.

    Raises:
        DataError: files that are not images, all listed at once.
        OSError: the disk is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    place, state = fingerprint(paths)
    path = folder / f"{place}-{state}.npy"
    if not path.exists():
        with locked(folder / "lock"):
            if not path.exists():  # another process may have made it meanwhile
                _make(paths, path, place, skip_bad)
    chips = np.load(path, mmap_mode="c")
    if bad := _unreadable(chips):
        if not skip_bad:
            raise DataError(_listed(bad))
        print(f"{len(bad)} of {len(paths)} files left out, no readable images: {named(bad.values())}")
    return chips


def unreadable(chips):
    """Indices, int64, of the chips of `open_store` that it left black."""
    return np.array(sorted(_unreadable(chips)), np.int64)


def _unreadable(chips):
    """{index: "file (what is wrong with it)"} of a store; kept in a file beside it, if there are any."""
    beside = Path(chips.filename).with_suffix(".json")
    found = json.loads(beside.read_text()) if beside.exists() else {}
    return {int(index): wrong for index, wrong in found.items()}


def _listed(bad):
    return (
        f"{len(bad)} files are no readable images: {named(bad.values())}; replace them, or set "
        "SKIP_BAD=True to leave them out"
    )


def _make(paths, target, place, skip_bad):
    """Decode into a file beside `target`, which takes its name when it is whole."""
    for left in target.parent.glob("*.part"):  # by a process that was killed
        left.unlink()
    part = target.with_suffix(".part")
    try:
        bad = _decode_all(paths, part)
        if bad and (not skip_bad or len(bad) == len(paths)):
            raise DataError(_listed(bad))
        for old in target.parent.glob(f"{place}-*.*"):
            if old != part:
                old.unlink()
        if bad:
            target.with_suffix(".json").write_text(json.dumps(bad))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def decode(path, side=None):
    """One image file as grey levels, uint8 [H, W], or [side, side].

    8-bit grey stays as it is, 16-bit is divided by 257, colour and palette become luma
    (ITU-R 601, exact for grey), transparency is ignored.

    Raises:
        DataError: the file is no readable image, or too large for a chip.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(SMALL)
        with Image.open(path if len(start) == SMALL else io.BytesIO(start), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px are no chip; cut it into chips")
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
            return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width)
    except UnidentifiedImageError as error:
        raise DataError("cannot identify image file") from error
    except UNREADABLE as error:
        raise DataError(reason(error)) from error


class ChipStore:
    """Chips of one sensor, gathered by the batch onto the device.

    Args:
        chips: uint8 [N, S, S] array, memory-mapped or not.
        device: where the batches are wanted.
        place: where the chips are kept, of `choose_place`; whatever it is, the batches are the same.
    """

    def __init__(self, chips, device, place="device"):
        self.device, self.place, self.rows = device, place, None
        self.mapping, self.read = chips.base, 0
        self.chips = torch.from_numpy(chips)
        if place == "device":
            self.chips = torch.empty(chips.shape, dtype=torch.uint8, device=device).copy_(self.chips)
        elif place == "host":
            self.chips = self.chips.pin_memory()
        _release(self.mapping)

    def __len__(self):
        return len(self.chips if self.rows is None else self.rows)

    def __getitem__(self, indices):
        """uint8 [B, S, S] on the device: chips at `indices`, int64 [B] array, or of a slice."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        indices = torch.from_numpy(indices if self.rows is None else self.rows[indices])
        if self.place == "device":
            return self.chips.index_select(0, to_device(indices, self.device))
        chips = self.chips.index_select(0, indices)
        if self.place == "disk":
            self._let_go(chips.nbytes)
        return to_device(chips, self.device)

    def subset(self, indices):
        """A store of the chips at `indices`, int64 array; it shares their memory."""
        part = copy.copy(self)
        part.rows = indices if self.rows is None else self.rows[indices]
        return part

    def _let_go(self, read):
        """Give pages that were read back to the kernel, or a run would hold the whole file."""
        self.read += read
        if self.read > LET_GO:
            _release(self.mapping)
            self.read = 0


def place_stores(device, memory_gb, *arrays):
    """A ChipStore for each array, all kept in the fastest memory that takes them together."""
    place = choose_place(sum(array.nbytes for array in arrays), device, memory_gb)
    return [ChipStore(array, device, place) for array in arrays]


def choose_place(size, device, memory_gb=0.0):
    """The fastest memory for `size` bytes: "device", "host" (beside a GPU, pinned) or "disk".

    memory_gb: what they may take of the device, GiB; 0 = half of what is free. Of the host's
    memory beside a GPU they take half of what is free at most.
    """
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else _free_memory()
    if size <= (memory_gb * 2**30 or SHARE * free):
        return "device"
    return "host" if on_gpu and size <= SHARE * _free_memory() else "disk"


def to_device(tensor, device):
    """A tensor in host memory, copied to the device; to a GPU without waiting for the copy."""
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _release(mapping):
    """Let the pages of a memory-mapped file go; they stay in the kernel's cache."""
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def grey_statistics(chips, indices):
    """Mean and standard deviation of the grey level, 0..1, over the chips that are not empty.

    Of many chips an even sample is taken: 20,000 fix the mean to 0.0004.
    """
    total = square = pixels = 0.0
    indices = np.sort(indices)[:: -(-len(indices) // GREY_SAMPLE)]
    for part in np.array_split(indices, max(1, len(indices) // 1024)):
        block = chips[part].reshape(len(part), -1).astype(np.float64) / 255
        _release(chips.base)
        block = block[block.any(axis=1)]
        total, square = total + block.sum(), square + (block**2).sum()
        pixels += block.size
    if not pixels:
        raise DataError("all training chips are empty (every pixel zero)")
    mean = total / pixels
    return float(mean), float(max(square / pixels - mean**2, 1e-6) ** 0.5)


def _free_memory():
    """Bytes of the host's memory that are free, within the limit of a container or a scheduler."""
    meminfo, groups = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if not meminfo.exists():
        return UNTOLD
    free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    group = Path("/sys/fs/cgroup" + groups.read_text().strip().rpartition("::")[2])
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()))
    return free


def fingerprint(paths):
    """Two hashes: of where the chips lie, and of the names, sizes and times of the files."""
    folders, states = set(), []
    for path in map(os.fspath, paths):
        folder, _, name = path.rpartition(os.sep)
        info = os.stat(path)
        folders.add(folder)
        states.append(f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n")
    state = hashlib.blake2b("".join(states).encode(errors="surrogateescape"), digest_size=8)
    place = hashlib.blake2b("\n".join(map(os.path.abspath, sorted(folders))).encode(), digest_size=8)
    place.update(Path(paths[0]).name.encode(errors="replace")[:3])  # EO_ and SAR_ share folders
    return place.hexdigest(), state.hexdigest()


def _decode_all(paths, target):
    """Decode all files on all cores into the .npy file `target`, with bounded memory.

    Returns {index: "file (what is wrong with it)"} of those that are no images.
    """
    side = _common_side(paths)
    shape = (len(paths), side, side)
    array = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full raises here, and kills no worker later
        with open(target, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(target))
    starts = range(0, len(paths), CHUNK)
    chunks = [(target, start, paths[start : start + CHUNK], side) for start in starts]
    bad = {}
    with tqdm(total=len(paths), desc=f"decode {os.path.dirname(paths[0])}", unit=" chips") as bar:
        for (_, _, chunk, _), wrong in zip(chunks, _map(_decode_chunk, chunks), strict=True):
            bad |= wrong
            bar.update(len(chunk))
    array.flush()
    return bad


def _map(function, chunks):
    """function(chunk) for every chunk, in order; in processes where there is much to do."""
    workers = min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(), 32)
    if workers < 2 or len(chunks) < 4:
        yield from map(function, chunks)
        return
    # Forked workers start at once and only decode; elsewhere fork is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            yield from pool.map(function, chunks)
    except BrokenExecutor as error:
        raise OSError("a process that decodes chips was killed; memory may be short, try again") from error


def _end_with_parent():
    """Let a worker end when its parent is killed; else it would wait for work for ever, holding the lock."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _decode_chunk(chunk):
    """Decode some files into their place of the .npy file; returns what is wrong with which."""
    target, start, paths, side = chunk
    array, bad = np.asarray(np.load(target, mmap_mode="r+")), {}
    for i, path in enumerate(paths, start):
        try:
            array[i] = decode(path, side)
        except DataError as error:
            bad[i] = f"{path} ({error})"
    return bad


def _common_side(paths):
    """The most common longest side, px, among some hundred files spread over all."""
    sides = []
    for path in paths[:: max(1, len(paths) // 250)]:
        try:
            with Image.open(path, formats=FORMATS) as image:
                sides.append(max(image.size))
        except UNREADABLE:
            continue  # reported with all others by _decode_all
    return min(int(np.bincount(sides).argmax()), MAX_SIDE) if sides else 1
