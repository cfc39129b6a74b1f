"""Stage 2: distil the frozen EO teacher into a SAR classifier over co-registered pairs.

python sar_feature.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

from data.augment import Augmentation
from data.batches import Batches
from data.entities import find_entities
from data.layouts import find_pairs, find_unlabelled
from data.sampler import WeightedStream
from data.split import choose_training
from data.store import MemoryBudget, choose_reading, grey_statistics, open_store, place_stores, to_device, unreadable
from models.backbone import Classifier
from models.distillation import FEATURE_LOSSES, distillation_loss, match_prior
from models.focal import focal_loss
from utils.predict.tta import all_views, predict, scaled, view_features
from utils.run.checkpoint import build_model, choose_data_root, choose_entities, load_checkpoint
from utils.run.device import choose_device, compile_backbone
from utils.run.identity import made_from
from utils.run.ranks import rank, total_weight, world_size
from utils.run.resume import Run
from utils.run.settings import check, read_settings
from utils.run.start import run as run_script
from utils.train.feature_cache import FrozenCache
from utils.train.learner import Learner, Optimization
from utils.train.loop import fit
from utils.train.validation import Validation, labelled_chips, unseen_pairs

import numpy as np
import torch
from torch import nn

# Ranges and choices of the constants: utils/run/rules.py
TEACHER = "runs/pretrain/best.pt"  # EO checkpoint of pretrain.py
DATA_ROOT = ""  # folder of the data set; empty: the teacher's
ENTITIES = ""  # CSV with the columns chip,entity: which pairs show the same object; empty: the teacher's
OUT_DIR = "runs/sar_feature"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
GREY_RANGE = ()  # two numbers: black and white of SAR files with more than 8 bits; empty: taken from the data set
BACKBONE = ""  # any timm model for the student; empty: the teacher's
INIT = "teacher"  # the student's first weights: "teacher", "" from scratch, "timm", or a file
EPOCHS = 10  # passes over as many pairs as there are
BATCH_SIZE = 64  # pairs a step, on every rank
OPTIMIZER = "adamw"  # any name of timm.optim.list_optimizers()
LEARNING_RATE = 2e-3  # at the peak of the schedule
WEIGHT_DECAY = 0.05  # of the optimizer; higher regularises more
WARMUP_EPOCHS = 1.0  # epochs of linear rise before the cosine descent
CLIP = 1.0  # largest norm of the gradient; 0 = no limit
EMA = 0.0  # decay of an average of the weights that is saved instead, such as 0.999; 0 = none
TEMPERATURE = 2.0  # T of the class distributions; higher shows more of the teacher's doubts
KL_WEIGHT = 1.0  # of T^2 KL(teacher || student) on the class distributions
FEATURE_WEIGHT = 0.0  # of FEATURE_LOSS, which compares the features of the two sensors
FEATURE_LOSS = "kl"  # "kl" of softened features, "relations", "contrastive", "mse", "wasserstein"
FEATURE_TEMPERATURE = 1.0  # T of the feature distributions; about 0.1 for "relations" and "contrastive"
LABEL_WEIGHT = 1.0  # of the focal loss on the true labels
LABELLED_SHARE = 1.0  # of the training pairs of each class whose labels are used; the others teach by KL alone
MATCH_PRIOR = True  # True: the teacher answers as if its classes had been drawn with the student's BALANCE
GAMMA = 2.0  # of the focal loss; 0 = cross-entropy
BALANCE = 1.0  # pairs drawn with probability count^-BALANCE: 1 = classes equal, 0 = as they are
BALANCE_ENTITIES = 0.0  # the same within a class: 1 = its entities equally often, 0 = its chips
JITTER = 0.3  # random contrast and brightness of the SAR chip, in standard deviations
SPECKLE = 0.1  # random multiplicative noise on the SAR chip, relative to the grey level
ROTATION = 0.0  # random rotation by up to so many degrees either way, beyond the quarter turns
TRAIN_SCALES = (0.875, 1.0, 1.125)  # input sizes of the student that the steps take in turn
CACHE_TEACHER = True  # True asks the teacher once for each chip and view, False at every step
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
    device, run = choose_device(DEVICE), Run("sar_feature", settings)
    # Without labels there is no head to train.
    following = ("finetune.py", "STUDENT") if LABELLED_SHARE else ("results.py", "CHECKPOINT")
    torch.manual_seed(SEED)

    source = load_checkpoint(TEACHER, "pretrain.py", sensor="EO", stages=("pretrain",))
    backbone, size = BACKBONE or source["backbone"], source["image_size"]
    check(
        KL_WEIGHT or LABELLED_SHARE and LABEL_WEIGHT or INIT == "teacher",
        "without KL and labels nothing trains the head of a student that does not start from the teacher; set "
        "KL_WEIGHT, LABELLED_SHARE and LABEL_WEIGHT, or INIT=teacher",
    )
    check(
        INIT != "teacher" or backbone == source["backbone"],
        f"a student {backbone} cannot start from a teacher {source['backbone']}; set INIT=",
    )
    root = choose_data_root(DATA_ROOT, source, TEACHER)
    pairs = find_pairs(root, source["classes"], source["class_ids"])

    # The teacher is frozen; the student starts from its weights.
    teacher = build_model(source, TEACHER).requires_grad_(False).to(device, memory_format=torch.channels_last)
    student = Classifier(backbone, len(pairs.classes), size, "" if INIT == "teacher" else INIT)
    if INIT == "teacher":
        student.load_state_dict(teacher.state_dict())
    sizes = [scaled(size, scale) for scale in TRAIN_SCALES]
    student.to(device, memory_format=torch.channels_last).check_sizes(sizes)
    same = student.width == teacher.width or not FEATURE_WEIGHT
    project = (nn.Identity() if same else nn.Linear(student.width, teacher.width)).to(device)

    further_eo, further_sar = find_unlabelled(root)
    eo_paths, sar_paths = pairs.eo + further_eo, pairs.sar + further_sar
    side, grey_range = reading = choose_reading(sar_paths, GREY_RANGE)
    eo_chips = open_store(eo_paths, STORE_DIR, SKIP_BAD, source["chip_side"], source["grey_range"])
    sar_chips = open_store(sar_paths, STORE_DIR, SKIP_BAD, *reading)
    bad = unreadable(eo_chips), unreadable(sar_chips)
    budget = MemoryBudget(device, CHIP_MEMORY_GB)
    eo, sar = place_stores(budget, eo_chips, sar_chips)
    # Where labelled chips validate, the student learns from all pairs, also from those that the teacher left out.
    labelled = labelled_chips(root, pairs, reading, budget, STORE_DIR, SKIP_BAD)
    listed = choose_entities(ENTITIES, source, TEACHER)
    entities = find_entities(pairs, STORE_DIR, SKIP_BAD, listed, source["eo_reading"])
    fraction = 0.0 if labelled else source["val_fraction"]
    unknown = [-1] * len(further_eo)
    train = choose_training(pairs, entities, fraction, *bad, labelled_share=LABELLED_SHARE, further=unknown)
    if not KL_WEIGHT and not FEATURE_WEIGHT:
        if not train.has_label.all():
            print(f"without KL the {(~train.has_label).sum()} pairs without labels are left out")
        train = train.labelled()
        check(len(train.labels), "without KL and labels there is nothing to learn; raise KL_WEIGHT or LABELLED_SHARE")
    eo_grey, sar_grey = source["grey"], grey_statistics(sar_chips, train.indices)
    eo_train, has_label = eo.subset(train.indices), train.has_label
    # A pair without a label is drawn by the class that the teacher sees in it.
    all_labelled = has_label.all()
    if not all_labelled:
        seen = predict(teacher, eo_train.subset(np.flatnonzero(~has_label)), size, eo_grey)[0]
        train = train.with_labels(seen.argmax(1).cpu().numpy())
        print(
            f"{has_label.sum()} of {len(has_label)} training pairs have labels; the others learn from the teacher, "
            "whose answers count as their labels in the training accuracy"
        )
    trained, drawn = source["settings"], np.bincount(train.labels, minlength=len(pairs.classes)).clip(1)
    taught_counts, counts, class_weights = (
        torch.tensor(values, device=device) for values in (source["counts"], drawn, trained["CLASS_WEIGHTS"])
    )
    stream = WeightedStream(train.labels, run.batch_size, BALANCE, SEED, train.entities, BALANCE_ENTITIES)
    of_train = sar.subset(train.indices), [sar_paths[i] for i in train.indices]
    batches = Batches(stream, train.labels, device, EPOCHS, *of_train, (rank(), world_size()))

    @torch.no_grad()
    def ask_teacher(indices, views):
        """The teacher's features and logits side by side, [B, D + C]; the logits alone if only they are needed."""
        features = view_features(teacher, eo_train, size, eo_grey, indices, views)
        logits = teacher.head(features)
        if MATCH_PRIOR:
            logits = match_prior(logits, taught_counts, trained["BALANCE"], counts, BALANCE, class_weights)
        return torch.cat((features, logits), 1) if FEATURE_WEIGHT else logits

    teacher_outputs = ask_teacher
    if CACHE_TEACHER:
        teacher_outputs = FrozenCache(
            ask_teacher, batches.draws(), len(has_label), BATCH_SIZE, budget, STORE_DIR, torch.float16
        )
    augment = Augmentation(sar_grey, JITTER, SPECKLE, ROTATION, sizes)

    def loss_of(batch):
        features = student.features(augment(batch))
        logits = student.head(features)
        loss = 0.0
        if KL_WEIGHT or FEATURE_WEIGHT:
            # Both chips of a pair are in the same view, or the teacher would describe another picture.
            taught = teacher_outputs(batch.indices, batch.host_views)
            teacher_features, teacher_logits = taught.tensor_split((-len(pairs.classes),), dim=1)
            loss = KL_WEIGHT * distillation_loss(logits, teacher_logits, TEMPERATURE)
        if FEATURE_WEIGHT:
            on_features = FEATURE_LOSSES[FEATURE_LOSS](project(features), teacher_features, FEATURE_TEMPERATURE)
            loss = loss + FEATURE_WEIGHT * on_features
        if LABEL_WEIGHT:
            counted, total = None, None  # all of them
            if not all_labelled:
                counted = to_device(torch.from_numpy(has_label[batch.indices]), device)
                total = total_weight(counted, batches.size)
            loss = loss + LABEL_WEIGHT * focal_loss(logits, batch.labels, GAMMA, None, total, counted)
        return loss, logits, batch.labels

    contents = source | {
        "sensor": "SAR", "backbone": backbone, "chip_side": side, "grey_range": grey_range,
        "grey": sar_grey, "data_root": root, "entities": listed, "scales": TRAIN_SCALES,
        "views": all_views(TRAIN_SCALES), "labelled_share": LABELLED_SHARE, "counts": pairs.counts,
        "held_out": unseen_pairs(pairs, train, source, TEACHER),
    }  # fmt: skip
    optimization = Optimization(LEARNING_RATE, WEIGHT_DECAY, WARMUP_EPOCHS, CLIP, EMA, SEED, OPTIMIZER)
    held_out = sar.subset(train.held_out), pairs.labels[train.held_out]
    validate = Validation(*(labelled or held_out), size, sar_grey)
    if not run.begin(made_from(__file__, pairs, [eo_chips, sar_chips], entities, labelled, INIT, source)):
        return run.announce(*following)
    if COMPILE:
        compile_backbone(student, device)
    learner = Learner(student, loss_of, batches, optimization, also_trained=[project])
    fit(learner, batches, validate, run, contents)
    run.announce(*following)


if __name__ == "__main__":
    run_script(main)
