import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

from data.errors import DataError
from data.store import (
    STORES_KEPT,
    ChipStore,
    MemoryBudget,
    choose_reading,
    grey_statistics,
    open_store,
    place_stores,
    store_digest,
    unreadable,
)
from data.workers import may_fork
from tests.conftest import ROOT

import numpy as np
import pytest
import torch
from PIL import Image

LEVELS = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_store_is_made_once_and_again_when_a_file_changes(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(np.roll(LEVELS, i, 0))) for i in range(5)]
    first = open_store(paths, tmp_path / "store")
    made = list((tmp_path / "store").glob("*.npy"))
    stamp = made[0].stat().st_mtime_ns
    np.testing.assert_array_equal(first, [np.roll(LEVELS, i, 0) for i in range(5)])
    open_store(paths, tmp_path / "store")
    assert list((tmp_path / "store").glob("*.npy")) == made and made[0].stat().st_mtime_ns == stamp
    save(paths[2], Image.fromarray(255 - LEVELS))
    os.utime(paths[2], ns=(1, 1))
    again = open_store(paths, tmp_path / "store")
    np.testing.assert_array_equal(again[2], 255 - LEVELS)
    assert len(list((tmp_path / "store").glob("*.npy"))) == 1  # the old one is gone
    assert len(list((tmp_path / "store").glob("*.json"))) == 1


@pytest.fixture
def files(tmp_path):
    return [save(tmp_path / f"{i}.png", Image.fromarray(np.roll(LEVELS, i, 0))) for i in range(5)]


@pytest.fixture
def decoded(monkeypatch):
    """Numbers of files that were decoded, for each store that was made."""
    import data.store as store

    decode_all, counts = store.decode_all, []
    monkeypatch.setattr(store, "decode_all", lambda paths, *rest: counts.append(len(paths)) or decode_all(paths, *rest))
    return counts


def test_stores_of_several_subsets_lie_side_by_side(tmp_path, files, decoded):
    for _ in range(3):
        for paths in (files, files[:3], files[2:], files[::-1]):
            np.testing.assert_array_equal(open_store(paths, tmp_path / "store")[0], np.array(Image.open(paths[0])))
    assert decoded == [5, 3, 3, 5]
    # A changed file makes only the stores of its own files again.
    save(files[0], Image.fromarray(LEVELS))
    os.utime(files[0], ns=(1, 1))
    for paths in (files, files[:3], files[2:], files[::-1]):
        open_store(paths, tmp_path / "store")
    assert decoded == [5, 3, 3, 5] + [5, 3, 5]
    assert len(list((tmp_path / "store").glob("*.npy"))) == 4


def test_folders_with_the_same_names_sizes_and_times_have_stores_of_their_own(tmp_path):
    for level in (50, 60):
        path = tmp_path / str(level) / "0.bmp"
        path.parent.mkdir()
        save(path, Image.fromarray(np.full((8, 8), level, np.uint8)))
        os.utime(path, ns=(1, 1))
    assert [open_store([tmp_path / n / "0.bmp"], tmp_path / "store")[0, 0, 0] for n in ("50", "60")] == [50, 60]


def test_stores_of_two_sides_lie_side_by_side(tmp_path, files, decoded):
    for _ in range(2):
        for side in (None, 6, 12, 20):
            chips = open_store(files, tmp_path / "store", side=side)
            assert chips.shape == (5, side or 12, side or 12)
    assert decoded == [5, 5, 5]  # 12 is their common side as well
    expected = [Image.fromarray(np.roll(LEVELS, i, 0)).resize((6, 6), Image.Resampling.BILINEAR) for i in range(5)]
    np.testing.assert_array_equal(open_store(files, tmp_path / "store", side=6), expected)


