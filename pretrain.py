"""Stage 1: train an EO image classifier with focal loss and weighted sampling.

python pretrain.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

import math
from functools import partial

from data.augment import jitter, normalise, resize, speckle, turn
from data.batches import Feed
from data.demo.writer import ensure_demo
from data.layouts import find_pairs, find_validation
from data.sampler import WeightedStream, stratified_split
from data.store import grey_statistics, open_store, place_stores, unreadable
from models.backbone import Classifier
from models.focal import focal_loss
from utils.predict.tta import scaled
from utils.run.ranks import part
from utils.run.resume import chips_a_step, made_from
from utils.run.settings import check, check_values, read_settings, run
from utils.train.loop import announce, choose_device, fit
from utils.train.validation import validation

import torch

DATA_ROOT = "datasets/demo"  # folder of the data set; the default is simulated on first use
CLASSES = ()  # class folders in the order of their index; empty: official or alphabetical order
OUT_DIR = "runs/pretrain"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
SENSOR = "EO"  # "EO" as in the method; "SAR" trains the plain baseline without a teacher
BACKBONE = "test_resnet"  # any timm model; resnet18 or larger on a GPU
WEIGHTS = ""  # "" from scratch, "timm" from the hub, or a file of weights
IMAGE_SIZE = 56  # side of the network's input, px; larger is slower and may be better
VAL_FRACTION = 0.1  # share of the training pairs that all stages leave out to validate on
EPOCHS = 16  # passes over as many chips as there are
BATCH_SIZE = 64  # chips a step, on every rank
LEARNING_RATE = 2e-3  # at the peak of the schedule; lower it for pretrained weights
WEIGHT_DECAY = 0.05  # of AdamW; higher regularises more
WARMUP_EPOCHS = 1.0  # epochs of linear rise before the cosine descent
CLIP = 1.0  # largest norm of the gradient; 0 = no limit
EMA = 0.0  # decay of an average of the weights that is saved instead, such as 0.999; 0 = none
GAMMA = 2.0  # of the focal loss; 0 = cross-entropy, higher counts easy chips less
CLASS_WEIGHTS = (1.0,)  # alpha of the focal loss: one for all, or one per class
BALANCE = 0.5  # chips drawn with probability count^-BALANCE: 1 = classes equal, 0 = as they are
JITTER = 0.3  # random contrast and brightness, in standard deviations of the grey level
SPECKLE = 0.0  # random multiplicative noise, relative to the grey level
TRAIN_SCALES = (0.875, 1.0, 1.125)  # input sizes relative to IMAGE_SIZE that the steps take in turn
SEED = 0  # fixes everything random
RESUME = True  # go on with a run that was stopped; False starts anew and keeps the old run beside it
SAVE_EVERY_MIN = 10.0  # minutes between two writings of last.pt within an epoch
MAX_BAD_STEPS = 20  # steps in a row without a finite loss that end the run
TENSORBOARD = False  # True writes event files as well, where tensorboard is installed
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
CHIP_MEMORY_GB = 0.0  # GiB of the device's memory for chips, else the host's or the disk; 0 = half the free
COMPILE = False  # True: torch.compile, for long runs on a GPU; a minute's wait, no gain on a CPU


def main():
    settings = read_settings(globals())
    check(SENSOR in ("EO", "SAR"), f"SENSOR is EO or SAR, not {SENSOR!r}")
    check_values(settings)
    device = choose_device(DEVICE)
    torch.manual_seed(SEED)
    batch = chips_a_step(OUT_DIR, settings)

    ensure_demo(DATA_ROOT)
    pairs = find_pairs(DATA_ROOT, CLASSES)
    classes = len(pairs.classes)
    check(len(CLASS_WEIGHTS) in (1, classes), f"CLASS_WEIGHTS needs 1 or {classes} numbers")
    # Only SAR has labelled validation chips; without them a part of the pairs serves.
    labelled = find_validation(DATA_ROOT, pairs.classes) if SENSOR == "SAR" else None
    model = Classifier(BACKBONE, classes, IMAGE_SIZE, WEIGHTS)
    model.to(device, memory_format=torch.channels_last)
    model.check_sizes([scaled(IMAGE_SIZE, scale) for scale in TRAIN_SCALES])
    paths = pairs.eo if SENSOR == "EO" else pairs.sar
    chips = open_store(paths, STORE_DIR, SKIP_BAD)
    train, held_out = stratified_split(pairs.labels, VAL_FRACTION, unreadable(chips))
    mean, std = grey_statistics(chips, train)
    (store,) = place_stores(device, CHIP_MEMORY_GB, chips)
    stream = WeightedStream(pairs.labels[train], batch, BALANCE, SEED)
    feed = Feed(stream, train, pairs.labels, device, store, part=part())
    alpha = torch.tensor(CLASS_WEIGHTS, device=device) if len(CLASS_WEIGHTS) > 1 else None

    def loss_of(step):
        views, truth, drawn = feed(step)
        images = normalise(turn(drawn, views), mean, std)
        images = jitter(speckle(images, SPECKLE, mean, std, feed.rows), JITTER, feed.rows)
        images = resize(images, scaled(IMAGE_SIZE, TRAIN_SCALES[step % len(TRAIN_SCALES)]))
        logits = model(images.to(memory_format=torch.channels_last))
        return focal_loss(logits, truth, GAMMA, alpha), logits, truth

    checkpoint = {
        "stage": "pretrain", "sensor": SENSOR, "settings": settings, "backbone": BACKBONE,
        "image_size": IMAGE_SIZE, "classes": pairs.classes, "class_ids": pairs.class_ids,
        "counts": pairs.counts, "scales": TRAIN_SCALES, "grey": (mean, std), "data_root": DATA_ROOT,
        "val_fraction": VAL_FRACTION, "made_from": made_from(pairs),
    }  # fmt: skip
    fit(
        model, loss_of, validation(checkpoint, store, pairs.labels, held_out, labelled, STORE_DIR, SKIP_BAD),
        epochs=EPOCHS, steps=math.ceil(len(train) / batch), batch=batch, learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY, warmup_epochs=WARMUP_EPOCHS, clip=CLIP, ema=EMA, seed=SEED,
        out_dir=OUT_DIR, checkpoint=checkpoint, compiled=COMPILE, resume=RESUME,
        save_every_min=SAVE_EVERY_MIN, max_bad_steps=MAX_BAD_STEPS, tensorboard=TENSORBOARD,
        chips_of=partial(feed.names, paths),
    )  # fmt: skip
    announce(OUT_DIR, "python sar_feature.py" if SENSOR == "EO" else "python results.py")


if __name__ == "__main__":
    run(main)
