"""What the size of the challenge costs: 455,636 pairs, with memory, opening time and time a batch.

python benchmarks/scale.py [PAIRS=455636] [FOLDER=]

Its chips are noise in the challenge's counts, written straight into the store beside empty files of
the right names; 20,000 further pairs are real PNGs, which are decoded. Exits with 1 where a limit is
passed.
"""

import itertools
import multiprocessing
import os
import resource
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.batches import Feed  # noqa: E402
from data.layouts import OFFICIAL_CLASSES, find_pairs  # noqa: E402
from data.sampler import BalancedStream, WeightedStream  # noqa: E402
from data.store import ChipStore, fingerprint, open_store  # noqa: E402
from models.backbone import Classifier  # noqa: E402
from utils.predict.clusters import cluster_chips, vote  # noqa: E402
from utils.run.settings import read_settings, run  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

PAIRS = 455_636  # of the large data set; fewer for a quick look
IMAGES = 20_000  # pairs that are written as PNGs and decoded
FOLDER = ""  # where it is made, 4 GB; empty: a temporary folder, deleted afterwards
SMALL = 5_000  # chips of the store that the large one is held against
STEPS = 400  # of the training run
CHIPS = 50_000_000  # of the samplers
TEST_CHIPS = 100_000  # of the clustering
COUNTS = (364_291, 43_401, 24_158, 16_890, 2_896, 1_441, 898, 612, 696, 353)  # of the challenge
SIDES = {"EO_Train": 32, "SAR_Train": 56}  # px


def main():
    read_settings(globals())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(FOLDER or folder)
        print("\n| what | measured | at most |\n|---|---|---|", flush=True)
        short = []
        for name, unit, most, measure in table:
            found = in_a_process(measure)
            print(f"| {name} | {found:.3g} {unit} | {f'{most:g} {unit}' if most else ''} |", flush=True)
            short += [name] if most and found > most else []
    if short:
        raise SystemExit(f"too much: {', '.join(short)}")


def in_a_process(measure):
    """measure() in a process of its own, whose peak of memory is its own."""
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=lambda: answer.put(measure()))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{measure.__name__} failed")
    return answer.get()


def make():
    """Seconds to write the large data set and the one of PNGs."""
    started = time.perf_counter()
    if Path("images").exists():
        return 0.0  # by an earlier run in the same FOLDER
    write("large", [round(count * PAIRS / sum(COUNTS)) for count in COUNTS], None)
    pairs = find_pairs("large")
    for paths, side in ((pairs.eo, 32), (pairs.sar, 56)):
        Path("chips").mkdir(exist_ok=True)
        place, state = fingerprint(paths)
        array = np.lib.format.open_memmap(
            f"chips/{place}-{state}.npy", mode="w+", dtype=np.uint8, shape=(len(paths), side, side)
        )
        for start in range(0, len(array), 4096):
            block = array[start : start + 4096]
            block[:] = np.random.default_rng(start).integers(60, 200, block.shape, dtype=np.uint8)
    write("images", [round(count * IMAGES / sum(COUNTS)) for count in COUNTS], np.random.default_rng(0))
    return time.perf_counter() - started


def write(root, counts, random):
    """Files of a data set, empty ones or PNGs of noise."""
    for sensor, side in SIDES.items():
        numbers = itertools.count()
        for name, count in zip(OFFICIAL_CLASSES, counts, strict=True):
            folder = Path(root, "train", sensor, name)
            folder.mkdir(parents=True)
            for number in itertools.islice(numbers, max(count, 2)):
                path = f"{folder}/{number:06d}.png"
                if random is None:
                    os.close(os.open(path, os.O_CREAT))
                else:
                    chip = random.integers(60, 200, (side, side), dtype=np.uint8)
                    Image.fromarray(chip).save(path)


def decode():
    """Chips a second from PNG into the store."""
    shutil.rmtree("decoded", ignore_errors=True)
    paths = find_pairs("images").sar
    started = time.perf_counter()
    open_store(paths, "decoded")
    return len(paths) / (time.perf_counter() - started)


def find():
    """Seconds to find the files of the large data set."""
    started = time.perf_counter()
    find_pairs("large")
    return time.perf_counter() - started


def opened():
    """Seconds to open both stores once the files are found."""
    pairs = find_pairs("large")
    started = time.perf_counter()
    open_store(pairs.eo, "chips"), open_store(pairs.sar, "chips")
    return time.perf_counter() - started


def first_batch():
    """Seconds from the start of pretrain.py's main() to its first batch."""
    started = time.perf_counter()
    trained("pretrain.py", "CHIP_MEMORY_GB=0", steps=1)
    return time.perf_counter() - started


