"""The chip store: all chips of a list of files, decoded once into one uint8 array and kept on disk.

During a run the chips are held in the fastest memory that has room for them: the device's memory, else
the host's. If neither has room, they are read from disk as needed. One `MemoryBudget` counts what the chips
and the caches of a process take.
"""

import contextlib
import copy
import hashlib
import json
import mmap
import os
import re
from pathlib import Path

from data.decode import EIGHT_BITS, PERCENTILES, SURVEYED, decode_all, survey
from data.decode import decode as decode
from data.errors import DataError, named, reason
from data.lock import locked
from data.workers import may_fork

import numpy as np
import torch

NAME = "-".join(["[0-9a-f]" * 16] * 2 + ["*"])  # of a store; files with other names are never deleted
STORES_KEPT = 16  # stores that a folder holds; beyond them the least recently opened are deleted
ASSUMED_FREE = 2**32  # bytes of free memory, if the system does not report it
FREE_SHARE = 0.5  # of the free memory that chips may take if no budget is set
RELEASE_AFTER = 2**24  # bytes read from disk after which their pages are released
MUCH_OUTSIDE = 0.05  # share of the pixels beyond black and white from which the range may be a wrong one
FILLED = 0.25  # share of the 256 levels that the chips should use
GREY_SAMPLE = 20_000  # chips; they fix the mean grey level to 0.0004


def choose_reading(paths, grey_range=()):
    """How the files of a sensor's training chips are read: `side` and `grey_range` of `open_store`.

    It prints the range unless that is (0, 255).

    Args:
        paths: files.
        grey_range: GREY_RANGE; empty = that of `data.decode.survey`.

    Returns:
        side, px; (black, white), floats.
    """
    side, surveyed_range = survey(paths)
    black, white = grey_range or surveyed_range
    if (black, white) != EIGHT_BITS:
        print(f"files with more than 8 bits are read from {black:g} (black) to {white:g} (white); see GREY_RANGE")
    return side, (float(black), float(white))


def open_store(paths, folder, skip_bad=False, side=None, grey_range=None, report=True):
    """The chips of `paths` as one array: decoded on the first call, memory-mapped afterwards.

    Chips that are not square or have another size are resized to S x S.

    A store is one .npy file, and a .json file with what is known of it. Their name is made from the names,
    sizes and modification times of the image files, from S and the grey range, so that stores of other files,
    or of the same files read in another way, lie side by side. When a store is made, older ones are deleted:
    those of the same files in an earlier state, and beyond STORES_KEPT those that were not opened for the
    longest time. A damaged store is made again.

    Args:
        paths: N image files.
        folder: where stores are kept.
        skip_bad: True leaves the chip of an unreadable file black; `unreadable` lists these chips.
        side: S, px; None = the most common longest side among the files, at most 512.
        grey_range: (black, white) of files with more than 8 bits; None = that of `data.decode.survey`.
        report: False does not print which unreadable files are left out.

    Returns:
        uint8 [N, S, S], in the order of `paths`; changes to it are not written to disk.

    Raises:
        DataError: some files are not images; the message lists them.
        OSError: the disk is full, or the folder cannot be written to.
    """
    if side is None or grey_range is None:
        common = survey(paths)
        side, grey_range = side or common.side, grey_range or common.grey_range
    grey_range = tuple(map(float, grey_range))
    shape = (len(paths), side, side)
    files, state = fingerprint(paths)
    levels = "" if grey_range == EIGHT_BITS else "-{}_{}".format(*grey_range)
    path = Path(folder, f"{files}-{state}-{side}{levels}.npy")
    chips, _ = _load(path, shape)
    if chips is None or _can_be_read_now(paths, path, grey_range):
        with locked(path.parent / "lock"):
            chips, damage = _load(path, shape)  # another process may have made it in the meantime
            if chips is None or _can_be_read_now(paths, path, grey_range):
                if damage:
                    print(f"the chip store {path} is damaged ({damage}); its files are decoded again")
                _make(paths, path, side, skip_bad, grey_range)
                chips, _ = _load(path, shape)
    with contextlib.suppress(OSError):  # a folder that is read-only
        os.utime(path.with_suffix(".json"))  # last opened
    if bad := _notes(path)["unreadable"]:
        if not skip_bad:
            raise DataError(_unreadable_files(bad))
        if report:
            print(f"{len(bad)} of {len(paths)} files left out, no readable images: {named(bad.values())}")
    return chips


