"""How fast each step is, beside the usual way to do it or the bound that it cannot pass.

python benchmarks/throughput.py [DEVICE=auto] [ROWS=input,pretrain]

Both sides of a row run in turn in this process; the table shows the median of their ratios and
what is required. Exits with 1 where a row falls short. On CUDA times come from device events.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.augment import jitter, normalise, resize, to_input, turn  # noqa: E402
from data.batches import Feed  # noqa: E402
from data.demo.writer import write_demo  # noqa: E402
from data.layouts import find_pairs  # noqa: E402
from data.sampler import WeightedStream  # noqa: E402
from data.store import CHUNK, ChipStore, open_store, place_stores  # noqa: E402
from models.backbone import Classifier  # noqa: E402
from utils.predict.tta import autocast, predict, scaled, tta_views  # noqa: E402
from utils.run.checkpoint import save_checkpoint  # noqa: E402
from utils.run.settings import read_settings, run  # noqa: E402
from utils.train.loop import choose_device, fit  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

DEVICE = "auto"  # where it is measured
ROWS = ()  # names of rows, or beginnings of them; empty: all
ROUNDS = 5  # pairs of measurements a row, or more
SECONDS = 30.0  # that a row takes at least: the shorter its measurements, the more of them
BACKBONE = "test_resnet"  # of the steps
SMALL = "test_vit"  # of the whole epoch, so small that a loader shows
LARGE = "resnet10t"  # four times the cost of BACKBONE, forward
FROZEN = "resnet34"  # below the head that is trained on one view
BATCH = 64  # chips a batch
PAIRS = {  # of the data set that is simulated for it: long-tailed as the demo set
    "sedan": 900, "SUV": 500, "pickup_truck": 300, "van": 160, "box_truck": 80, "motorcycle": 30, "bus": 15,
}  # fmt: skip
FEW = {name: max(2, count // 12) for name, count in PAIRS.items()}  # for whole runs of 20 epochs
WORKERS = 2  # of the DataLoader
SCALES = (0.875, 1.0, 1.125)  # of the training steps, as in the scripts
STEPS = 21  # of one measurement of a step; a multiple of the number of scales


def main():
    read_settings(globals())
    device = choose_device(DEVICE)
    print(f"\n{machine(device)}\n\n| row | against | measured | required |\n|---|---|---|---|", flush=True)
    short = []
    gc.freeze()  # or collecting what the libraries made stops one side for half a second, now and then
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with contextlib.redirect_stderr(io.StringIO()):
            write_demo("many", train_counts=PAIRS, val_scenes=1, test_scenes=60)
            write_demo("few", train_counts=FEW, val_scenes=1, test_scenes=2)
        for name, against, required, measure in table:
            if ROWS and not name.startswith(tuple(ROWS)):
                continue
            with quiet():
                ratios = ratios_of(measure(device))
            found = statistics.median(ratios)
            spread = f"{found:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {name} | {against} | {spread} | {required:.2f} |", flush=True)
            short += [name] if found < required else []
    if short:
        raise SystemExit(f"falls short: {', '.join(short)}")


def ratios_of(pairs):
    """Their seconds over ours, of ROUNDS pairs or more."""
    started, ratios = time.perf_counter(), []
    while len(ratios) < ROUNDS or time.perf_counter() - started < SECONDS:
        ours, theirs = next(pairs)
        ratios.append(theirs / ours)
    return ratios


# Each measure yields pairs (our seconds, their seconds) for the same work, without end.


def input_at(size):
    def measure(device):
        pairs = find_pairs("many")
        store = ChipStore(open_store(pairs.eo, "chips"), device)
        stream = WeightedStream(pairs.labels, BATCH, 0.5, 0)
        feed = Feed(stream, np.arange(len(store)), pairs.labels, device, store)
        loader = folder_loader(size)

        def ours():
            for step in range(len(loader)):
                views, _, chips = feed(step)
                channels_last(resize(jitter(normalise(turn(chips, views), 0.4, 0.12), 0.3), size))

        def theirs():
            for images, labels in loader:
                images.to(device), labels.to(device)

        theirs()  # starts the workers
        return alternate(ours, theirs, device)

    return measure


def pretrain_step(device):
    """The script's own steps in its own loop, against forward, backward and optimizer alone."""
    settings = ["DATA_ROOT=many", f"DEVICE={device}", f"BACKBONE={LARGE}"]
    model, loss_of, options = captured("pretrain.py", *settings)
    network, optimizer = network_of(LARGE, 56, len(PAIRS), device)
    sizes = [scaled(56, scale) for scale in SCALES]
    ready = [channels_last(torch.randn(BATCH, 1, size, size, device=device)) for size in sizes]
    labels = torch.randint(len(PAIRS), (BATCH,), device=device)

    def theirs():
        for images in ready * 2:
            train_step(network, optimizer, images, labels)

    return alternate(lambda: fitted(model, loss_of, options, 6), theirs, device)


def pretrain_epoch(device):
    """A whole epoch of a small network at 64 px, against the same network behind a DataLoader."""
    settings = ["DATA_ROOT=many", f"DEVICE={device}", f"BACKBONE={SMALL}", "IMAGE_SIZE=64", "TRAIN_SCALES=1"]
    model, loss_of, options = captured("pretrain.py", *settings)
    loader = folder_loader(64)
    network, optimizer = network_of(SMALL, 64, len(PAIRS), device)

    def theirs():
        for images, labels in loader:
            train_step(network, optimizer, images[:, :1].to(device), labels.to(device))

    theirs()
    return alternate(lambda: fitted(model, loss_of, options, len(loader)), theirs, device)