def test_the_least_recently_opened_stores_are_deleted(tmp_path, files, decoded):
    (tmp_path / "store").mkdir()
    for name in ("mine.npy", "mine.part"):  # files of the user
        (tmp_path / "store" / name).write_bytes(b"x")
    subsets = [list(subset) for subset in itertools.permutations(files, 2)][: STORES_KEPT + 2]
    for moment, paths in enumerate(subsets[:STORES_KEPT]):
        open_store(paths, tmp_path / "store")
        (new,) = (p for p in (tmp_path / "store").glob("*.json") if p.stat().st_mtime > 1000)
        os.utime(new, (moment, moment))
    open_store(subsets[0], tmp_path / "store")  # now the most recently opened
    open_store(subsets[STORES_KEPT], tmp_path / "store")
    for kind in ("npy", "json"):
        assert len(list((tmp_path / "store").glob(f"*-*.{kind}"))) == STORES_KEPT
    assert sorted(path.name for path in (tmp_path / "store").glob("mine*")) == ["mine.npy", "mine.part"]
    decoded.clear()
    open_store(subsets[0], tmp_path / "store"), open_store(subsets[2], tmp_path / "store")
    assert decoded == []
    open_store(subsets[1], tmp_path / "store")
    assert decoded == [2]


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "other shape", "no json", "cut json", "old json"])
def test_a_damaged_store_is_made_again(tmp_path, files, decoded, capsys, damage):
    expected = np.array(open_store(files, tmp_path / "store"))
    (path,) = (tmp_path / "store").glob("*.npy")
    content, notes = path.read_bytes(), path.with_suffix(".json")
    if damage == "other shape":
        np.save(path, expected[:, :5])
    elif damage.endswith("json"):
        notes.unlink() if damage == "no json" else notes.write_text('{"unrea' if damage == "cut json" else "{}")
    else:
        path.write_bytes({"cut": content[:-1], "empty": b"", "header": b"x" * len(content)}[damage])
    capsys.readouterr()
    np.testing.assert_array_equal(open_store(files, tmp_path / "store"), expected)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"{path} is damaged (" in printed and decoded == [5, 5]
    open_store(files, tmp_path / "store")
    assert capsys.readouterr().out == "" and decoded == [5, 5]


def test_digest_is_that_of_the_pixels(tmp_path, files):
    first = store_digest(open_store(files, tmp_path / "store"))
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=shutil.ignore_patterns("store"))
    moved = sorted((tmp_path / "moved").glob("*.png"))
    [path.rename(path.with_name(f"EO_{path.name}")) for path in moved]
    moved = sorted((tmp_path / "moved").glob("*.png"))
    assert store_digest(open_store(moved, tmp_path / "other store")) == first
    assert store_digest(open_store(files[::-1], tmp_path / "store")) != first
    assert store_digest(open_store(files, tmp_path / "store", side=10)) != first
    save(moved[3], Image.fromarray(255 - LEVELS))
    assert store_digest(open_store(moved, tmp_path / "other store")) != first


def test_bad_files_can_be_left_out(tmp_path, files, capsys):
    files[1].write_bytes(b"")
    chips = open_store(files, tmp_path / "store", skip_bad=True)
    assert unreadable(chips).tolist() == [1] and unreadable(chips).dtype == np.int64 and not chips[1].any()
    assert "1 of 5 files left out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"1 files.*1\.png"):
        open_store(files, tmp_path / "store")


def test_files_of_several_pages_are_counted_in_one_sentence(tmp_path, files, capsys):
    pages = Image.fromarray(LEVELS)
    several = [save(tmp_path / f"{n}.tif", pages, save_all=True, append_images=[pages]) for n in "ab"]
    open_store(files + several, tmp_path / "store")
    printed = capsys.readouterr().out
    assert "2 of 7 files have more than one page" in printed and "a.tif" in printed and printed.count("\n") == 1
    open_store(files + several, tmp_path / "store")
    assert capsys.readouterr().out == ""