def unreadable(chips):
    """Indices, int64, of the chips of `open_store` that are black because their file is unreadable."""
    return np.array(sorted(map(int, _notes(chips.filename)["unreadable"])), np.int64)


def store_digest(chips):
    """Digest, a hex string, of the pixels of an array of `open_store`, or of the ChipStore that holds it.

    It is equal for equal pixels in equal order, whatever the files are called. It was computed when the
    files were decoded, so that it costs nothing here.
    """
    return _notes(chips.filename)["digest"]


def _notes(path):
    """The .json of a store: unreadable {index: "file (what is wrong with it)"} and digest, a hex string."""
    return json.loads(Path(path).with_suffix(".json").read_text())


def _can_be_read_now(paths, path, grey_range):
    """Whether a file that was unreadable when the store was made can be read: an error of a disk may pass."""
    for index in _notes(path)["unreadable"]:
        with contextlib.suppress(DataError):
            decode(paths[int(index)], grey_range=grey_range)
            return True
    return False


def _load(path, shape):
    """The array of a store, None if there is none or it is damaged; and what is wrong with it, or ""."""
    if not path.exists():
        return None, ""
    try:
        chips = np.lib.format.open_memmap(path, mode="c")
        if chips.shape != shape or chips.dtype != np.uint8:
            raise ValueError(f"it holds {chips.dtype} {list(chips.shape)} instead of uint8 {list(shape)}")
        if not _notes(path).keys() >= {"unreadable", "digest"}:
            raise ValueError("its .json is incomplete")
    except FileNotFoundError:
        return None, "its .json is missing"
    except (ValueError, SyntaxError, EOFError, AttributeError) as error:
        return None, reason(error)
    return chips, ""


