"""Stage 2: distil the frozen EO teacher into a SAR classifier over co-registered pairs.

python sar_feature.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

import math
from functools import partial

from data.augment import jitter, normalise, resize, speckle, turn
from data.batches import Feed
from data.layouts import find_pairs, find_validation
from data.sampler import WeightedStream, stratified_split
from data.store import grey_statistics, open_store, place_stores, unreadable
from models.backbone import Classifier
from models.distillation import distillation_loss
from models.focal import focal_loss
from utils.predict.tta import autocast, scaled, view_features
from utils.run.checkpoint import build_model, load_checkpoint
from utils.run.ranks import part
from utils.run.resume import chips_a_step, made_from
from utils.run.settings import check, check_values, read_settings, run
from utils.train.frozen import FrozenCache
from utils.train.loop import announce, choose_device, fit
from utils.train.validation import validation

import torch
from torch import nn

TEACHER = "runs/pretrain/best.pt"  # EO checkpoint of pretrain.py
DATA_ROOT = ""  # folder of the data set; empty: the teacher's
OUT_DIR = "runs/sar_feature"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
BACKBONE = ""  # any timm model for the student; empty: the teacher's
INIT = "teacher"  # the student's first weights: "teacher", "" from scratch, "timm", or a file
EPOCHS = 10  # passes over as many pairs as there are
BATCH_SIZE = 64  # pairs a step, on every rank
LEARNING_RATE = 2e-3  # at the peak of the schedule
WEIGHT_DECAY = 0.05  # of AdamW; higher regularises more
WARMUP_EPOCHS = 1.0  # epochs of linear rise before the cosine descent
CLIP = 1.0  # largest norm of the gradient; 0 = no limit
EMA = 0.0  # decay of an average of the weights that is saved instead, such as 0.999; 0 = none
TEMPERATURE = 2.0  # T of the class distributions; higher shows more of the teacher's doubts
KL_WEIGHT = 1.0  # of T^2 KL(teacher || student) on the class distributions
FEATURE_WEIGHT = 0.0  # of the same on the softened feature distributions of the two sensors
FEATURE_TEMPERATURE = 1.0  # T of the feature distributions
LABEL_WEIGHT = 1.0  # of the focal loss on the true labels
GAMMA = 2.0  # of the focal loss; 0 = cross-entropy
BALANCE = 1.0  # pairs drawn with probability count^-BALANCE: 1 = classes equal, 0 = as they are
JITTER = 0.3  # random contrast and brightness of the SAR chip, in standard deviations
SPECKLE = 0.1  # random multiplicative noise on the SAR chip, relative to the grey level
TRAIN_SCALES = (0.875, 1.0, 1.125)  # input sizes of the student that the steps take in turn
CACHE_TEACHER = True  # True asks the teacher once for each chip and view, False at every step
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

    source = load_checkpoint(TEACHER, "pretrain.py", sensor="EO", stages=("pretrain",))
    backbone, size = BACKBONE or source["backbone"], source["image_size"]
    check(
        INIT != "teacher" or backbone == source["backbone"],
        f"a student {backbone} cannot start from a teacher {source['backbone']}; set INIT=",
    )
    root = DATA_ROOT or source["data_root"]
    pairs = find_pairs(root, source["classes"])
    labelled = find_validation(root, pairs.classes)

    teacher = build_model(source, TEACHER).requires_grad_(False).to(device, memory_format=torch.channels_last)
    student = Classifier(backbone, len(pairs.classes), size, "" if INIT == "teacher" else INIT)
    if INIT == "teacher":
        student.load_state_dict(teacher.state_dict())
    student.to(device, memory_format=torch.channels_last)
    student.check_sizes([scaled(size, scale) for scale in TRAIN_SCALES])
    same = student.width == teacher.width or not FEATURE_WEIGHT
    project = (nn.Identity() if same else nn.Linear(student.width, teacher.width)).to(device)

    eo_chips, sar_chips = (open_store(paths, STORE_DIR, SKIP_BAD) for paths in (pairs.eo, pairs.sar))
    without = unreadable(eo_chips), unreadable(sar_chips)
    train, held_out = stratified_split(pairs.labels, source["val_fraction"], *without)
    eo_grey, sar_grey = source["grey"], grey_statistics(sar_chips, train)
    eo, sar = place_stores(device, CHIP_MEMORY_GB, eo_chips, sar_chips)
    stream = WeightedStream(pairs.labels[train], batch, BALANCE, SEED)
    feed = Feed(stream, train, pairs.labels, device, sar, part=part())
    steps = math.ceil(len(train) / batch)

    @torch.no_grad()
    def teach(chosen, views):
        """The teacher's features and logits side by side, [B, D + C]; where only KL asks, the logits."""
        taught = view_features(teacher, eo, size, eo_grey, chosen, views)
        with autocast(device):
            target = teacher.head(taught)
        return torch.cat((taught, target), 1) if FEATURE_WEIGHT else target

    # One view for both chips of a pair, or the teacher would speak of another picture.
    lessons = teach
    if CACHE_TEACHER:
        requests = (feed.draw(step) for step in range(EPOCHS * steps))
        lessons = FrozenCache(
            teach, requests, len(pairs.labels), BATCH_SIZE, device, torch.float16, CHIP_MEMORY_GB
        )

    def loss_of(step):
        views, truth, drawn = feed(step)
        images = normalise(turn(drawn, views), *sar_grey)
        images = jitter(speckle(images, SPECKLE, *sar_grey, feed.rows), JITTER, feed.rows)
        images = resize(images, scaled(size, TRAIN_SCALES[step % len(TRAIN_SCALES)]))
        taught, target = lessons(*feed.draw(step)).tensor_split((-len(pairs.classes),), dim=1)
        features = student.features(images.to(memory_format=torch.channels_last))
        logits = student.head(features)
        loss = KL_WEIGHT * distillation_loss(logits, target, TEMPERATURE)
        if FEATURE_WEIGHT:
            loss = loss + FEATURE_WEIGHT * distillation_loss(project(features), taught, FEATURE_TEMPERATURE)
        if LABEL_WEIGHT:
            loss = loss + LABEL_WEIGHT * focal_loss(logits, truth, GAMMA)
        return loss, logits, truth

    checkpoint = source | {
        "stage": "sar_feature", "sensor": "SAR", "settings": settings, "backbone": backbone,
        "scales": TRAIN_SCALES, "grey": sar_grey, "data_root": root,
        "made_from": made_from(pairs, source),
    }  # fmt: skip
    fit(
        student, loss_of, validation(checkpoint, sar, pairs.labels, held_out, labelled, STORE_DIR, SKIP_BAD),
        epochs=EPOCHS, steps=steps, batch=batch, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        warmup_epochs=WARMUP_EPOCHS, clip=CLIP, ema=EMA, seed=SEED, also_trained=[project],
        out_dir=OUT_DIR, checkpoint=checkpoint, compiled=COMPILE, resume=RESUME,
        save_every_min=SAVE_EVERY_MIN, max_bad_steps=MAX_BAD_STEPS, tensorboard=TENSORBOARD,
        chips_of=partial(feed.names, pairs.sar),
    )  # fmt: skip
    announce(OUT_DIR, "python finetune.py")


if __name__ == "__main__":
    run(main)
