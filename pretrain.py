"""Stage 1: train an EO image classifier with focal loss and weighted sampling.

python pretrain.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

from data.augment import Augmentation
from data.batches import Batches
from data.demo import ensure_demo
from data.entities import find_entities
from data.layouts import find_pairs, find_unpaired
from data.sampler import WeightedStream
from data.split import choose_training
from data.store import MemoryBudget, choose_reading, grey_statistics, open_store, place_stores, unreadable
from models.backbone import Classifier
from models.focal import focal_loss
from utils.predict.tta import all_views, scaled
from utils.run.device import choose_device, compile_backbone
from utils.run.identity import made_from
from utils.run.ranks import rank, total_weight, world_size
from utils.run.resume import Run
from utils.run.settings import check, read_settings
from utils.run.start import run as run_script
from utils.train.learner import Learner, Optimization
from utils.train.loop import fit
from utils.train.validation import Validation, labelled_chips, unseen_pairs

import numpy as np
import torch

# Ranges and choices of the constants: utils/run/rules.py
DATA_ROOT = "datasets/demo"  # folder of the data set; the default is simulated on first use
CLASSES = ()  # class folders in the order of their index; empty: official or alphabetical order
ENTITIES = ""  # CSV with the columns chip,entity: which pairs show the same object; empty: found in the EO chips
OUT_DIR = "runs/pretrain"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
SENSOR = "EO"  # "EO" as in the method; "SAR" trains the plain baseline without a teacher
GREY_RANGE = ()  # two numbers: black and white of files with more than 8 bits; empty: taken from the data set
BACKBONE = "test_resnet"  # any timm model; resnet18 or larger on a GPU
WEIGHTS = ""  # "" from scratch, "timm" from the hub, or a file of weights
IMAGE_SIZE = 56  # side of the network's input, px; larger is slower and may be better
VAL_FRACTION = 0.1  # share of the training pairs that a stage without labelled val/ chips leaves out to validate on
EPOCHS = 32  # passes over as many chips as there are
BATCH_SIZE = 64  # chips a step, on every rank
OPTIMIZER = "adamw"  # any name of timm.optim.list_optimizers()
LEARNING_RATE = 2e-3  # at the peak of the schedule; lower it for pretrained weights
WEIGHT_DECAY = 0.05  # of the optimizer; higher regularises more
WARMUP_EPOCHS = 1.0  # epochs of linear rise before the cosine descent
CLIP = 1.0  # largest norm of the gradient; 0 = no limit
EMA = 0.0  # decay of an average of the weights that is saved instead, such as 0.999; 0 = none
GAMMA = 2.0  # of the focal loss; 0 = cross-entropy, higher counts easy chips less
CLASS_WEIGHTS = (1.0,)  # alpha of the focal loss: one for all, or one per class
BALANCE = 0.5  # chips drawn with probability count^-BALANCE: 1 = classes equal, 0 = as they are
BALANCE_ENTITIES = 0.0  # the same within a class: 1 = its entities equally often, 0 = its chips
JITTER = 0.3  # random contrast and brightness, in standard deviations of the grey level
SPECKLE = 0.0  # random multiplicative noise, relative to the grey level
ROTATION = 0.0  # random rotation by up to so many degrees either way, beyond the quarter turns
TRAIN_SCALES = (0.875, 1.0, 1.125)  # input sizes relative to IMAGE_SIZE that the steps take in turn
SEED = 0  # fixes everything random
RESUME = True  # go on with a run that was stopped; False starts anew and keeps the old run beside it
SAVE_EVERY_MIN = 10.0  # minutes between two writings of last.pt within an epoch
MAX_BAD_STEPS = 20  # steps in a row without a finite loss that end the run
TENSORBOARD = False  # True writes event files as well, where tensorboard is installed
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
CHIP_MEMORY_GB = 0.0  # GiB of the device's memory for chips and caches, else host or disk; 0 = half the free
COMPILE = False  # True: torch.compile, for long runs on a GPU; a minute's wait, no gain on a CPU


def main():
    settings = read_settings(globals())
    device, run = choose_device(DEVICE), Run("pretrain", settings)
    following = ("sar_feature.py", "TEACHER") if SENSOR == "EO" else ("results.py", "CHECKPOINT")
    torch.manual_seed(SEED)

    # Data and model. Only SAR has labelled validation chips; where there are none, pairs are held out to validate on.
    ensure_demo(DATA_ROOT)
    pairs = find_pairs(DATA_ROOT, CLASSES)
    classes = len(pairs.classes)
    check(len(CLASS_WEIGHTS) in (1, classes), f"CLASS_WEIGHTS needs 1 or {classes} numbers")
    sizes = [scaled(IMAGE_SIZE, scale) for scale in TRAIN_SCALES]
    model = Classifier(BACKBONE, classes, IMAGE_SIZE, WEIGHTS)
    model.to(device, memory_format=torch.channels_last).check_sizes(sizes)
    unpaired, further = find_unpaired(DATA_ROOT, pairs.classes) if SENSOR == "EO" else ([], np.zeros(0, int))
    paths = pairs.eo + unpaired if SENSOR == "EO" else pairs.sar
    side, grey_range = reading = choose_reading(paths, GREY_RANGE)
    chips = open_store(paths, STORE_DIR, SKIP_BAD, *reading)
    budget = MemoryBudget(device, CHIP_MEMORY_GB)
    (store,) = place_stores(budget, chips)
    labelled = labelled_chips(DATA_ROOT, pairs, reading, budget, STORE_DIR, SKIP_BAD) if SENSOR == "SAR" else None
    eo_reading = reading if SENSOR == "EO" else ()
    entities = find_entities(pairs, STORE_DIR, SKIP_BAD, ENTITIES, eo_reading)
    train = choose_training(pairs, entities, 0.0 if labelled else VAL_FRACTION, unreadable(chips), further=further)
    grey = grey_statistics(chips, train.indices)

    stream = WeightedStream(train.labels, run.batch_size, BALANCE, SEED, train.entities, BALANCE_ENTITIES)
    of_train = store.subset(train.indices), [paths[i] for i in train.indices]
    batches = Batches(stream, train.labels, device, EPOCHS, *of_train, (rank(), world_size()))
    augment = Augmentation(grey, JITTER, SPECKLE, ROTATION, sizes)
    alpha = torch.tensor(CLASS_WEIGHTS, device=device) if len(CLASS_WEIGHTS) > 1 else None

    def loss_of(batch):
        logits = model(augment(batch))
        total = None if alpha is None else total_weight(alpha[batch.labels], batches.size)
        return focal_loss(logits, batch.labels, GAMMA, alpha, total), logits, batch.labels

    counts = np.bincount(np.concatenate((pairs.labels, further)), minlength=classes).tolist()
    contents = {
        "sensor": SENSOR, "backbone": BACKBONE, "image_size": IMAGE_SIZE, "chip_side": side,
        "grey_range": grey_range, "classes": pairs.classes, "class_ids": pairs.class_ids, "counts": counts,
        "grey": grey, "scales": TRAIN_SCALES, "views": all_views(TRAIN_SCALES),
        "ood": {}, "validation": {}, "data_root": DATA_ROOT, "entities": ENTITIES, "val_fraction": VAL_FRACTION,
        "labelled_share": 1.0, "eo_reading": eo_reading, "held_out": unseen_pairs(pairs, train),
    }  # fmt: skip
    optimization = Optimization(LEARNING_RATE, WEIGHT_DECAY, WARMUP_EPOCHS, CLIP, EMA, SEED, OPTIMIZER)
    held_out = store.subset(train.held_out), pairs.labels[train.held_out]
    validate = Validation(*(labelled or held_out), IMAGE_SIZE, grey)
    if not run.begin(made_from(__file__, pairs, [chips], entities, labelled, WEIGHTS, further=further)):
        return run.announce(*following)
    if COMPILE:
        compile_backbone(model, device)
    learner = Learner(model, loss_of, batches, optimization)
    fit(learner, batches, validate, run, contents)
    run.announce(*following)


if __name__ == "__main__":
    run_script(main)
