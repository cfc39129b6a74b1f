"""What each step of the method brings: mean and spread over seeds, on any data root.

python benchmarks/ablation.py [DATA_ROOT=datasets/demo] [TEST_DIR=] [EPOCHS=0] [SEEDS=0,1,2]

Runs the plain SAR baseline (cross-entropy, chips drawn as they are, one view, no vote), then adds
one step at a time. Every row that trains a SAR network takes the same number of optimizer steps.
Started again, it goes on after the networks that it finished. Prints a Markdown table and keeps
it, with the figure of every seed, in OUT_DIR.
"""

import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.settings import read_settings, run  # noqa: E402

DATA_ROOT = "datasets/demo"  # folder of the data set
TEST_DIR = ""  # labelled chips to predict; empty: the data set's test folder
BACKBONE = "test_resnet"  # of all rows
EPOCHS = 0  # of the EO and of each SAR network; 0 = the scripts' defaults
SEEDS = (0, 1, 2)  # one run of everything for each
JOBS = 2  # seeds that run at the same time, each on its share of the cores
OUT_DIR = "runs/ablation"  # one folder a seed, and the table

COLUMNS = ("accuracy", "mean per-class accuracy", "AUROC", "total")


def main():
    read_settings(globals())
    # Written before the seeds start side by side, and would all write it.
    from data.demo import ensure_demo

    ensure_demo(DATA_ROOT)
    with ThreadPoolExecutor(JOBS) as pool:
        found = list(pool.map(one_seed, SEEDS))
    table = ["| step | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    with open(Path(OUT_DIR) / "ablation.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "seed", *COLUMNS])
        for name in found[0]:
            values = np.array([[rows[name][column] for column in COLUMNS] for rows in found])
            writer.writerows([name, seed, *row] for seed, row in zip(SEEDS, values, strict=True))
            spread = values.std(0, ddof=1) if len(SEEDS) > 1 else np.zeros(len(COLUMNS))
            cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(values.mean(0), spread, strict=True)]
            table.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(table) + "\n"
    (Path(OUT_DIR) / "ablation.md").write_text(text, encoding="utf-8")
    print(f"mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}\n{text}")


def one_seed(seed):
    """{step: {column: score}} of one seed, each step on top of those before it."""
    out = Path(OUT_DIR) / f"seed{seed}"
    shared = [f"SEED={seed}"]
    epochs = [f"EPOCHS={EPOCHS}"] if EPOCHS else []
    # The baseline takes as many optimizer steps as sar_feature.py, whose default may differ.
    sar_epochs = epochs or [f"EPOCHS={default_epochs('sar_feature.py')}"]
    eo = [f"DATA_ROOT={DATA_ROOT}", f"BACKBONE={BACKBONE}", *shared]
    sar = [*eo, "SENSOR=SAR", "SPECKLE=0.1", *sar_epochs]
    train("pretrain.py", *sar, "GAMMA=0", "BALANCE=0", "TRAIN_SCALES=1", f"OUT_DIR={out}/plain")
    train("pretrain.py", *sar, f"OUT_DIR={out}/focal")
    train("pretrain.py", *eo, *epochs, f"OUT_DIR={out}/pretrain")
    train("sar_feature.py", f"TEACHER={out}/pretrain/best.pt", *epochs, *shared, f"OUT_DIR={out}/sar_feature")
    train("finetune.py", f"STUDENT={out}/sar_feature/best.pt", *shared, f"OUT_DIR={out}/finetune")

    single = ("TTA=False", "CLUSTER_BY=none", "ENERGY=logits", "CLUSTER_SCORE=none")
    rows = {
        "plain SAR baseline": score(out, "plain", *single)["one view"],
        "+ focal loss, weighted sampling, scales": score(out, "focal", *single)["one view"],
        "+ distillation from EO": score(out, "sar_feature", *single)["one view"],
    }
    logits = score(out, "finetune", "ENERGY=logits", "CLUSTER_SCORE=none")
    rows["+ class-balanced head"] = logits["one view"]
    rows["+ test-time augmentation"] = logits["+ TTA"]
    rows["+ cluster vote"] = logits["+ vote"]
    features = score(out, "finetune")
    rows["+ energy on Gaussian features"] = features["+ vote"]
    rows["+ cluster score (all of results.py)"] = features["+ cluster score"]
    return rows


def train(script, *settings):
    """Run a script in a process of its own, with its share of the cores, unless it has ended before."""
    where = next(s for s in settings if s.startswith("OUT_DIR=")).removeprefix("OUT_DIR=")
    if (Path(where) / "curves.png").exists():
        return
    threads = str(max(1, (os.cpu_count() or 1) // JOBS))
    found = subprocess.run(
        [sys.executable, str(ROOT / script), *settings],
        env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(f"{script} {' '.join(settings)} failed:\n{found.stderr}")
    print(f"done: {script} {' '.join(settings)}", flush=True)


def score(out, stage, *settings):
    """{step of results.py: {column: score}} for the checkpoint of a stage."""
    where = out / f"results_{stage}_{len(settings)}"
    test = [f"TEST_DIR={TEST_DIR}"] if TEST_DIR else []
    train("results.py", f"CHECKPOINT={out}/{stage}/best.pt", f"OUT_DIR={where}", *test, *settings)
    with open(where / "steps.csv", encoding="utf-8") as file:
        return {row["step"]: {c: float(row[c]) for c in COLUMNS} for row in csv.DictReader(file)}


def default_epochs(script):
    """The constant EPOCHS of a script."""
    lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
    return next(line.split("=")[1].split("#")[0].strip() for line in lines if line.startswith("EPOCHS = "))


if __name__ == "__main__":
    run(main)
