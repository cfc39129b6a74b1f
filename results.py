"""Stage 4: predict the SAR test chips and write the submission.

python results.py [NAME=VALUE ...]   writes results.csv, readme.txt, submission.zip, and the
scores where a reference CSV lies beside the chips
"""

import time
from pathlib import Path

from data.layouts import find_chips, find_reference, find_test, image_ids, read_labelled
from data.store import open_store, place_stores, unreadable
from utils.predict.clusters import BY, HOW, chip_numbers, cluster_chips, vote
from utils.predict.ood import cluster_mean, confidence, log_densities
from utils.predict.submission import write_submission
from utils.predict.tta import IDENTITY, predict, scaled, tta_views
from utils.report.metrics import undefined
from utils.report.page import Found, forget_scores, save_scores, table, write_report
from utils.run.checkpoint import build_model, load_checkpoint
from utils.run.ranks import rank
from utils.run.settings import check, check_values, read_settings, run
from utils.train.loop import choose_device

import numpy as np
import torch

CHECKPOINT = "runs/finetune/best.pt"  # SAR checkpoint, of finetune.py in the method
DATA_ROOT = ""  # folder of the data set; empty: the checkpoint's
TEST_DIR = ""  # folder of chips to predict; empty: the data set's test folder
OUT_DIR = "runs/results"  # where the outputs go
STORE_DIR = "runs/chips"  # where decoded chips are kept; delete it to decode afresh
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
BATCH_SIZE = 256  # inputs in one forward pass
ROTATIONS = (0, 90, 180, 270)  # degrees, of the views, each also flipped; (0,) with flip only
SCALES = (0.875, 1.0, 1.125)  # of the views, relative to the input size; best those trained on
TTA = True  # False predicts from each chip as it is
CLUSTER_BY = "both"  # "features", "sequence" (of file numbers), "both", or "none"
CLUSTERS = 0  # number of clusters of "features"; 0 = one for five chips, at most 1000
SEQUENCE_GAP = 100  # largest step between the numbers of one sequence
VOTE = "product"  # of probabilities; "soft" sums them, "hard" counts labels
VOTE_MIN_SHARE = 0.0  # a cluster whose winner has a smaller share of the vote stays as it is
ENERGY = "features"  # confidence from the "logits" of the head, or from Gaussians of "features"
BACKGROUND = 0.75  # share of all training chips' log density taken off each class's; 0 = none
ENERGY_TEMPERATURE = 1.0  # T of the energy
CLUSTER_SCORE = "features"  # of its cluster's mean "features" or "logits"; "mean" score; "none": its own
REPORT = True  # True writes report.html, with pictures of what was predicted
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
CHIP_MEMORY_GB = 0.0  # GiB of the device's memory for chips, else the host's or the disk; 0 = half the free
COMPILE = False  # True: torch.compile, for long runs on a GPU; a minute's wait, no gain on a CPU


