"""What each vote does to a checkpoint's prediction: with the numbers as they are, and with worse ones.

python benchmarks/votes.py [CHECKPOINT=runs/finetune/best.pt] [DATA_ROOT=] [TEST_DIR=]

Prints a Markdown table of accuracy / AUROC. Rows: the file names as they are; "interleaved", the same chips
with the frames of two sequences in five mixed; "shuffled", numbers that say nothing. The networks run once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results
from data.labelled import find_test, read_chips
from data.store import MemoryBudget, open_store, place_stores
from utils.predict.clusters import chip_numbers, cluster_chips, suitable_clustering
from utils.predict.members import choose_score, load_members
from utils.predict.pipeline import PipelineSettings, calibration_temperature, run_pipeline
from utils.report.metrics import scores
from utils.run.checkpoint import choose_data_root
from utils.run.device import choose_device
from utils.run.settings import check, read_settings
from utils.run.start import run

import numpy as np

CHECKPOINT = "runs/finetune/best.pt"  # of finetune.py
DATA_ROOT = ""  # folder of the data set; empty: the checkpoint's
TEST_DIR = ""  # folder of labelled chips; empty: the data set's test folder
STORE_DIR = "runs/chips"  # folder of the decoded chips

# What follows cannot be set, so the names are in lower case.
mixed_of_five = 2  # sequences whose frames are mixed, of five
# Column: cluster_by, vote, cluster_score.
columns = {
    "no vote": ("none", "product", "none"),
    "sequence, product": ("sequence", "product", "features"),
    "both, product": ("both", "product", "features"),
    "features, product": ("features", "product", "features"),
    "sequence, mixture": ("sequence", "mixture", "features"),
    "features, mixture": ("features", "mixture", "features"),
    "default": (results.CLUSTER_BY, results.VOTE, results.CLUSTER_SCORE),
}


def main():
    read_settings(globals())
    device = choose_device("auto")
    (member,) = load_members(CHECKPOINT, device)
    checkpoint = member.checkpoint
    folder = Path(TEST_DIR or find_test(choose_data_root(DATA_ROOT, checkpoint, CHECKPOINT)))
    paths, truth = read_chips(folder, checkpoint["classes"], checkpoint["class_ids"])
    check(truth, f"{folder} has no reference")
    stores = place_stores(MemoryBudget(device, 0.0), open_store(paths, STORE_DIR, False, *member.reading))
    output = member.output({member.reading: stores[0]}, progress="predict")
    names = [path.name for path in paths]
    score = choose_score("", [member])

    print(f"{folder}: {len(names)} chips; T = {calibration_temperature([output]):.2f}")
    print(f"| numbers | {' | '.join(columns)} | belief, clusters of the default |\n|---|{'---|' * (len(columns) + 1)}")
    for row, renamed in {
        "as they are": names,
        "interleaved": interleaved(names),
        "shuffled": np.random.default_rng(0).permutation(names).tolist(),
    }.items():
        cells = []
        for cluster_by, vote, cluster_score in columns.values():
            cluster_by, _ = suitable_clustering(cluster_by, renamed)
            settings = PipelineSettings(score, cluster_by=cluster_by, vote=vote, cluster_score=cluster_score)
            result = run_pipeline([output], renamed, settings)
            values = scores(result.labels, result.confidence, truth.labels, truth.ood)
            cells.append(f"{values['accuracy']:.3f} / {values['AUROC']:.3f}")
        print(f"| {row} | {' | '.join(cells)} | {result.belief:.2f}, {result.clusters.max() + 1} |", flush=True)


def interleaved(names):
    """Names for the same chips, in which two sequences in five share one run of numbers, their frames mixed."""
    random = np.random.default_rng(0)
    sequences = cluster_chips(np.zeros((len(names), 1)), names, "sequence")
    order = np.lexsort((chip_numbers(names), random.permutation(sequences.max() + 1)[sequences]))
    # Chips of one run of numbers: each sequence alone, or two together.
    ids = np.unique(sequences[order], return_index=True)[1]
    rank = np.searchsorted(np.sort(ids), np.arange(len(order)), side="right") - 1
    block, position = np.divmod(rank, 5)
    run_of_chip = block * 5 + np.where(position < mixed_of_five, 0, position)
    # A sequence that is alone keeps the order of its frames.
    order = order[np.lexsort((random.random(len(order)) * (position < mixed_of_five), run_of_chip))]
    steps = np.where(np.diff(np.sort(run_of_chip), prepend=-1) > 0, random.integers(150, 900), 0)
    renamed = np.empty(len(names), object)
    renamed[order] = [f"Gotcha{number}.png" for number in np.cumsum(steps + random.integers(1, 6, len(order)))]
    return renamed.tolist()


if __name__ == "__main__":
    run(main)
