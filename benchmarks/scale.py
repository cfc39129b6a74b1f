"""The cost of the challenge's size, 455,636 pairs: memory, time to open the stores, time of a batch.

python benchmarks/scale.py [PAIRS=455636] [FOLDER=]

The SAR chips are noise, the EO chips objects that are seen LOOKS times each, in the challenge's counts. They are
written directly into the store; their image files have the right names, but are empty. 20,000 further pairs are
real PNGs of noise, which are decoded.
Exits with 1 if a limit is exceeded.
"""

import itertools
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.entities import discover, find_entities
from data.layouts import OFFICIAL_CLASSES, find_pairs
from data.sampler import BalancedStream, WeightedStream
from data.store import ChipStore, fingerprint, open_store
from models.backbone import Classifier
from utils.predict.clusters import cluster_chips
from utils.predict.vote import vote
from utils.run.settings import read_settings
from utils.run.start import run as run_script

import numpy as np
import torch
from PIL import Image

PAIRS = 455_636  # of the large data set; fewer for a quick look
IMAGES = 20_000  # pairs that are written as PNGs and decoded
FOLDER = ""  # where the data sets are written, 4 GB; empty: a temporary folder, deleted afterwards
SMALL = 5_000  # chips of the small store that the large one is compared with
STEPS = 400  # of the training run
CHIPS = 50_000_000  # of the samplers
TEST_CHIPS = 100_000  # of the clustering
COUNTS = (364_291, 43_401, 24_158, 16_890, 2_896, 1_441, 898, 612, 696, 353)  # of the challenge
LOOKS = 300  # chips of an object
SIDES = {"EO_Train": 32, "SAR_Train": 56}  # px


def main():
    read_settings(globals())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(FOLDER or folder)
        print("\n| what | measured | at most |\n|---|---|---|", flush=True)
        exceeded = []
        for name, unit, most, measure in table:
            value = in_a_process(measure)
            print(f"| {name} | {value:.3g} {unit} | {f'{most:g} {unit}' if most else ''} |", flush=True)
            exceeded += [name] if most and value > most else []
    if exceeded:
        raise SystemExit(f"above the limit: {', '.join(exceeded)}")


def in_a_process(measure):
    """measure() in a process of its own, so that its peak of memory is its own."""
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    process = context.Process(target=lambda: result.put(measure()))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{measure.__name__} failed")
    return result.get()


def make():
    """Seconds to write the large data set and the one of PNGs."""
    started = time.perf_counter()
    if Path("images").exists():
        return 0.0  # by an earlier run in the same FOLDER
    write("large", [round(count * PAIRS / sum(COUNTS)) for count in COUNTS], None)
    pairs = find_pairs("large")
    Path("chips").mkdir(exist_ok=True)
    of_chip, objects = observed(pairs.counts)
    for paths, side in zip((pairs.eo, pairs.sar), SIDES.values(), strict=True):
        store = Path("chips", f"{'-'.join(fingerprint(paths))}-{side}.npy")
        store.with_suffix(".json").write_text(json.dumps({"unreadable": {}, "digest": store.stem}))
        shape = (len(paths), side, side)
        array = np.lib.format.open_memmap(store, mode="w+", dtype=np.uint8, shape=shape)
        for start in range(0, len(array), 4096):
            block = array[start : start + 4096]
            block[:] = np.random.default_rng(start).integers(60, 200, block.shape, dtype=np.uint8)
            if paths is pairs.eo:
                noise = np.random.default_rng(start).uniform(0.1, 0.3, (len(block), 1, 1))
                block[:] = block * noise + objects[of_chip[start : start + len(block)]]
    write("images", [round(count * IMAGES / sum(COUNTS)) for count in COUNTS], np.random.default_rng(0))
    return time.perf_counter() - started