def test_pixels_that_are_not_finite_are_counted_in_one_sentence(tmp_path, capsys):
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for i, path in enumerate(paths):
        np.save(path, np.where(LEVELS == LEVELS[0, i], np.nan, LEVELS / 255))
    bad = int(sum((LEVELS == LEVELS[0, i]).sum() for i in range(3)))
    open_store(paths, tmp_path / "store")
    printed = capsys.readouterr().out
    assert f"{bad} pixels in 3 of 3 files are NaN or infinite and are read as black" in printed
    assert printed.count("\n") == 1
    open_store(paths, tmp_path / "store")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("values, grey_range, advice", [
    (LEVELS // 8, (0, 255), "from 0 to 31 .* make the files of 8 bits anew"),
    (LEVELS.astype(np.uint16) * 16, (0, 65535), "from 0 to 16 .* GREY_RANGE is 0,65535: set it"),
    (LEVELS / 255 + 0.1, (-5.0, 5.0), "from 130 to 155 .* GREY_RANGE is -5,5: set it"),
    (LEVELS // 2, (0, 255), ""), (LEVELS.astype(np.uint16) * 16, None, ""), (np.full_like(LEVELS, 3), (0, 255), ""),
])  # fmt: skip
def test_chips_that_use_few_levels_are_reported(tmp_path, capsys, values, grey_range, advice):
    np.save(tmp_path / "0.npy", values)
    np.save(tmp_path / "1.npy", np.zeros_like(values))
    open_store([tmp_path / "0.npy", tmp_path / "1.npy"], tmp_path / "store", grey_range=grey_range)
    printed = capsys.readouterr().out
    assert re.search(advice, printed) and (printed.count("\n") == 1 if advice else not printed)


def test_stores_of_two_grey_ranges_lie_side_by_side(tmp_path, decoded, capsys):
    path = tmp_path / "0.npy"
    np.save(path, LEVELS * 16.0)
    for _ in range(2):
        for black, white in ((0, 4080.0), (0, 2040), (-2040.0, 2040)):
            chips = open_store([path], tmp_path / "store", grey_range=(black, white))
            expected = np.rint(255 * (LEVELS * 16.0 - black) / (white - black)).clip(0, 255)
            np.testing.assert_array_equal(chips[0], expected)
    assert decoded == [1, 1, 1]
    digests = {store_digest(open_store([path], tmp_path / "store", grey_range=(0, w))) for w in (4080, 2040)}
    assert len(digests) == 2
    open_store([path], tmp_path / "store")  # the range of the survey
    capsys.readouterr()
    side, chosen = choose_reading([path])
    assert side == LEVELS.shape[0]
    assert {type(x) for x in chosen} == {float} and chosen[0] >= 0 and 3500 < chosen[1] <= 4080
    assert "files with more than 8 bits are read from" in capsys.readouterr().out
    decoded.clear()
    open_store([path], tmp_path / "store", False, side, chosen)
    assert decoded == []
    assert choose_reading([path], (-3, 5)) == (side, (-3.0, 5.0))


def test_8_bit_files_have_the_range_of_8_bits_in_silence(files, capsys):
    assert choose_reading(files)[1] == (0.0, 255.0) and not capsys.readouterr().out


def test_a_store_that_cannot_be_written_to_can_be_read(tmp_path, files, decoded, monkeypatch):
    open_store(files, tmp_path / "store")

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr("data.store.locked", refuse)
    assert len(open_store(files, tmp_path / "store")) == 5 and decoded == [5]


def test_workers_are_forked_only_while_neither_cuda_nor_torch_distributed_runs(monkeypatch):
    assert may_fork() == (sys.platform == "linux")
    with monkeypatch.context() as patch:
        patch.setattr("torch.cuda.is_initialized", lambda: True)
        assert not may_fork()
    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.is_available", lambda: True)
        patch.setattr("torch.distributed.is_initialized", lambda: True, raising=False)
        assert not may_fork()


@pytest.mark.slow
def test_stores_are_equal_however_the_workers_start(tmp_path, files, monkeypatch):
    made = []
    for fork in (True, False):
        monkeypatch.setattr("data.store.may_fork", lambda fork=fork: fork)
        chips = open_store(files * 500, tmp_path / f"store {fork}")
        made.append((np.array(chips), json.loads(next((tmp_path / f"store {fork}").glob("*.json")).read_text())))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]


def test_sizes_are_brought_to_the_most_common(tmp_path):
    sizes = [(56, 56), (57, 57), (56, 56), (58, 40)]
    paths = [
        save(tmp_path / f"{i}.png", Image.fromarray(np.full(s, 50 + i, np.uint8)))
        for i, s in enumerate(sizes)
    ]
    chips = open_store(paths, tmp_path / "store")
    assert chips.shape == (4, 56, 56) and chips.dtype == np.uint8
    assert [int(c.mean()) for c in chips] == [50, 51, 52, 53]


@pytest.mark.slow
def test_many_files_keep_their_order_across_workers(tmp_path):
    paths = []
    for i in range(2100):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.array([[i % 251, i // 251]], np.uint8).repeat(2, 0)).save(paths[-1])
    chips = open_store(paths, tmp_path / "store")
    assert chips[:, 0, 0].tolist() == [i % 251 for i in range(2100)]
    assert chips[:, 0, 1].tolist() == [i // 251 for i in range(2100)]


def test_bad_files_are_all_named_and_leave_no_store(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(LEVELS)) for i in range(4)]
    paths[1].write_bytes(b"")
    paths[3].write_bytes(paths[0].read_bytes()[:60])
    with pytest.raises(DataError, match=r"2 files.*1\.png.*3\.png"):
        open_store(paths, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["lock"]


def test_grey_statistics_leave_empty_chips_out():
    chips = np.random.default_rng(1).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    chips[::10] = 0
    mean, std = grey_statistics(chips, np.arange(50))
    full = np.delete(chips, range(0, 50, 10), 0) / 255
    assert mean == pytest.approx(full.mean()) and std == pytest.approx(full.std())
    with pytest.raises(DataError, match="empty"):
        grey_statistics(np.zeros((3, 8, 8), np.uint8), np.arange(3))


CHIPS = np.random.default_rng(2).integers(0, 256, (20, 8, 8), dtype=np.uint8)
MASK = np.arange(20) % 3 == 0
INDICES = {
    "int": 4, "last": -1, "numpy int": np.int32(7), "0-d array": np.array(2), "list": [4, 19, 4], "empty list": [],
    "negative list": [-1, 0, -20], "slice": slice(3, 9), "long slice": slice(15, 99), "reversed": slice(None, None, -1),
    "int64": np.array([4, 19, 4]), "int32": np.array([4, -2], np.int32), "uint8": np.array([4, 2], np.uint8),
    "strided": np.arange(20)[::-3], "empty": np.zeros(0, np.int64), "mask": MASK, "mask as list": MASK.tolist(),
    "no chip": np.zeros(20, bool),
}  # fmt: skip


def stored(tmp_path, memory):
    np.save(tmp_path / "chips.npy", CHIPS)
    return ChipStore(np.load(tmp_path / "chips.npy", mmap_mode="c"), torch.device("cpu"), memory)


@pytest.mark.parametrize("memory", ["device", "disk"])
@pytest.mark.parametrize("name", INDICES)
def test_any_index_gives_what_numpy_gives(tmp_path, memory, name):
    index, store = INDICES[name], stored(tmp_path, memory)
    expected = CHIPS[np.asarray(index, int) if name == "empty list" else index]
    assert store[index].dtype == torch.uint8
    np.testing.assert_array_equal(store[index], expected)
    if not isinstance(index, slice):
        tensor = torch.tensor(np.array(index, dtype=int if name == "empty list" else None))
        np.testing.assert_array_equal(store[tensor], expected)
    np.testing.assert_array_equal(store.subset(index)[:], expected.reshape(-1, 8, 8))


@pytest.mark.parametrize("memory", ["device", "disk"])
@pytest.mark.parametrize(
    "index",
    [20, -21, [3, 20], np.array([-21]), torch.tensor([99]), MASK[:19], [0.5], True, None, MASK[None], [[1]], "a"],
)
def test_wrong_indices_are_refused(tmp_path, memory, index):
    store = stored(tmp_path, memory)
    for some in (store, store.subset(np.arange(20))):
        with pytest.raises(IndexError):
            some[index]
        with pytest.raises(IndexError):
            some.subset(index)


@pytest.mark.parametrize("memory", ["device", "disk"])
def test_subsets_have_positions_of_their_own(tmp_path, memory):
    store = stored(tmp_path, memory)
    subset = store.subset(np.array([3, 5, 11]))
    assert len(subset) == 3 and len(store) == 20 and subset.memory == memory
    np.testing.assert_array_equal(subset[0:9], CHIPS[[3, 5, 11]])
    np.testing.assert_array_equal(subset[-1], CHIPS[11])
    np.testing.assert_array_equal(subset[[True, False, True]], CHIPS[[3, 11]])
    np.testing.assert_array_equal(subset.subset([1, 2])[np.array([0])], CHIPS[[5]])
    with pytest.raises(IndexError):
        subset[3]


@pytest.mark.slow
def test_what_was_read_from_disk_is_released(tmp_path, monkeypatch):
    """A run over a store on disk keeps no more of it in memory than RELEASE_AFTER allows, times a page a chip."""
    chips = np.random.default_rng(3).integers(0, 256, (5000, 56, 56), dtype=np.uint8)  # 16 MB
    np.save(tmp_path / "chips.npy", chips)
    monkeypatch.setattr("data.store.RELEASE_AFTER", 2**20)
    store = ChipStore(np.load(tmp_path / "chips.npy", mmap_mode="c"), torch.device("cpu"), "disk")

    def resident():
        with open("/proc/self/smaps") as file:
            mapping = file.read().partition(f"{tmp_path}/chips.npy")[2]
        return int(mapping.partition("Rss:")[2].split()[0]) * 1024

    most = 0
    for start in range(0, 5000, 250):
        np.testing.assert_array_equal(store[start : start + 250], chips[start : start + 250])
        most = max(most, resident())
    assert 0 < most < 8 * 2**20


@pytest.mark.parametrize("memory", ["host", "disk"])
def test_chips_beside_a_gpu_are_gathered_into_pinned_memory_and_copied_once(tmp_path, monkeypatch, memory):
    buffers = []

    def pinned(shape, dtype):
        buffers.append(torch.full(shape, 7, dtype=dtype))
        return buffers[-1]

    def refuse(*_, **__):
        raise AssertionError("pinned as a whole, or pinned again")

    monkeypatch.setattr("data.store._pinned", pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    np.save(tmp_path / "chips.npy", CHIPS)
    store = ChipStore(np.load(tmp_path / "chips.npy", mmap_mode="c"), torch.device("meta"), memory)
    subset = store.subset(np.arange(10, 20))
    assert store[[4, 19, 4]].device.type == "meta" and subset[2].shape == (8, 8)
    for buffer, expected in zip(buffers, (CHIPS[[4, 19, 4]], CHIPS[[12]]), strict=True):
        np.testing.assert_array_equal(buffer, expected)


@pytest.fixture
def machine(monkeypatch):
    """A machine with 100 bytes free in host memory, and 40 on its GPU."""
    monkeypatch.setattr("data.store._free_memory", lambda: 100)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40, 80))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return torch.device("cpu"), torch.device("cuda")


def test_the_fastest_memory_that_has_room_is_chosen(machine):
    cpu, gpu = machine
    assert [MemoryBudget(cpu).choose(size) for size in (50, 51)] == ["device", "disk"]
    assert [MemoryBudget(gpu).choose(size) for size in (20, 21, 50, 51)] == ["device", "host", "host", "disk"]
    assert MemoryBudget(gpu, 30 / 2**30).choose(30) == "device" and MemoryBudget(cpu, 29 / 2**30).choose(30) == "disk"


def test_what_was_granted_is_taken_off_the_budget(machine):
    cpu, gpu = machine
    budget = MemoryBudget(gpu)
    assert [budget.choose(size) for size in (15, 6, 5, 44, 1)] == ["device", "host", "device", "host", "disk"]
    budget = MemoryBudget(cpu, 40 / 2**30)
    assert [budget.choose(size) for size in (30, 11, 10, 1)] == ["device", "disk", "device", "disk"]
    # Chips of several sensors are held in one memory, or their batches would be gathered in two ways.
    arrays = [np.zeros((5, 2, 2), np.uint8)] * 2
    budget = MemoryBudget(cpu, 60 / 2**30)
    for expected in ("device", "disk"):
        assert {store.memory for store in place_stores(budget, *arrays)} == {expected}


def test_the_ranks_of_a_host_share_its_memory(machine, monkeypatch):
    cpu, gpu = machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [MemoryBudget(cpu).choose(size) for size in (6, 7)] == ["device", "disk"]
    assert [MemoryBudget(cpu, 80 / 2**30).choose(size) for size in (10, 11)] == ["device", "disk"]
    # Each rank has a GPU of its own.
    assert [MemoryBudget(gpu).choose(size) for size in (20, 6, 21)] == ["device", "device", "disk"]
    budget = MemoryBudget(gpu, 10 / 2**30)
    assert [budget.choose(size) for size in (10, 6, 6)] == ["device", "host", "disk"]


def test_free_memory_is_less_than_all_memory():
    from data.store import _free_memory

    assert 2**24 < _free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def open_stores(paths, folder, answers):
    """In a process of its own; counts the files that it decoded."""
    import data.store as store

    decode_all, decoded = store.decode_all, []
    store.decode_all = lambda paths, *rest: decoded.append(len(paths)) or decode_all(paths, *rest)
    answers.put((int(open_store(paths, folder).sum()), sum(decoded)))


def test_two_processes_make_one_store(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(np.roll(LEVELS, i, 0))) for i in range(300)]
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    both = [context.Process(target=open_stores, args=(paths, tmp_path / "store", answers)) for _ in range(2)]
    [process.start() for process in both]
    [process.join(60) for process in both]
    (first, one), (second, two) = answers.get(), answers.get()
    assert first == second == 300 * int(LEVELS.sum()) and sorted((one, two)) == [0, 300]


def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_store(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(LEVELS)) for i in range(3)]
    open_store(paths, tmp_path / "store")
    (complete,) = (tmp_path / "store").glob("*.npy")
    partial = complete.with_suffix(".part")
    partial.write_bytes(complete.read_bytes()[:200])
    complete.unlink()
    np.testing.assert_array_equal(open_store(paths, tmp_path / "store"), [LEVELS] * 3)
    assert not partial.exists()


@pytest.mark.slow
def test_a_killed_process_leaves_no_worker_that_holds_the_lock(tmp_path):
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(LEVELS)) for i in range(4)]
    code = "import sys; from data.store import open_store; open_store(sys.argv[1:5] * 5_000, sys.argv[5])"
    start = [sys.executable, "-c", code, *map(str, paths), str(tmp_path / "store")]
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("store/*.part")):
        time.sleep(0.01)
    time.sleep(0.3)  # the workers are there
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("store/*.npy"))
    done = subprocess.run(start, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0 and len(list(tmp_path.glob("store/*.npy"))) == 1


def test_a_file_that_can_be_read_later_is_decoded_again(tmp_path, files):
    """An error of the disk, after which neither size nor time of the file changes."""
    content = files[1].read_bytes()
    files[1].write_bytes(b"0" * len(content))
    os.utime(files[1], ns=(1, 1))
    chips = open_store(files, tmp_path / "store", skip_bad=True)
    assert unreadable(chips).tolist() == [1] and not chips[1].any()
    files[1].write_bytes(content)
    os.utime(files[1], ns=(1, 1))
    chips = open_store(files, tmp_path / "store", skip_bad=True)
    assert not len(unreadable(chips)) and chips[1].any()
    open_store(files, tmp_path / "store")


def test_many_pixels_outside_the_range_are_reported(tmp_path, capsys):
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.arange(144.0).reshape(12, 12))
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    open_store(paths, tmp_path / "store", grey_range=(0, 140))  # 3 of 144
    assert not capsys.readouterr().out
    open_store(paths, tmp_path / "store", grey_range=(0, 99))  # 44 of 144
    assert "31% of the pixels in" in (said := capsys.readouterr().out) and "GREY_RANGE=0,99, and become" in said
