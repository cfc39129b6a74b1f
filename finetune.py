"""Stage 3: freeze the distilled backbone and train the head alone, every class equally often.

python finetune.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

from functools import partial
from itertools import chain, product

from data.augment import VIEWS
from data.batches import Batches
from data.entities import find_entities
from data.layouts import find_pairs
from data.sampler import BalancedStream, WeightedStream
from data.split import choose_training, few_of_each
from data.store import MemoryBudget, open_store, place_stores, unreadable
from models.focal import focal_loss
from utils.predict.ood import fit_scores
from utils.predict.tta import IDENTITY, all_views, scaled, scales_of, view_features
from utils.run.checkpoint import build_model, choose_data_root, choose_entities, load_checkpoint
from utils.run.device import choose_device, compile_backbone
from utils.run.identity import made_from
from utils.run.ranks import gather_over_ranks, rank, share_of_rank, world_size
from utils.run.resume import Run
from utils.run.settings import check, read_settings
from utils.run.start import run as run_script
from utils.train.feature_cache import FrozenCache
from utils.train.learner import Learner, Optimization
from utils.train.loop import fit
from utils.train.validation import Validation, labelled_chips, unseen_pairs

import numpy as np
import torch
from tqdm import tqdm

# Ranges and choices of the constants: utils/run/rules.py
STUDENT = "runs/sar_feature/best.pt"  # SAR checkpoint of sar_feature.py
DATA_ROOT = ""  # folder of the data set; empty: the student's
ENTITIES = ""  # CSV with the columns chip,entity: which pairs show the same object; empty: the student's
OUT_DIR = "runs/finetune"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
EPOCHS = 10  # passes over as many chips as there are
BATCH_SIZE = 64  # chips a step, on every rank
OPTIMIZER = "adamw"  # any name of timm.optim.list_optimizers()
LEARNING_RATE = 1e-3  # at the peak of the schedule
WEIGHT_DECAY = 0.05  # of the optimizer; higher keeps the head smaller
BALANCED = True  # True draws every class equally often, False the chips as they are
BALANCE_ENTITIES = 0.0  # within a class: 1 draws its entities equally often, 0 its chips, between by count^-b
NEW_HEAD = False  # True trains the head from new, False from where it is
GAMMA = 0.0  # of the focal loss; 0 = cross-entropy
OOD_CHIPS = 1000  # most chips of a class that the out-of-distribution scores are fitted on
BACKGROUND = 0.75  # of the Gaussian energy: share of all chips' log density taken off each class's; 0 = none
ALL_VIEWS = True  # True: all flips, rotations and trained scales of a chip; False: the chip as it is
CHOOSE_SCALES = True  # True: results.py leaves out scales that clearly cost accuracy in validation; False: keeps all
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
    device, run = choose_device(DEVICE), Run("finetune", settings)
    torch.manual_seed(SEED)

    source = load_checkpoint(STUDENT, "sar_feature.py", sensor="SAR")
    check(
        source["labelled_share"] > 0,
        f"{STUDENT} was trained without labels, so there are none to train the head on: go on with "
        f"python results.py CHECKPOINT={STUDENT}",
    )
    size, grey = source["image_size"], source["grey"]
    root = choose_data_root(DATA_ROOT, source, STUDENT)
    pairs = find_pairs(root, source["classes"], source["class_ids"])
    model = build_model(source, STUDENT).freeze().to(device, memory_format=torch.channels_last)
    reading = source["chip_side"], source["grey_range"]
    chips = open_store(pairs.sar, STORE_DIR, SKIP_BAD, *reading)
    budget = MemoryBudget(device, CHIP_MEMORY_GB)
    (sar,) = place_stores(budget, chips)
    labelled = labelled_chips(root, pairs, reading, budget, STORE_DIR, SKIP_BAD)
    listed = choose_entities(ENTITIES, source, STUDENT)
    entities = find_entities(pairs, STORE_DIR, SKIP_BAD, listed, source["eo_reading"])
    fraction, share = 0.0 if labelled else source["val_fraction"], source["labelled_share"]
    train = choose_training(pairs, entities, fraction, unreadable(chips), labelled_share=share).labelled()
    labels, sar_train = train.labels, sar.subset(train.indices)
    counts = np.bincount(labels, minlength=len(pairs.classes))
    check(
        counts.max() > 1,
        "no class has two labelled chips, which the OOD scores need; add pairs, or train the student with a larger "
        "LABELLED_SHARE",
    )
    by_entity = train.entities, BALANCE_ENTITIES
    stream = (
        BalancedStream(labels, run.batch_size, SEED, *by_entity) if BALANCED
        else WeightedStream(labels, run.batch_size, 0.0, SEED, *by_entity)
    )  # fmt: skip
    paths = [pairs.sar[i] for i in train.indices]
    batches = Batches(stream, labels, device, EPOCHS, paths=paths, ranks=(rank(), world_size()))

    scales, views = (source["scales"], VIEWS) if ALL_VIEWS else ((1.0,), 1)
    held_out = sar.subset(train.held_out), pairs.labels[train.held_out]
    validate = Validation(*(labelled or held_out), size, grey, all_views(scales) if ALL_VIEWS else IDENTITY)
    if not run.begin(made_from(__file__, pairs, [chips], entities, labelled, source=source)):
        return run.announce("results.py", "CHECKPOINT")
    if CHOOSE_SCALES:
        validate.leave_out_scales(model)
    if NEW_HEAD:  # only now: the scales are compared by the head of the student
        model.head.reset_parameters()
    unseen = unseen_pairs(pairs, train, source, STUDENT)
    contents = source | {"data_root": root, "entities": listed, "views": validate.views, "held_out": unseen}

    # The frozen backbone gives the same features in every epoch: they are computed once, at every
    # scale that the student knows. A step takes one of them, or the head would forget the others.
    fitted_on = few_of_each(labels, OOD_CHIPS)  # the chips that the OOD scores are fitted on
    of_rank = fitted_on[share_of_rank(len(fitted_on))]
    in_views = [(of_rank, np.full(len(of_rank), view)) for view in range(views)]

    def features_at(first, scale):
        """Cached features at a scale, which the steps first, first + len(scales), ... take."""
        drawn = ((indices, drawn_views % views) for indices, drawn_views in batches.draws(first, len(scales)))
        features = partial(view_features, model, sar_train, scaled(size, scale), grey)
        return FrozenCache(features, chain(in_views, drawn), len(labels), BATCH_SIZE, budget, STORE_DIR)

    features = [features_at(first, scale) for first, scale in enumerate(scales)]
    of_scale = dict(zip(scales, features, strict=True))  # TRAIN_SCALES may name a scale twice
    chosen = [of_scale[scale] for scale in scales_of(validate.views)]
    requests = tqdm(list(product(chosen, in_views)), desc="features", unit=" views", disable=rank() > 0 or None)
    mean = sum(at_scale(*request).float() for at_scale, request in requests) / len(requests)
    mean = gather_over_ranks(mean, len(fitted_on)).cpu()
    contents["ood"] = fit_scores(mean, labels[fitted_on], counts, BACKGROUND)
    contents["validation"] = validate.sample(model, OOD_CHIPS)
    if labelled:  # pairs that were held out do not say how often a class is in the test
        in_val = np.bincount(labelled[1], minlength=len(pairs.classes))
        contents["validation"]["counts"] = torch.from_numpy(in_val)

    def loss_of(batch):
        at_scale = features[batch.step % len(scales)]
        logits = model.head(at_scale(batch.indices, batch.host_views % views))
        return focal_loss(logits, batch.labels, GAMMA), logits, batch.labels

    if COMPILE:
        compile_backbone(model, device)
    optimization = Optimization(LEARNING_RATE, WEIGHT_DECAY, seed=SEED, optimizer=OPTIMIZER)
    learner = Learner(model, loss_of, batches, optimization)
    fit(learner, batches, validate, run, contents)
    run.announce("results.py", "CHECKPOINT")


if __name__ == "__main__":
    run_script(main)