def sar_feature_step(device):
    """Cache warm: both are the scripts' own loops."""
    model, loss_of, options = captured("pretrain.py", "DATA_ROOT=many", f"DEVICE={device}")
    teacher("many", BACKBONE, 56)
    student, distilled, more = captured("sar_feature.py", "TEACHER=teacher.pt", f"DEVICE={device}")
    with torch.no_grad():
        for step in range(STEPS):
            distilled(step)
    return alternate(
        lambda: fitted(student, distilled, more), lambda: fitted(model, loss_of, options), device
    )


def twenty_epochs_distilled(backbone):
    def measure(device):
        teacher("few", backbone, 56)
        settings = ["EPOCHS=20", f"DEVICE={device}", f"BACKBONE={BACKBONE}", "TEACHER=teacher.pt"]
        settings += ["INIT="] if backbone != BACKBONE else []
        return alternate(
            lambda: script("sar_feature.py", *settings),
            lambda: script("sar_feature.py", *settings, "CACHE_TEACHER=False"),
            device,
        )

    return measure


def twenty_epochs_of_the_head(all_views, backbone, size):
    def measure(device):
        teacher("few", backbone, size, stage="sar_feature", sensor="SAR")
        settings = ["EPOCHS=20", f"DEVICE={device}", "STUDENT=teacher.pt", f"ALL_VIEWS={all_views}"]

        def every_step():
            with mock.patch("utils.train.frozen.FrozenCache", lambda answer, *rest, **options: answer):
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
    ready = [channels_last(to_input(store[0:256], size, 0.4, 0.12)) for size in sizes]

    @torch.no_grad()
    def theirs():
        for images in ready * (len(views) // len(ready)):
            with autocast(device):
                model(images)

    def ours():
        predict(model, store, 56, (0.4, 0.12), views, 256)

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
    """Seconds of work(), or those that it tells itself."""
    if device.type != "cuda":
        started = time.perf_counter()
        return work() or time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    told = work()
    last.record()
    torch.cuda.synchronize()
    return told or first.elapsed_time(last) / 1000


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


def teacher(root, backbone, size, stage="pretrain", sensor="EO"):
    """Write teacher.pt: a checkpoint of an untrained network, which is as fast as a trained one."""
    pairs = find_pairs(root)
    model = Classifier(backbone, len(pairs.classes), size)
    save_checkpoint("teacher.pt", {
        "stage": stage, "sensor": sensor, "settings": {}, "backbone": backbone, "image_size": size,
        "classes": pairs.classes, "class_ids": pairs.class_ids, "counts": pairs.counts,
        "scales": (1.0,), "grey": (0.4, 0.12), "data_root": root, "val_fraction": 0.1,
        "model": model.state_dict(),
    })  # fmt: skip


def script(name, *settings):
    """Seconds of a script from the chips in their place to the last step, without validation and files."""
    started = time.perf_counter()

    def place(*arguments):
        nonlocal started
        stores = place_stores(*arguments)
        started = time.perf_counter()
        return stores

    with (
        training_alone(),
        mock.patch("data.store.place_stores", place),
        mock.patch.object(sys, "argv", [name, *settings]),
    ):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return time.perf_counter() - started


def captured(name, *settings):
    """The model, loss_of and options that a script hands to its training loop."""
    with mock.patch("utils.train.loop.fit") as loop:
        script(name, *settings)
    (model, loss_of, _), options = loop.call_args
    return model, loss_of, options


def fitted(model, loss_of, options, steps=STEPS):
    """Seconds of the steps of one epoch in the scripts' training loop."""
    with training_alone():
        (row,) = fit(model, loss_of, unvalidated, **options | {"epochs": 1, "steps": steps})
    return steps * BATCH / row["images/s"]


@contextlib.contextmanager
def training_alone():
    with (
        mock.patch("utils.train.loop.save_checkpoint"),
        mock.patch("utils.train.loop.plot_history"),
        mock.patch("utils.train.validation.validation", lambda *_: unvalidated),
    ):
        yield


def unvalidated(model):
    return {"accuracy": 0.0, "mean per-class accuracy": 0.0}


def decoded(paths):
    for path in paths:
        with Image.open(path) as image:
            np.asarray(image)


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def machine(device):
    """What it was measured on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


loader_name = f"ImageFolder + DataLoader({WORKERS} workers)"
each_step = "backbone at every step"
table = (
    ("input at 224 px, images/s", loader_name, 8, input_at(224)),
    ("input at 64 px, images/s", loader_name, 20, input_at(64)),
    (f"pretrain.py step, {LARGE}, images/s", "forward, backward, optimizer alone", 0.97, pretrain_step),
    (f"pretrain.py, whole epoch, {SMALL} at 64 px", loader_name, 1.5, pretrain_epoch),
    ("sar_feature.py step, cache warm", "pretrain.py step", 0.90, sar_feature_step),
    ("sar_feature.py, 20 epochs, teacher = student", "no cache", 1.15, twenty_epochs_distilled(BACKBONE)),
    (f"sar_feature.py, 20 epochs, teacher {LARGE}", "no cache", 1.5, twenty_epochs_distilled(LARGE)),
    ("finetune.py, 20 epochs, one view", each_step, 15, twenty_epochs_of_the_head(False, FROZEN, 56)),
    ("finetune.py, 20 epochs, eight views", each_step, 2, twenty_epochs_of_the_head(True, LARGE, 40)),
    ("results.py, views x chips/s", "forward on ready batches", 0.90, prediction),
    ("store build, images/s", "bare PIL decode on the same cores", 0.9, store_build),
)


if __name__ == "__main__":
    run(main)
