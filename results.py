"""Stage 4: predict the SAR test chips and write the submission.

python results.py [NAME=VALUE ...]   writes results.csv, readme.txt, submission.zip, and the
scores if a reference CSV lies beside the chips
"""

import time
from dataclasses import replace
from pathlib import Path

from data.labelled import find_test, image_ids, read_chips
from data.store import MemoryBudget, open_store, place_stores, unreadable
from utils.predict.clusters import choose_clustering, dependent_chips
from utils.predict.members import choose_score, load_members, set_views
from utils.predict.pipeline import PipelineSettings, describe_vote, nearest_classes, run_pipeline
from utils.predict.submission import write_submission
from utils.predict.tta import IDENTITY
from utils.report.metrics import undefined
from utils.report.page import describe_intervals, remove_old_scores, save_scores, table, write_report
from utils.report.prediction import Prediction
from utils.run.checkpoint import choose_data_root
from utils.run.device import choose_device, compile_backbone
from utils.run.lock import refuse_second_start
from utils.run.ranks import on_rank_0, rank
from utils.run.settings import read_settings
from utils.run.start import run

import numpy as np

CHECKPOINT = "runs/finetune/best.pt"  # SAR checkpoint, of finetune.py in the method; or several: a.pt,b.pt
DATA_ROOT = ""  # folder of the data set; empty: the checkpoint's
TEST_DIR = ""  # folder of chips to predict; empty: the data set's test folder
OUT_DIR = "runs/results"  # folder of the outputs
STORE_DIR = "runs/chips"  # folder of the decoded chips; delete it to decode again
SKIP_BAD = False  # True leaves out files that are no readable images, and counts them
BATCH_SIZE = 256  # inputs in one forward pass
TTA = True  # True averages over views; False predicts from each chip as it is
ROTATIONS = ()  # degrees of the views, each also flipped: 0,90,180,270; empty: the checkpoint's
SCALES = ()  # of the views, relative to the input size: 0.875,1,1.125; empty: the checkpoint's
CLUSTER_BY = "auto"  # "features", "sequence" (of file numbers), "both", "none"; "auto": "both" if the numbers allow
CLUSTERS = 0  # number of clusters of "features"; 0 = one for five chips, at most 1000
SEQUENCE_GAP = 100  # largest step between the numbers of one sequence
VOTE = "mixture"  # believes a cluster as far as its chips agree; of one winner: "product", "soft", "hard"
CLASS_SHARES = 0.0  # of "mixture": how far it moves the classes' shares to those of val/; 0 = as predicted, 1 = wholly
VOTE_MIN_SHARE = 0.0  # of one winner: a cluster whose winner has a smaller share of the vote keeps its labels
OOD_SCORE = ""  # a name in utils/predict/ood.py; empty: "gaussian_energy", or "energy" if it was not fitted
OOD_TEMPERATURE = 1.0  # T of the scores that have one
CLUSTER_SCORE = "mean"  # "mean" score of a cluster; score of its mean "features"; "none": each chip's own
REPORT = True  # True writes report.html, with pictures of the prediction
DEVICE = "auto"  # "auto", "cpu", "cuda", "cuda:1"
CHIP_MEMORY_GB = 0.0  # GiB of the device's memory for chips, else the host's or the disk; 0 = half the free
COMPILE = False  # True: torch.compile, for long runs on a GPU; a minute's wait, no gain on a CPU


def main():
    settings = read_settings(globals())
    device = choose_device(DEVICE)
    on_rank_0(lambda: refuse_second_start(OUT_DIR))
    members = set_views(load_members(CHECKPOINT, device), ROTATIONS, SCALES, TTA)
    score = choose_score(OOD_SCORE, members)
    pipeline = PipelineSettings(
        score, OOD_TEMPERATURE, CLUSTER_BY, CLUSTERS, SEQUENCE_GAP, VOTE, VOTE_MIN_SHARE, CLUSTER_SCORE, CLASS_SHARES
    )
    print(f"OOD score: {score}", flush=True)

    # Chips: names and reference are checked before the long work.
    first = members[0].checkpoint
    folder = Path(TEST_DIR or find_test(choose_data_root(DATA_ROOT, first, CHECKPOINT)))
    paths, truth = read_chips(folder, first["classes"], first["class_ids"])
    cluster_by = choose_clustering(CLUSTER_BY, [path.name for path in paths], SEQUENCE_GAP)
    pipeline = replace(pipeline, cluster_by=cluster_by)
    readings = sorted({member.reading for member in members})
    chips = [open_store(paths, STORE_DIR, SKIP_BAD, *reading) for reading in readings]
    good = np.setdiff1d(np.arange(len(paths)), np.concatenate([*map(unreadable, chips)]))
    paths, truth = [paths[i] for i in good], truth and truth.subset(good)
    names = [path.name for path in paths]
    stores = zip(readings, place_stores(MemoryBudget(device, CHIP_MEMORY_GB), *chips), strict=True)
    stores = {reading: store.subset(good) for reading, store in stores}

    # Prediction: all ranks run the networks, rank 0 goes on alone.
    if COMPILE:
        for member in members:
            compile_backbone(member.model, device)
    several_views = any(member.views != IDENTITY for member in members)
    one_view = [member.output(stores, BATCH_SIZE, IDENTITY) for member in members if truth and several_views]
    started = time.perf_counter()
    outputs = [member.output(stores, BATCH_SIZE, progress="predict") for member in members]
    if rank():
        return
    result = run_pipeline(outputs, names, pipeline)
    seconds = (time.perf_counter() - started) / len(paths)

    views = "+".join(str(len(member.views)) for member in members)
    method = f"focal loss, EO-to-SAR distillation, class-balanced head, {views} views, vote"
    class_ids = np.array(first["class_ids"])[result.labels]
    archive = write_submission(
        OUT_DIR, image_ids(paths), class_ids, result.confidence, seconds, device.type == "cuda", method
    )
    print(f"{len(paths)} chips, {result.clusters.max() + 1} clusters, {seconds * 1000:.2f} ms a chip")
    of_vote = describe_vote(result, first["classes"], CLASS_SHARES)
    print(f"vote: {of_vote}")

    # Scores after each step, and the report.
    groups = dependent_chips(names, result.clusters, SEQUENCE_GAP)
    steps = {
        "+ TTA" if several_views else "one view": (result.probabilities.argmax(1), result.chip_confidence),
        "+ vote": (result.labels, result.chip_confidence),
        "+ cluster score": (result.labels, result.confidence),
    }
    if one_view:
        single = replace(pipeline, cluster_by="none", cluster_score="none")
        single = run_pipeline(one_view, names, single)
        steps = {"one view": (single.labels, single.confidence)} | steps
    prediction = Prediction(
        first["classes"], settings, steps, result.probabilities, result.clusters, groups, result.features,
        lambda indices: stores[readings[-1]][indices].cpu().numpy(), seconds, first["counts"], of_vote,
        nearest_classes(outputs[0]), truth,
    )  # fmt: skip
    remove_old_scores(Path(OUT_DIR))
    if truth:
        print(table(prediction.scores, list(prediction.scores["one view"])) + undefined(truth.ood))
        if prediction.can_be_scored:
            print(describe_intervals(prediction))
        save_scores(Path(OUT_DIR), prediction)
    if REPORT:
        write_report(Path(OUT_DIR), prediction)
    print(f"written: {archive} and, beside it, what it holds{' and the scores' if truth else ''}")


if __name__ == "__main__":
    run(main)
