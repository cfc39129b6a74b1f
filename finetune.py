"""Stage 3: freeze the distilled backbone and train the head alone, every class equally often.

python finetune.py [NAME=VALUE ...]   writes best.pt, last.pt, history.csv, curves.png
"""

import math

from data.augment import VIEWS
from data.layouts import find_pairs, find_validation
from data.sampler import BalancedStream, on_device, stratified_split
from data.store import ChipStore, open_store
from models.focal import focal_loss
from utils.checkpoint import build_model, load_checkpoint
from utils.energy import fit_gaussians
from utils.predict import IDENTITY, predict, tta_views
from utils.settings import check, read_settings, run
from utils.training import announce, choose_device, fit
from utils.validation import validation

import torch

STUDENT = "runs/sar_feature/best.pt"  # SAR checkpoint of sar_feature.py
DATA_ROOT = ""  # folder of the data set; empty: the student's
OUT_DIR = "runs/finetune"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
EPOCHS = 10  # passes over as many chips as there are
BATCH_SIZE = 64  # chips a step
LEARNING_RATE = 1e-3  # at the peak of the schedule
WEIGHT_DECAY = 0.05  # of AdamW; higher keeps the head smaller
NEW_HEAD = False  # True trains the head from new, False from where it is
GAMMA = 0.0  # of the focal loss; 0 = cross-entropy
ALL_VIEWS = True  # True: all flips, rotations and trained scales of a chip; False: the chip as it is
SEED = 0  # fixes everything random
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"


def main():
    settings = read_settings(globals())
    check(min(EPOCHS, BATCH_SIZE) > 0 and SEED >= 0, "EPOCHS and BATCH_SIZE are at least 1, SEED at least 0")
    device = choose_device(DEVICE)
    torch.manual_seed(SEED)

    source = load_checkpoint(STUDENT, "sar_feature.py", sensor="SAR")
    root = DATA_ROOT or source["data_root"]
    pairs = find_pairs(root, source["classes"])
    train, held_out = stratified_split(pairs.labels, source["val_fraction"])
    store = ChipStore(open_store(pairs.sar, STORE_DIR), device)
    labels = torch.from_numpy(pairs.labels[train]).to(device)
    stream = BalancedStream(pairs.labels[train], BATCH_SIZE, SEED)

    model = build_model(source).freeze().to(device, memory_format=torch.channels_last)
    if NEW_HEAD:
        model.head.reset_parameters()
    # The frozen backbone gives the same features in every epoch: they are computed once.
    # At every scale that the student knows, or the head would forget the others.
    seen = tta_views((0, 90, 180, 270), source["scales"]) if ALL_VIEWS else IDENTITY
    turns = min(VIEWS, len(seen))
    chips = store.subset(torch.from_numpy(train).to(device))
    _, features = predict(
        model, chips, source["image_size"], source["grey"], seen, each=True, progress="features"
    )
    gaussians = fit_gaussians(features.mean(0).cpu(), pairs.labels[train], len(pairs.classes))

    def loss_of(step):
        chosen, views = on_device(stream.batch(step), device)
        scale = step % (len(seen) // turns)  # one a step, in turn, as the backbone was trained
        logits = model.head(features[scale * turns + views % turns, chosen])
        truth = labels[chosen]
        return focal_loss(logits, truth, GAMMA), logits, truth

    labelled = find_validation(root, pairs.classes)
    checkpoint = source | {
        "stage": "finetune", "settings": settings, "data_root": root, "gaussians": gaussians,
    }  # fmt: skip
    fit(
        model, loss_of, validation(checkpoint, store, pairs.labels, held_out, labelled, STORE_DIR),
        epochs=EPOCHS, steps=math.ceil(len(train) / BATCH_SIZE), learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY, seed=SEED, out_dir=OUT_DIR, checkpoint=checkpoint,
    )  # fmt: skip
    announce(OUT_DIR, "python results.py")


if __name__ == "__main__":
    run(main)
