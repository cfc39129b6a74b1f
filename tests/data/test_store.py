import multiprocessing
import os
import subprocess
import sys
import time

from data.errors import DataError
from data.store import ChipStore, choose_place, decode, grey_statistics, open_store
from tests.conftest import ROOT

import numpy as np
import pytest
import torch
from PIL import Image

LEVELS = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_every_kind_of_file_gives_the_same_grey(tmp_path):
    grey = Image.fromarray(LEVELS)
    palette = Image.fromarray(255 - LEVELS).convert("P")
    palette.putpalette([255 - i for i in range(256) for _ in range(3)])
    alpha = grey.convert("RGBA")
    alpha.putalpha(128)
    files = [
        save(tmp_path / "l.png", grey),
        save(tmp_path / "rgb.png", grey.convert("RGB")),
        save(tmp_path / "rgba.png", alpha),
        save(tmp_path / "la.png", grey.convert("LA")),
        save(tmp_path / "p.png", palette),
        save(tmp_path / "i16.png", Image.fromarray(LEVELS.astype(np.uint16) * 257)),
        save(tmp_path / "l.tif", grey),
        save(tmp_path / "L.BMP", grey),
    ]
    for path in files:
        np.testing.assert_array_equal(decode(path), LEVELS, err_msg=path.name)


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


def test_sizes_are_brought_to_the_most_common(tmp_path):
    sizes = [(56, 56), (57, 57), (56, 56), (58, 40)]
    paths = [
        save(tmp_path / f"{i}.png", Image.fromarray(np.full(s, 50 + i, np.uint8)))
        for i, s in enumerate(sizes)
    ]
    chips = open_store(paths, tmp_path / "store")
    assert chips.shape == (4, 56, 56) and chips.dtype == np.uint8
    assert [int(c.mean()) for c in chips] == [50, 51, 52, 53]


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


@pytest.mark.parametrize("place", ["device", "disk"])
def test_chip_store_gathers_and_cuts(tmp_path, place):
    chips = np.random.default_rng(2).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "chips.npy", chips)
    store = ChipStore(np.load(tmp_path / "chips.npy", mmap_mode="c"), torch.device("cpu"), place)
    np.testing.assert_array_equal(store[np.array([4, 19, 4])], chips[[4, 19, 4]])
    part = store.subset(np.array([3, 5]))
    assert len(part) == 2 and len(store) == 20
    np.testing.assert_array_equal(part[0:9], chips[[3, 5]])
    np.testing.assert_array_equal(part.subset(np.array([1]))[np.array([0])], chips[[5]])


def test_what_was_read_from_disk_is_given_back(tmp_path, monkeypatch):
    """A run over a store on disk keeps no more of it in memory than LET_GO allows, times a page a chip."""
    chips = np.random.default_rng(3).integers(0, 256, (8000, 56, 56), dtype=np.uint8)  # 25 MB
    np.save(tmp_path / "chips.npy", chips)
    monkeypatch.setattr("data.store.LET_GO", 2**20)
    store = ChipStore(np.load(tmp_path / "chips.npy", mmap_mode="c"), torch.device("cpu"), "disk")

    def resident():
        with open("/proc/self/smaps") as file:
            part = file.read().partition(f"{tmp_path}/chips.npy")[2]
        return int(part.partition("Rss:")[2].split()[0]) * 1024

    most = 0
    for start in range(0, 8000, 100):
        np.testing.assert_array_equal(store[start : start + 100], chips[start : start + 100])
        most = max(most, resident())
    assert 0 < most < 8 * 2**20


def test_place_is_the_fastest_that_takes_the_chips(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("data.store._free_memory", lambda: 100)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (40, 80))
    assert [choose_place(size, cpu) for size in (50, 51)] == ["device", "disk"]
    assert [choose_place(size, gpu) for size in (20, 21, 50, 51)] == ["device", "host", "host", "disk"]
    assert choose_place(30, gpu, 30 / 2**30) == "device" and choose_place(30, cpu, 29 / 2**30) == "disk"


def test_free_memory_is_told():
    from data.store import _free_memory

    assert 2**24 < _free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def open_stores(paths, folder, answers):
    """In a process of its own; counts the files that it decoded."""
    import data.store as store

    decode, decoded = store._decode_chunk, []
    store._decode_chunk = lambda chunk: decoded.append(len(chunk[2])) or decode(chunk)
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
    (whole,) = (tmp_path / "store").glob("*.npy")
    part = whole.with_suffix(".part")
    part.write_bytes(whole.read_bytes()[:200])
    whole.unlink()
    np.testing.assert_array_equal(open_store(paths, tmp_path / "store"), [LEVELS] * 3)
    assert not part.exists()


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
