"""Stage 3: freeze the distilled backbone and train the head alone, every class equally often.

python finetune.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

import math
from functools import partial
from itertools import chain, product

from data.augment import VIEWS
from data.batches import Feed
from data.layouts import find_pairs, find_validation
from data.sampler import BalancedStream, WeightedStream, few_of_each, stratified_split
from data.store import open_store, place_stores, unreadable
from models.focal import focal_loss
from utils.predict.ood import fit_gaussians
from utils.predict.tta import scaled, view_features
from utils.run.checkpoint import build_model, load_checkpoint
from utils.run.ranks import equal_share, gathered, part, rank
from utils.run.resume import chips_a_step, made_from
from utils.run.settings import check_values, read_settings, run
from utils.train.frozen import FrozenCache
from utils.train.loop import announce, choose_device, fit
from utils.train.validation import validation

import numpy as np
import torch
from tqdm import tqdm

STUDENT = "runs/sar_feature/best.pt"  # SAR checkpoint of sar_feature.py
DATA_ROOT = ""  # folder of the data set; empty: the student's
OUT_DIR = "runs/finetune"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
EPOCHS = 10  # passes over as many chips as there are
BATCH_SIZE = 64  # chips a step, on every rank
LEARNING_RATE = 1e-3  # at the peak of the schedule
WEIGHT_DECAY = 0.05  # of AdamW; higher keeps the head smaller
BALANCED = True  # True draws every class equally often, False the chips as they are
NEW_HEAD = False  # True trains the head from new, False from where it is
GAMMA = 0.0  # of the focal loss; 0 = cross-entropy
GAUSSIAN_CHIPS = 1000  # most chips of a class that show how its features are spread
ALL_VIEWS = True  # True: all flips, rotations and trained scales of a chip; False: the chip as it is
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
    check_values(settings)
    device = choose_device(DEVICE)
    torch.manual_seed(SEED)
    batch = chips_a_step(OUT_DIR, settings)

    source = load_checkpoint(STUDENT, "sar_feature.py", sensor="SAR")
    root = DATA_ROOT or source["data_root"]
    pairs = find_pairs(root, source["classes"])
    labelled = find_validation(root, pairs.classes)
    model = build_model(source, STUDENT).freeze().to(device, memory_format=torch.channels_last)
    chips = open_store(pairs.sar, STORE_DIR, SKIP_BAD)
    train, held_out = stratified_split(pairs.labels, source["val_fraction"], unreadable(chips))
    (sar,) = place_stores(device, CHIP_MEMORY_GB, chips)
    draws = BalancedStream if BALANCED else partial(WeightedStream, balance=0.0)
    stream = draws(pairs.labels[train], batch, seed=SEED)
    feed = Feed(stream, train, pairs.labels, device, part=part())
    steps = math.ceil(len(train) / batch)

    if NEW_HEAD:
        model.head.reset_parameters()
    # At every scale that the student knows, one a step, or the head would forget the others.
    scales = source["scales"] if ALL_VIEWS else (1.0,)
    turns = range(VIEWS if ALL_VIEWS else 1)

    def draw(step):
        chosen, views = feed.draw(step)
        return chosen, views % len(turns)

    # The frozen backbone gives the same features in every epoch: they are computed once.
    known = train[few_of_each(pairs.labels[train], GAUSSIAN_CHIPS)]
    mine = known[equal_share(len(known))]
    fitted = [(mine, np.full(len(mine), view)) for view in turns]

    def features_at(first, scale):
        requests = chain(fitted, map(draw, range(first, EPOCHS * steps, len(scales))))
        see = partial(view_features, model, sar, scaled(source["image_size"], scale), source["grey"])
        return FrozenCache(see, requests, len(pairs.labels), BATCH_SIZE, device, memory_gb=CHIP_MEMORY_GB)

    features = list(map(features_at, range(len(scales)), scales))
    views = tqdm(list(product(features, fitted)), desc="features", unit=" views", disable=rank() > 0)
    mean = sum(seen(*request).float() for seen, request in views) / len(views)
    counts = np.bincount(pairs.labels[train], minlength=len(pairs.classes))
    gaussians = fit_gaussians(gathered(mean, len(known)).cpu(), pairs.labels[known], counts)

    def loss_of(step):
        _, truth = feed(step)
        logits = model.head(features[step % len(scales)](*draw(step)))
        return focal_loss(logits, truth, GAMMA), logits, truth

    checkpoint = source | {
        "stage": "finetune", "settings": settings, "data_root": root, "gaussians": gaussians,
        "made_from": made_from(pairs, source),
    }  # fmt: skip
    fit(
        model, loss_of, validation(checkpoint, sar, pairs.labels, held_out, labelled, STORE_DIR, SKIP_BAD),
        epochs=EPOCHS, steps=steps, batch=batch, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        seed=SEED, out_dir=OUT_DIR, checkpoint=checkpoint, compiled=COMPILE, resume=RESUME,
        save_every_min=SAVE_EVERY_MIN, max_bad_steps=MAX_BAD_STEPS, tensorboard=TENSORBOARD,
        chips_of=partial(feed.names, pairs.sar),
    )  # fmt: skip
    announce(OUT_DIR, "python results.py")


if __name__ == "__main__":
    run(main)