def observed(counts):
    """The object that each EO chip shows, int64 [N], and the objects, uint8 [M, 32, 32], of which coarse structure
    is the strongest. One after the other is seen, then the first again, as in the frames of a survey."""
    of_class = [np.arange(count) % max(1, count // LOOKS) for count in counts]
    first = np.cumsum([0, *(numbers.max() + 1 for numbers in of_class)])
    random = np.random.default_rng(0)
    scales = (16, 8, 4)  # px of the blocks of equal level
    layers = [random.normal(size=(first[-1], 32 // px, 32 // px)).repeat(px, 1).repeat(px, 2) for px in scales]
    objects = (80 + 10 * sum(layers)).clip(0, 190).astype(np.uint8)
    return np.concatenate([numbers + start for numbers, start in zip(of_class, first[:-1], strict=True)]), objects


def write(root, counts, random):
    """Write the files of a data set.

    random: generator of PNGs of noise; None = empty files, except the first, which gives the side of all.
    """
    for sensor, side in SIDES.items():
        numbers = itertools.count()
        for name, count in zip(OFFICIAL_CLASSES, counts, strict=True):
            folder = Path(root, "train", sensor, name)
            folder.mkdir(parents=True)
            for number in itertools.islice(numbers, max(count, 2)):
                path, chip = f"{folder}/{number:06d}.png", np.zeros((side, side), np.uint8)
                if random is None and number:
                    os.close(os.open(path, os.O_CREAT))
                else:
                    chip = random.integers(60, 200, chip.shape, np.uint8) if random else chip
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


def entities_time():
    """Seconds to find the entities of the large data set."""
    pairs = find_pairs("large")
    chips = open_store(pairs.eo, "chips")
    started = time.perf_counter()
    entities = discover(chips, pairs.labels)
    elapsed = time.perf_counter() - started
    wanted = observed(pairs.counts)[0]
    together = len(set(zip(entities.tolist(), wanted.tolist(), strict=True)))
    count = len(np.unique(entities))
    if together != wanted.max() + 1 or count != together:
        print(f"{wanted.max() + 1} objects, but {count} entities; {together} pairs of both", flush=True)
    return elapsed


def entities_memory():
    """GiB at the peak beyond imports and the lists of files, to find the entities and to keep them."""
    pairs = find_pairs("large")
    before = peak()
    find_entities(pairs, "chips")
    return peak() - before


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
    """Time to gather a batch from the large store on disk, divided by that from a small one in memory."""
    pairs = find_pairs("large")
    chips = open_store(pairs.sar, "chips")
    device = torch.device("cpu")
    few = np.linspace(0, len(chips) - 1, SMALL).astype(int)

    def gather_from(store, labels):
        stream = WeightedStream(labels, 64, 0.5, 0)
        return lambda step: store[stream.batch(step)[0]]

    large = gather_from(ChipStore(chips, device, "disk"), pairs.labels)
    small = gather_from(ChipStore(chips[few], device), pairs.labels[few])
    return median_ratio(large, small, range(1000, 4000, 200), 200)


def median_ratio(large, small, starts, steps):
    """Median over the starts of the seconds of so many calls large(step), divided by those of small(step)."""
    return statistics.median(seconds(large, steps, start) / seconds(small, steps, start) for start in starts)


def seconds(work, steps, start):
    started = time.perf_counter()
    for step in range(start, start + steps):
        work(step)
    return time.perf_counter() - started


def sampler_memory():
    """Bytes per chip that a sampler needs for 50 million chips, mean of both samplers."""
    labels = np.random.default_rng(0).integers(0, 10, CHIPS, dtype=np.int8)
    before = peak()
    streams = WeightedStream(labels, 64, 0.5, 0), BalancedStream(labels, 64, 0)
    for stream in streams:
        stream.batch(0)
    return (peak() - before) * 2**30 / CHIPS / len(streams)


def sampler_time():
    """Time of a batch from 50 million chips divided by that from 50 thousand, of the slower sampler."""
    labels = np.random.default_rng(0).integers(0, 10, CHIPS, dtype=np.int8)
    ratios = []
    for make_stream in (lambda x: WeightedStream(x, 64, 0.5, 0), lambda x: BalancedStream(x, 64, 0)):
        large, small = make_stream(labels), make_stream(labels[:50_000])
        ratios.append(median_ratio(large.batch, small.batch, range(0, 8000, 400), 400))
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
    """Run a script with so many training steps, without validation and files."""

    def few_steps(learner, batches, *_):
        for batch in batches.between(0, steps):
            learner.step(batch)

    settings = ["DATA_ROOT=large", "STORE_DIR=chips", "OUT_DIR=out", *settings]
    with (
        mock.patch("utils.train.loop.fit", few_steps),
        mock.patch.object(sys, "argv", [script, *settings]),
        mock.patch("builtins.print"),
    ):
        runpy.run_path(str(Path(__file__).resolve().parents[1] / script), run_name="__main__")


def peak():
    """Highest memory use of the process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


table = (
    ("write both data sets, once", "s", None, make),
    ("decode PNGs into the store", "chips/s", None, decode),
    ("find the files of all pairs", "s", None, find),
    ("open both built stores", "s", 5, opened),
    ("find the entities of all pairs, once", "s", 120, entities_time),
    ("memory of finding the entities", "GiB", 2, entities_memory),
    ("pretrain.py up to its first batch", "s", None, first_batch),
    (f"memory of {STEPS} steps beyond the model, chips on disk", "GiB", 1.5, memory_of(1e-6)),
    (f"memory of {STEPS} steps beyond the model, chips in memory", "GiB", None, memory_of(0)),
    ("time of a batch from disk over one from 5,000 chips in memory", "", None, batch_against_small),
    ("samplers over 50 million chips", "bytes per chip", 8, sampler_memory),
    ("time of a batch from 50 million chips over 50 thousand", "", 1.25, sampler_time),
    ("cluster 100,000 chips of 512 features and vote", "s", 60, cluster_time),
    ("memory of the clustering and the vote", "GiB", 2, cluster_memory),
)

if __name__ == "__main__":
    run_script(main)