def main():
    settings = read_settings(globals())
    check_values(settings)
    check(ENERGY in ("logits", "features"), f"ENERGY is logits or features, not {ENERGY!r}")
    check(
        CLUSTER_SCORE in ("none", "mean", "logits", "features"),
        f"CLUSTER_SCORE is none, mean, logits or features, not {CLUSTER_SCORE!r}",
    )
    check(CLUSTER_BY in BY, f"CLUSTER_BY is one of {', '.join(BY)}, not {CLUSTER_BY!r}")
    check(VOTE in HOW, f"VOTE is one of {', '.join(HOW)}, not {VOTE!r}")
    views = tta_views(ROTATIONS, SCALES) if TTA else IDENTITY
    device = choose_device(DEVICE)

    source = load_checkpoint(CHECKPOINT, "finetune.py", sensor="SAR")
    check(
        ENERGY == "logits" or "gaussians" in source,
        f"{CHECKPOINT} holds no Gaussians; run finetune.py, or set ENERGY=logits",
    )
    folder = Path(TEST_DIR) if TEST_DIR else find_test(DATA_ROOT or source["data_root"])
    paths = find_chips(folder)
    names = [path.name for path in paths]
    if CLUSTER_BY in ("sequence", "both"):
        chip_numbers(names)  # names without one are told of before the long work
    reference = find_reference(folder)
    truth = read_labelled(paths, reference, source["classes"]) if reference else None
    model = build_model(source, CHECKPOINT).to(device, memory_format=torch.channels_last)
    model.check_sizes({scaled(source["image_size"], scale) for _, scale in views})
    chips = open_store(paths, STORE_DIR, SKIP_BAD)
    good = np.setdiff1d(np.arange(len(paths)), unreadable(chips))
    paths, names = [paths[i] for i in good], [names[i] for i in good]
    truth = truth and truth.subset(good)
    store = place_stores(device, CHIP_MEMORY_GB, chips)[0].subset(good)
    if COMPILE:
        model.backbone.compile()

    def energy_logits(logits, features):
        """f of the energy: the head's logits, or the log densities of the Gaussians."""
        if ENERGY == "logits":
            return logits
        return log_densities(features, {k: v.to(device) for k, v in source["gaussians"].items()}, BACKGROUND)

    def confidence_of(logits, features):
        return confidence(energy_logits(logits, features), ENERGY_TEMPERATURE).cpu().numpy()

    see = (model, store, source["image_size"], source["grey"])
    alone = None if truth is None else predict(*see, IDENTITY, BATCH_SIZE)
    started = time.perf_counter()
    logits, features = predict(*see, views, BATCH_SIZE, progress="predict")
    if rank():
        return  # the first rank has all answers, and does the rest
    densities = energy_logits(logits, features)
    clusters = cluster_chips(features.cpu().numpy(), names, CLUSTER_BY, CLUSTERS, SEQUENCE_GAP)
    labels = vote(logits.cpu().numpy(), clusters, VOTE, VOTE_MIN_SHARE)
    own = confidence(densities, ENERGY_TEMPERATURE).cpu().numpy()
    if CLUSTER_SCORE == "features":
        together = torch.from_numpy(cluster_mean(features.cpu().numpy(), clusters)).to(features)
        score = confidence_of(model.head(together).detach(), together)
    elif CLUSTER_SCORE == "mean":
        score = cluster_mean(own, clusters)
    elif CLUSTER_SCORE == "logits":
        together = torch.from_numpy(cluster_mean(densities.cpu().numpy(), clusters))
        score = confidence(together, ENERGY_TEMPERATURE).numpy()
    else:
        score = own
    seconds = (time.perf_counter() - started) / len(paths)

    described = f"focal loss, EO-to-SAR distillation, class-balanced head, {len(views)} views, vote"
    ids = np.array(source["class_ids"])[labels]
    archive = write_submission(
        OUT_DIR, image_ids(paths), ids, score, seconds, device.type == "cuda", described
    )
    print(f"{len(paths)} chips, {clusters.max() + 1} clusters, {seconds * 1000:.2f} ms a chip")
    forget_scores(Path(OUT_DIR))
    stages = {"one view": (alone[0].argmax(1).cpu().numpy(), confidence_of(*alone))} if alone else {}
    stages |= {
        "+ TTA": (logits.argmax(1).cpu().numpy(), own),
        "+ vote": (labels, own),
        "+ cluster score": (labels, score),
    }
    centres = source["gaussians"]["mean"].to(features) if "gaussians" in source else None
    found = Found(
        source["classes"], settings, stages, logits.softmax(1).cpu().numpy(), clusters,
        features.cpu().numpy(), lambda chosen: store[chosen].cpu().numpy(), seconds, source["counts"],
        None if centres is None else torch.cdist(features, centres).argsort(1).cpu().numpy(), truth,
    )  # fmt: skip
    if truth is not None:
        print(table(found.scores, list(found.scores["one view"])) + undefined(truth.ood))
        save_scores(Path(OUT_DIR), found)
    if REPORT:
        write_report(Path(OUT_DIR), found)
    print(f"written: {archive} and, beside it, what it holds{' and the scores' if truth else ''}")


if __name__ == "__main__":
    run(main)