def memory_of(memory_gb):
    def measure():
        """GiB at the peak beyond imports, model and the activations of a batch."""
        network = Classifier("test_resnet", 10, 63)
        network(torch.randn(64, 1, 63, 63)).sum().backward()
        before = peak()
        trained("pretrain.py", "SENSOR=SAR", f"CHIP_MEMORY_GB={memory_gb}", steps=STEPS)
        return peak() - before

    return measure


def batch_against_small():
    """Time a batch from the large store on disk, over that from a small one in memory."""
    pairs = find_pairs("large")
    chips = open_store(pairs.sar, "chips")
    device = torch.device("cpu")
    few = np.linspace(0, len(chips) - 1, SMALL).astype(int)
    feeds = []
    for labels, store in (
        (pairs.labels, ChipStore(chips, device, "disk")),
        (pairs.labels[few], ChipStore(chips[few], device)),
    ):
        stream = WeightedStream(labels, 64, 0.5, 0)
        feeds.append(Feed(stream, np.arange(len(store)), labels, device, store))
    return statistics.median(
        seconds(feeds[0], 200, start) / seconds(feeds[1], 200, start) for start in range(1000, 4000, 200)
    )


def seconds(feed, steps, start):
    started = time.perf_counter()
    for step in range(start, start + steps):
        feed(step)
    return time.perf_counter() - started


def sampler_memory():
    """Bytes a chip that both samplers need for 50 million."""
    labels = np.random.default_rng(0).integers(0, 10, CHIPS, dtype=np.int8)
    before = peak()
    streams = WeightedStream(labels, 64, 0.5, 0), BalancedStream(labels, 64, 0)
    for stream in streams:
        stream.batch(0)
    return (peak() - before) * 2**30 / CHIPS / len(streams)


def sampler_time():
    """Time a batch from 50 million chips over that from 50 thousand, of the slower sampler."""
    labels = np.random.default_rng(0).integers(0, 10, CHIPS, dtype=np.int8)
    ratios = []
    for make_stream in (lambda x: WeightedStream(x, 64, 0.5, 0), lambda x: BalancedStream(x, 64, 0)):
        large, small = make_stream(labels), make_stream(labels[:50_000])
        ratios.append(
            statistics.median(
                seconds(large.batch, 400, start) / seconds(small.batch, 400, start)
                for start in range(0, 8000, 400)
            )
        )
    return max(ratios)


def clustered(by):
    """Seconds to cluster 100,000 test chips of 512 features and to vote, and GiB for it."""
    random = np.random.default_rng(0)
    vehicle = np.arange(TEST_CHIPS) // 15
    centres = random.normal(size=(vehicle[-1] + 1, 512)).astype(np.float32)
    features = centres[vehicle] + random.normal(size=(TEST_CHIPS, 512)).astype(np.float32)
    names = [f"Gotcha{4 * chip + 200 * scene}.png" for chip, scene in enumerate(vehicle)]
    logits = random.normal(size=(TEST_CHIPS, 10))
    before, started = peak(), time.perf_counter()
    vote(logits, cluster_chips(features, names, by))
    return time.perf_counter() - started, peak() - before


def cluster_time():
    return max(clustered("features")[0], clustered("both")[0])


def cluster_memory():
    return max(clustered("features")[1], clustered("both")[1])


def trained(script, *settings, steps):
    """Run a script with so many steps of its loop, without validation and files."""
    from utils.train.loop import fit

    def few_steps(model, loss_of, validate, **options):
        found = {"accuracy": 0.0, "mean per-class accuracy": 0.0}
        fit(model, loss_of, lambda model: found, **options | {"epochs": 1, "steps": steps})

    settings = ["DATA_ROOT=large", "STORE_DIR=chips", "OUT_DIR=out", *settings]
    with (
        mock.patch("utils.train.loop.fit", few_steps),
        mock.patch.object(sys, "argv", [script, *settings]),
        mock.patch("builtins.print"),
    ):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def peak():
    """Most memory that the process has held, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


table = (
    ("make it, once", "s", None, make),
    ("decode PNGs into the store", "chips/s", None, decode),
    ("find the files of all pairs", "s", None, find),
    ("open both built stores", "s", 5, opened),
    ("pretrain.py up to its first batch", "s", None, first_batch),
    (f"memory of {STEPS} steps beyond the model, chips on disk", "GiB", 1.5, memory_of(1e-6)),
    (f"memory of {STEPS} steps beyond the model, chips in memory", "GiB", None, memory_of(0)),
    ("time a batch from disk over one from 5,000 chips in memory", "", None, batch_against_small),
    ("samplers over 50 million chips", "bytes a chip", 8, sampler_memory),
    ("time a batch from 50 million chips over 50 thousand", "", 1.25, sampler_time),
    ("cluster 100,000 chips of 512 features and vote", "s", 60, cluster_time),
    ("memory of the same", "GiB", 2, cluster_memory),
)

if __name__ == "__main__":
    run(main)