def _make(paths, target, side, skip_bad, grey_range):
    """Decode into a temporary file, which gets the name `target` when it is complete."""
    for leftover in target.parent.glob(f"{NAME}.part"):  # of a process that was killed
        leftover.unlink()
    temporary = target.with_suffix(".part")
    try:
        bad, multipage, not_finite, outside, digest = decode_all(paths, temporary, side, may_fork(), grey_range)
        if bad and (not skip_bad or len(bad) == len(paths)):
            raise DataError(_unreadable_files(bad))
        if multipage:
            print(
                f"{len(multipage)} of {len(paths)} files have more than one page; the first page of each is "
                f"used: {named(multipage)}"
            )
        if not_finite:
            print(
                f"{sum(not_finite.values())} pixels in {len(not_finite)} of {len(paths)} files are NaN or infinite "
                f"and are read as black: {named(not_finite)}"
            )
        if outside > MUCH_OUTSIDE:
            print(
                f"{outside:.0%} of the pixels in {os.path.dirname(paths[0])} are darker than black or brighter than "
                "white, GREY_RANGE={:g},{:g}, and become black or white; if the files have other levels than those "
                "that GREY_RANGE was taken from, train with a range that holds both".format(*grey_range)
            )
        _report_few_levels(np.load(temporary, mmap_mode="r"), os.path.dirname(paths[0]), grey_range)
        _delete_old(target)
        target.with_suffix(".json").write_text(json.dumps({"unreadable": bad, "digest": digest}))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _report_few_levels(chips, folder, grey_range):
    """Print a sentence if the levels of chips, uint8 [N, S, S], fill less than a quarter of the range."""
    sample = chips[:: -(-len(chips) // SURVEYED)]
    varied = sample[sample.min((1, 2)) < sample.max((1, 2))]  # others are empty chips
    if not len(varied):
        return
    low, high = np.percentile(varied, PERCENTILES)
    if high - low < FILLED * 255:
        black, white = grey_range
        print(
            f"the grey levels of the chips in {folder} run from {low:.0f} to {high:.0f} where black is 0 and white "
            f"255, so that less than a quarter of the levels is used; "
            + ("make the files of 8 bits anew, with more contrast" if grey_range == EIGHT_BITS else
               f"GREY_RANGE is {black:g},{white:g}: set it to black and white of the files")
        )  # fmt: skip


def _delete_old(target):
    """Delete the stores that `target` replaces, and the least recently opened beyond STORES_KEPT."""
    files, state, _ = target.stem.split("-", 2)
    others = [path for path in target.parent.glob(f"{NAME}.npy") if path != target]
    replaced = {path for path in others if path.match(f"{files}-*") and not path.match(f"{files}-{state}-*")}
    recent = sorted(set(others) - replaced, key=_last_opened, reverse=True)
    for path in [*replaced, *recent[STORES_KEPT - 1 :]]:
        with contextlib.suppress(OSError):  # on Windows another process may have it open
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)


def _last_opened(path):
    """Time, s, at which a store was last opened; 0 if unknown."""
    try:
        return path.with_suffix(".json").stat().st_mtime
    except OSError:
        return 0.0


def _unreadable_files(bad):
    return (
        f"{len(bad)} files are no readable images: {named(bad.values())}; replace them, or set "
        "SKIP_BAD=True to leave them out"
    )


def fingerprint(paths):
    """Two hashes, hex strings: of the folders and names of files, and of their sizes and times."""
    names, states, last = [], [], None
    for path in map(os.fspath, paths):
        folder, _, name = path.rpartition(os.sep)
        if folder != last:
            names.append(os.path.abspath(folder))
            last = folder
        names.append(name)
        info = os.stat(path)
        states += info.st_size, info.st_mtime_ns
    files = "\n".join(names).encode(errors="surrogateescape")
    return tuple(hashlib.blake2b(d, digest_size=8).hexdigest() for d in (files, np.array(states, np.int64)))


class ChipStore:
    """Chips of one sensor. `store[index]` gathers a batch of them onto the device.

    Args:
        chips: uint8 [N, S, S] array, memory-mapped or not.
        device: torch.device of the batches.
        memory: where the chips are held, "device", "host" or "disk" (see `MemoryBudget`). The batches
            are the same.
    """

    def __init__(self, chips, device, memory="device"):
        self.device, self.memory = device, memory
        self.indices = np.arange(len(chips))  # which rows of `chips` this store, or subset, has
        self.filename = getattr(chips, "filename", None)  # of the decoded chips on disk
        self.mapping, self.read = chips.base, 0
        self.chips = torch.from_numpy(chips)
        if memory == "device":
            self.chips = torch.empty(chips.shape, dtype=torch.uint8, device=device).copy_(self.chips)
        elif memory == "host":
            self.chips = self.chips.clone()  # it was mapped to the file
        _release(self.mapping)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        """Chips on the device: uint8 [B, S, S], or [S, S] for one number.

        Args:
            index: a number, a list, a slice, an array or tensor of integers, or a boolean mask of all
                chips. Negative numbers count from the end.

        Raises:
            IndexError: a number is out of range, or the index is of another kind.
        """
        rows = self._rows(index)
        return self._gather(rows) if rows.ndim else self._gather(rows[None])[0]

    def subset(self, index):
        """A store of the chips at `index` (of any kind that `store[index]` takes); it shares their memory."""
        subset = copy.copy(self)
        subset.indices = np.atleast_1d(self._rows(index))
        return subset

    def _rows(self, index):
        """Rows of `chips`, int64 array of no or one dimension, of an index."""
        if isinstance(index, torch.Tensor):
            index = index.numpy(force=True)
        rows = self.indices[index]
        if isinstance(index, slice):
            return rows.copy()  # torch takes no negative strides
        if rows.ndim > 1:
            raise IndexError(f"a chip store has one dimension of chips, but the index gives {rows.ndim}")
        return rows

    def _gather(self, rows):
        chips = gather(self.chips, rows, self.device)
        if self.memory == "disk":
            self._release_pages(chips.nbytes)
        return chips

    def _release_pages(self, read):
        """Release pages that were read; otherwise a run would hold the whole file in memory."""
        self.read += read
        if self.read > RELEASE_AFTER:
            _release(self.mapping)
            self.read = 0


class MemoryBudget:
    """How much memory the chips and caches of this process may take, all together.

    On the CPU the device's memory is the host's. The processes (ranks) of one host share its memory equally;
    the environment's LOCAL_WORLD_SIZE, which torchrun sets, is their number.

    Args:
        device: torch.device.
        memory_gb: GiB of the device's memory, on a CPU those of all ranks together; 0 = half of what is free.
            Of the host's memory beside a GPU it is always half of what is free.
    """

    def __init__(self, device, memory_gb=0.0):
        self.device = device
        host, ranks = FREE_SHARE * _free_memory(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        if device.type == "cuda":
            free = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
            self.left = {"device": memory_gb * 2**30 or free, "host": host / ranks}
        else:
            self.left = {"device": (memory_gb * 2**30 or host) / ranks}

    def choose(self, size):
        """The fastest memory with room for `size` bytes, which are taken off it: "device", "host" or "disk"."""
        for memory, left in self.left.items():
            if size <= left:
                self.left[memory] -= size
                return memory
        return "disk"


def place_stores(budget, *arrays):
    """A ChipStore for each array, all in the fastest memory that has room for all of them together.

    budget: MemoryBudget; arrays: uint8 [N, S, S] each.
    """
    memory = budget.choose(sum(array.nbytes for array in arrays))
    return [ChipStore(array, budget.device, memory) for array in arrays]


def gather(tensor, rows, device):
    """tensor[rows] on the device; the host does not wait for a copy to a GPU.

    Args:
        tensor: on the device, or in host memory.
        rows: int64 [B] array.
    """
    rows = torch.from_numpy(rows)
    if tensor.device.type == device.type:
        return tensor.index_select(0, to_device(rows, device))
    # In pinned memory, which torch does not use again before the copy has ended.
    selected = _pinned((len(rows), *tensor.shape[1:]), tensor.dtype)
    return torch.index_select(tensor, 0, rows, out=selected).to(device, non_blocking=True)


def to_device(tensor, device):
    """A tensor in host memory, copied to the device; the host does not wait for a copy to a GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _pinned(shape, dtype):
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def _release(mapping):
    """Release the pages of a memory-mapped file; they stay in the system's file cache."""
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def grey_statistics(chips, indices):
    """Mean and standard deviation of the grey level, in 0..1, over chips that are not empty (all zero).

    Args:
        chips: uint8 [N, S, S] array.
        indices: int64 array, the chips to use; of many an even sample of 20,000 is taken.

    Raises:
        DataError: all of these chips are empty.
    """
    total = square = pixels = 0.0
    indices = np.sort(indices)[:: -(-len(indices) // GREY_SAMPLE)]
    for block in np.array_split(indices, max(1, len(indices) // 1024)):
        levels = chips[block].reshape(len(block), -1).astype(np.float64) / 255
        _release(chips.base)
        levels = levels[levels.any(axis=1)]
        total, square = total + levels.sum(), square + (levels**2).sum()
        pixels += levels.size
    if not pixels:
        raise DataError("all training chips are empty (every pixel is zero)")
    mean = total / pixels
    return float(mean), float(max(square / pixels - mean**2, 1e-6) ** 0.5)


def _free_memory():
    """Bytes of free host memory, within the limit of a container or a job scheduler."""
    meminfo, groups = Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if not meminfo.exists():
        return ASSUMED_FREE
    free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    group = Path("/sys/fs/cgroup" + groups.read_text().strip().rpartition("::")[2])
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int((group / "memory.current").read_text()))
    return free
