"""The speed of each step, compared with the usual way to do it or with its upper bound.

python benchmarks/throughput.py [DEVICE=auto] [ROWS=input,pretrain]

Both sides of a row run in turn in this process. The table shows the median of their ratios and the
required ratio. Exits with 1 if a row is below it. On CUDA, times come from device events.
"""

import contextlib
import gc
import io
import os
import runpy
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.augment import Augmentation, to_input
from data.batches import Batches
from data.decode import CHUNK, survey
from data.demo import write_demo
from data.layouts import find_pairs
from data.sampler import WeightedStream
from data.store import ChipStore, open_store, place_stores
from models.backbone import Classifier
from utils.predict.tta import autocast, predict, scaled, tta_views
from utils.run.checkpoint import save_checkpoint
from utils.run.device import choose_device
from utils.run.settings import read_settings
from utils.run.start import run as run_script
from utils.train.loop import fit

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
ROWS = ()  # first words of the rows to measure; empty: all
ROUNDS = 5  # pairs of measurements in each row, at least
SECONDS = 30.0  # time for each row, at least: short measurements are repeated more often
BACKBONE = "test_resnet"  # of the steps
SMALL = "test_vit"  # of the whole epoch: so small that the loader matters
LARGE = "resnet10t"  # its forward pass costs four times that of BACKBONE
FROZEN = "resnet34"  # of the head that is trained on one view
BATCH = 64  # chips in a batch
PAIRS = {  # of the simulated data set, which is long-tailed like the demo set
    "sedan": 900, "SUV": 500, "pickup_truck": 300, "van": 160, "box_truck": 80, "motorcycle": 30, "bus": 15,
}  # fmt: skip
FEW = {name: max(2, count // 12) for name, count in PAIRS.items()}  # for whole runs of 20 epochs
WORKERS = 2  # of the DataLoader
SCALES = (0.875, 1.0, 1.125)  # of the training steps, as in the scripts
GREY = (0.4, 0.12)  # mean and standard deviation of the grey level
STEPS = 21  # in one measurement; a multiple of the number of scales


def main():
    read_settings(globals())
    device = choose_device(DEVICE)
    print(f"\n{machine(device)}\n\n| row | against | measured | required |\n|---|---|---|---|", flush=True)
    too_slow = []
    gc.freeze()  # or the collection of the libraries' objects stops one side for half a second, now and then
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with contextlib.redirect_stderr(io.StringIO()):
            write_demo("many", train_counts=PAIRS, val_scale=0.02, test_scale=0.7)
            write_demo("few", train_counts=FEW, val_scale=0.02, test_scale=0.02)
        for name, against, required, measure in table:
            if ROWS and not name.startswith(tuple(ROWS)):
                continue
            with quiet():
                ratios = ratios_of(measure(device))
            ratio = statistics.median(ratios)
            measured = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {name} | {against.format(WORKERS=WORKERS)} | {measured} | {required:.2f} |", flush=True)
            too_slow += [name] if ratio < required else []
    if too_slow:
        raise SystemExit(f"below the required ratio: {', '.join(too_slow)}")


def ratios_of(pairs):
    """Their seconds divided by ours, of ROUNDS pairs or more."""
    started, ratios = time.perf_counter(), []
    while len(ratios) < ROUNDS or time.perf_counter() - started < SECONDS:
        ours, theirs = next(pairs)
        ratios.append(theirs / ours)
    return ratios


# Each measure yields pairs (our seconds, their seconds) of the same work, and never ends.


def input_at(size):
    def measure(device):
        pairs = find_pairs("many")
        store = ChipStore(open_store(pairs.eo, "chips"), device)
        stream = WeightedStream(pairs.labels, BATCH, 0.5, 0)
        batches = Batches(stream, pairs.labels, device, 1, store)
        augment = Augmentation(GREY, jitter=0.3, speckle=0.0, rotation=0.0, sizes=[size])
        loader = folder_loader(size)

        def ours():
            for batch in batches.between(0, len(loader)):
                channels_last(augment(batch))

        def theirs():
            for images, labels in loader:
                images.to(device), labels.to(device)

        theirs()  # starts the workers
        return alternate(ours, theirs, device)

    return measure


def pretrain_step(device):
    """The script's own steps in its own loop, against forward, backward and optimizer alone."""
    training = captured("pretrain.py", "DATA_ROOT=many", f"DEVICE={device}", f"BACKBONE={LARGE}")
    network, optimizer = network_of(LARGE, 56, len(PAIRS), device)
    sizes = [scaled(56, scale) for scale in SCALES]
    ready = [channels_last(torch.randn(BATCH, 1, size, size, device=device)) for size in sizes]
    labels = torch.randint(len(PAIRS), (BATCH,), device=device)

    def theirs():
        for images in ready * 2:
            train_step(network, optimizer, images, labels)

    return alternate(lambda: fit_time(training, 6), theirs, device)


def pretrain_epoch(device):
    """A whole epoch of a small network at 64 px, against the same network behind a DataLoader."""
    settings = ["DATA_ROOT=many", f"DEVICE={device}", f"BACKBONE={SMALL}", "IMAGE_SIZE=64", "TRAIN_SCALES=1"]
    training = captured("pretrain.py", *settings)
    loader = folder_loader(64)
    network, optimizer = network_of(SMALL, 64, len(PAIRS), device)

    def theirs():
        for images, labels in loader:
            train_step(network, optimizer, images[:, :1].to(device), labels.to(device))

    theirs()
    return alternate(lambda: fit_time(training, len(loader)), theirs, device)


def sar_feature_step(device):
    """Both sides are the scripts' own loops; the teacher's outputs are in the cache."""
    teacher = captured("pretrain.py", "DATA_ROOT=many", f"DEVICE={device}")
    write_checkpoint("many", BACKBONE, 56)
    student = captured("sar_feature.py", "TEACHER=untrained.pt", f"DEVICE={device}")
    fit_time(student)  # fills the cache
    return alternate(lambda: fit_time(student), lambda: fit_time(teacher), device)


def twenty_epochs_distilled(backbone):
    def measure(device):
        write_checkpoint("few", backbone, 56)
        settings = ["EPOCHS=20", f"DEVICE={device}", f"BACKBONE={BACKBONE}", "TEACHER=untrained.pt"]
        settings += ["INIT="] if backbone != BACKBONE else []
        return alternate(
            lambda: script("sar_feature.py", *settings),
            lambda: script("sar_feature.py", *settings, "CACHE_TEACHER=False"),
            device,
        )

    return measure


def twenty_epochs_of_the_head(all_views, backbone, size):
    def measure(device):
        write_checkpoint("few", backbone, size, stage="sar_feature", sensor="SAR")
        settings = ["EPOCHS=20", f"DEVICE={device}", "STUDENT=untrained.pt", f"ALL_VIEWS={all_views}"]

        def every_step():
            with mock.patch("utils.train.feature_cache.FrozenCache", lambda network, *_, **__: network):
                return script("finetune.py", *settings)

        return alternate(lambda: script("finetune.py", *settings), every_step, device)

    return measure


def prediction(device):
    model, _ = network_of(BACKBONE, 56, len(PAIRS), device)
    model.eval()
    pairs = find_pairs("many")
    store = ChipStore(open_store(pairs.sar, "chips"), device).subset(np.arange(256))
    views = tta_views((0, 90, 180, 270), SCALES)
    sizes = [scaled(56, scale) for scale in SCALES]
    ready = [channels_last(to_input(store[:256], size, *GREY)) for size in sizes]

    @torch.no_grad()
    def theirs():
        for images in ready * (len(views) // len(ready)):
            with autocast(device):
                model(images)

    def ours():
        predict(model, store, 56, GREY, views, 256)

    return alternate(ours, theirs, device)


def store_build(device):
    pairs = find_pairs("many")
    paths = pairs.sar * 12

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            open_store(paths, folder)
            return time.perf_counter() - started

    def theirs():
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(decoded, [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]):
                pass

    return alternate(ours, theirs, torch.device("cpu"))


def alternate(ours, theirs, device):
    """Pairs of seconds, each side in turn."""
    while True:
        yield seconds(ours, device), seconds(theirs, device)


def seconds(work, device):
    """Seconds of work(), or those that it returns."""
    if device.type != "cuda":
        started = time.perf_counter()
        return work() or time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    returned = work()
    last.record()
    torch.cuda.synchronize()
    return returned or first.elapsed_time(last) / 1000


# What both sides are made of.


def folder_loader(size):
    """The usual pipeline over the EO chips, in workers that stay alive: the method's transforms
    (resize, flip, rotation), and ours of the grey levels."""
    steps = [
        transforms.Resize((size, size)), transforms.RandomHorizontalFlip(), transforms.RandomRotation(180),
        transforms.ColorJitter(brightness=0.3, contrast=0.3), transforms.ToTensor(),
        transforms.Normalize((0.5,) * 3, (0.5,) * 3),
    ]  # fmt: skip
    data = ImageFolder("many/train/EO_Train", transforms.Compose(steps))
    return DataLoader(
        data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def network_of(backbone, size, classes, device):
    network = Classifier(backbone, classes, size).to(device, memory_format=torch.channels_last)
    return network, torch.optim.AdamW(network.parameters(), fused=True)


def train_step(network, optimizer, images, labels):
    with autocast(labels.device):
        loss = F.cross_entropy(network(channels_last(images)), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def channels_last(images):
    return images.to(memory_format=torch.channels_last)


def write_checkpoint(root, backbone, size, stage="pretrain", sensor="EO"):
    """Write untrained.pt: a checkpoint of an untrained network, which is as fast as a trained one."""
    pairs = find_pairs(root)
    model = Classifier(backbone, len(pairs.classes), size)
    side, grey_range = survey(pairs.eo if sensor == "EO" else pairs.sar)
    save_checkpoint("untrained.pt", {
        "stage": stage, "sensor": sensor, "settings": {"BALANCE": 0.5}, "backbone": backbone, "image_size": size,
        "chip_side": side, "grey_range": grey_range,
        "classes": pairs.classes, "class_ids": pairs.class_ids, "counts": pairs.counts, "grey": GREY,
        "scales": (1.0,), "views": ((0, 1.0),), "ood": {}, "validation": {}, "data_root": root,
        "entities": "", "labelled_share": 1.0, "val_fraction": 0.1, "model": model.state_dict(),
    })  # fmt: skip


def script(name, *settings):
    """Seconds that a script takes once its chips are in memory, without validation and files."""
    started = time.perf_counter()

    def place(*arguments):
        nonlocal started
        stores = place_stores(*arguments)
        started = time.perf_counter()
        return stores

    with (
        training_only(),
        mock.patch("data.store.place_stores", place),
        mock.patch.object(sys, "argv", [name, *settings]),
    ):
        runpy.run_path(str(Path(__file__).resolve().parents[1] / name), run_name="__main__")
    return time.perf_counter() - started


def captured(name, *settings):
    """Learner, batches, validate, run and contents: what a script passes to `fit`."""
    with mock.patch("utils.train.loop.fit") as loop:
        script(name, *settings)
    return loop.call_args.args


def fit_time(training, steps=STEPS):
    """Seconds that `fit` takes for one epoch of so many steps; training: of `captured`."""
    learner, batches, _, run, contents = training
    batches.epochs, batches.steps = 1, steps
    with training_only():
        (row,) = fit(learner, batches, Unvalidated(), run, contents)
    return steps * BATCH / row["images/s"]


@contextlib.contextmanager
def training_only():
    """No validation and no files."""
    with (
        mock.patch("utils.train.validation.Validation", lambda *_: Unvalidated()),
        mock.patch("utils.train.validation.labelled_chips", lambda *_: None),
        mock.patch("utils.run.resume.Run.save"),
        mock.patch("utils.train.history.History.write"),
        mock.patch("utils.train.history.History.plot"),
    ):
        yield


class Unvalidated:
    """A validation that takes no time."""

    def __call__(self, model):
        return {"accuracy": 0.0, "mean per-class accuracy": 0.0}

    def sample(self, model, most):
        return {}


def decoded(paths):
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def machine(device):
    """The machine in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


loader_name = "ImageFolder + DataLoader({WORKERS} workers)"
each_step = "backbone at every step"
table = (
    ("input at 224 px, images/s", loader_name, 8, input_at(224)),
    ("input at 64 px, images/s", loader_name, 20, input_at(64)),
    (f"pretrain.py step, {LARGE}, images/s", "forward, backward, optimizer alone", 0.97, pretrain_step),
    (f"pretrain.py, whole epoch, {SMALL} at 64 px", loader_name, 1.5, pretrain_epoch),
    ("sar_feature.py step, cache warm", "pretrain.py step", 0.90, sar_feature_step),
    ("sar_feature.py, 20 epochs, teacher = student", "no cache", 1.1, twenty_epochs_distilled(BACKBONE)),
    (f"sar_feature.py, 20 epochs, teacher {LARGE}", "no cache", 1.5, twenty_epochs_distilled(LARGE)),
    ("finetune.py, 20 epochs, one view", each_step, 8, twenty_epochs_of_the_head(False, FROZEN, 56)),
    ("finetune.py, 20 epochs, eight views", each_step, 2, twenty_epochs_of_the_head(True, LARGE, 40)),
    ("results.py, views x chips/s", "forward on ready batches", 0.90, prediction),
    ("store build, images/s", "bare PIL decode on the same cores", 0.85, store_build),
)


if __name__ == "__main__":
    run_script(main)
