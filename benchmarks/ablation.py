"""What each part of the method brings: mean and spread over seeds, on any data root.

python benchmarks/ablation.py [DATA_ROOT=datasets/demo] [TEST_DIR=] [EPOCHS=0] [SEEDS=0,1,2]

Trains what the rows need: every SAR network takes the same number of optimizer steps and starts
from the same seed, and each row differs from the scripts' defaults in what it names alone. Started
again, it goes on after what it has finished. Prints Markdown tables and keeps them in OUT_DIR, with
the figures of every seed (ablation.csv) and a picture (ablation.png).
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import results  # noqa: E402
import sar_feature  # noqa: E402
from data.demo.writer import ensure_demo  # noqa: E402
from data.layouts import find_chips, find_pairs, find_reference, find_test, read_labelled  # noqa: E402
from data.sampler import few_of_each, stratified_split  # noqa: E402
from data.store import ChipStore, open_store  # noqa: E402
from utils.predict.clusters import HOW, cluster_chips, vote  # noqa: E402
from utils.predict.ood import cluster_mean, confidence, log_densities  # noqa: E402
from utils.predict.tta import IDENTITY, predict, tta_views  # noqa: E402
from utils.report.metrics import scores  # noqa: E402
from utils.run.checkpoint import build_model, load_checkpoint  # noqa: E402
from utils.run.settings import read_settings, run  # noqa: E402

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.neighbors import NearestNeighbors  # noqa: E402

DATA_ROOT = "datasets/demo"  # folder of the data set
TEST_DIR = ""  # labelled chips to predict; empty: the data set's test folder
BACKBONE = "test_resnet"  # of all networks
EPOCHS = 0  # of the EO and of each SAR network; 0 = the scripts' defaults
SEEDS = (0, 1, 2)  # one run of everything for each
JOBS = 2  # seeds that run at the same time, each on its share of the cores
OUT_DIR = "runs/ablation"  # one folder a seed, and the tables
ROWS = ()  # first words of the groups that are asked for; empty: all

COLUMNS = ("accuracy", "mean per-class accuracy", "AUROC", "total")
NEIGHBOURS = 10  # of the score by nearest neighbours
TURNED, ALL = (tta_views(results.ROTATIONS, scales) for scales in ((1.0,), results.SCALES))

# Folder of a network, script, and how it differs from the scripts' defaults.
PLAIN, SCRATCH, TEACHER, STUDENT, HEAD = "plain", "scratch", "teacher", "student", "head"
NETWORKS = {
    PLAIN: ("pretrain.py", "SENSOR=SAR", "SPECKLE=0.1", "GAMMA=0", "BALANCE=0", "TRAIN_SCALES=1"),
    SCRATCH: ("pretrain.py", "SENSOR=SAR", "SPECKLE=0.1", f"BALANCE={sar_feature.BALANCE}"),
    TEACHER: ("pretrain.py",),
    STUDENT: ("sar_feature.py",),
    HEAD: ("finetune.py",),
    "cross_entropy": ("sar_feature.py", "GAMMA=0"),
    "as_they_are": ("sar_feature.py", "BALANCE=0"),
    "half": ("sar_feature.py", "BALANCE=0.5"),
    "no_kl": ("sar_feature.py", "KL_WEIGHT=0"),
    "kl_alone": ("sar_feature.py", "LABEL_WEIGHT=0"),
    "kl_on_features": ("sar_feature.py", "FEATURE_WEIGHT=1"),
    "kl_on_features_alone": ("sar_feature.py", "KL_WEIGHT=0", "FEATURE_WEIGHT=1"),
    "light_kl": ("sar_feature.py", "KL_WEIGHT=0.3"),
    "soft_kl": ("sar_feature.py", "TEMPERATURE=4"),
    "head_as_they_are": ("finetune.py", "BALANCED=False"),
    "head_no_kl": ("finetune.py",),
}
# Which network a later stage starts from, where it is not the one of the defaults.
SOURCES = {"head_no_kl": "no_kl"}


def main():
    read_settings(globals())
    ensure_demo(DATA_ROOT)  # before the seeds start side by side
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // JOBS))
    with ThreadPoolExecutor(JOBS) as pool:
        found = list(pool.map(one_seed, SEEDS))
    text, picture = [f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}.\n"], []
    with open(Path(OUT_DIR, "ablation.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "row", "seed", *COLUMNS])
        for group, rows in found[0].items():
            text += [f"| {group} | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
            for name in rows:
                values = np.array([[one[group][name][c] for c in COLUMNS] for one in found], float)
                writer.writerows([group, name, seed, *row] for seed, row in zip(SEEDS, values, strict=True))
                mean, spread = values.mean(0), values.std(0, ddof=int(len(SEEDS) > 1))
                cells = (f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
                text.append(f"| {name} | {' | '.join(cells)} |")
                picture.append((group, name, mean, spread))
            text.append("")
    Path(OUT_DIR, "ablation.md").write_text("\n".join(text), encoding="utf-8")
    draw(picture)
    print("\n".join(text))


def one_seed(seed):
    """{group: {row: {column: score}}} of one seed."""
    out = Path(OUT_DIR, f"seed{seed}")
    done = out / "scores.json"
    found = json.loads(done.read_text()) if done.exists() else {}
    test = Test(out)
    for group, measure in GROUPS.items():
        if group not in found and (not ROWS or group.startswith(tuple(ROWS))):
            found[group] = measure(out, seed, test)
            out.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(found, indent=1))
    return found


# The groups: each gives {row: {column: score}}.


def step_by_step(out, seed, test):
    rows = {
        "plain SAR baseline": test.one_view(trained(out, seed, PLAIN)),
        "+ focal loss, weighted sampling, scales": test.one_view(trained(out, seed, SCRATCH)),
        "+ distillation from EO": test.one_view(trained(out, seed, STUDENT)),
    }
    head = test.seen(trained(out, seed, HEAD))
    rows["+ class-balanced head"] = test.one_view(head.path)
    rows["+ test-time augmentation"] = test.score(head.labels, head.energy)
    labels = vote(head.logits, head.cluster("both"), results.VOTE)
    rows["+ cluster vote"] = test.score(labels, head.energy)
    rows["+ energy on Gaussian features"] = test.score(labels, head.density(head.features))
    rows["+ of the cluster (all of results.py)"] = whole(head)
    return rows


def one_step_less(out, seed, test):
    """The whole pipeline, and without one of its steps."""
    path = trained(out, seed, HEAD)
    head, student = test.seen(path), test.seen(trained(out, seed, STUDENT))
    return {
        "all of it": whole(head),
        "without KL": whole(test.seen(trained(out, seed, "head_no_kl"))),
        # Its Gaussians are those of the trained head's checkpoint: the features are the same.
        "without the head's training": whole(head, logits=student.logits),
        "without views": whole(test.seen(path, IDENTITY)),
        "without the vote": whole(head, by="none"),
        "without numbers in the file names": whole(head, by="features"),
        "without Gaussian features": whole(head, density=False),
    }


def whole(seen, by="both", logits=None, density=True):
    """Scores of all that results.py does."""
    clusters = seen.cluster(by)
    together = cluster_mean(seen.features, clusters)
    score = seen.density(together) if density else energy(seen.head(together))
    labels = vote(seen.logits if logits is None else logits, clusters, results.VOTE)
    return seen.test.score(labels, score)


def in_one_view(names):
    """Measure of a group whose rows are networks, {row: network}, each of which sees a chip once."""
    return lambda out, seed, test: {
        name: test.one_view(trained(out, seed, network)) for name, network in names.items()
    }


def heads(out, seed, test):
    names = {
        "the student's": STUDENT, "trained, classes equally often": HEAD,
        "trained, chips as they are": "head_as_they_are",
    }  # fmt: skip
    rows = {name: test.one_view(trained(out, seed, network)) for name, network in names.items()}
    # Without training: the student's head against the long tail, and the Gaussians' classes.
    student, head = (test.seen(trained(out, seed, name), IDENTITY) for name in (STUDENT, HEAD))
    gaussians = head.source["gaussians"]
    adjusted = student.logits - 0.5 * gaussians["log_prior"].numpy()
    rows["logit adjustment, tau = 0.5"] = test.score(adjusted.argmax(1), energy(adjusted))
    weight = np.linalg.norm(student.model.head.weight.detach().numpy(), axis=1)
    normalised = (student.logits - student.model.head.bias.detach().numpy()) / np.sqrt(weight)
    rows["tau-normalisation, tau = 0.5"] = test.score(normalised.argmax(1), energy(normalised))
    densities = log_densities(torch.from_numpy(head.features), gaussians).numpy()
    rows["Gaussian of each class"] = test.score(densities.argmax(1), energy(densities))
    return rows


def views(out, seed, test):
    kinds = {
        "one": IDENTITY,
        "flip": tta_views((0,), (1.0,)),
        "flip, rotations": TURNED,
        "scales": tuple((0, scale) for scale in results.SCALES),
        "flip, rotations, scales": ALL,
    }
    head = trained(out, seed, HEAD)
    rows = {}
    for name, chosen in kinds.items():
        seen = test.seen(head, chosen)
        rows[name] = test.score(seen.labels, seen.energy)
    return rows


def votes(out, seed, test):
    head = test.seen(trained(out, seed, HEAD))
    count = len(head.labels)
    rows = {"none": test.score(head.labels, head.energy)}

    def add(name, clusters, how=results.VOTE):
        rows[name] = test.score(vote(head.logits, clusters, how), head.energy)

    for share in (20, 10, 5, 3):
        add(f"features, a cluster for {share} chips", head.cluster("features", max(1, count // share)))
    add("sequence", head.cluster("sequence"))
    for how in HOW:
        add(f"both, {how}", head.cluster("both"), how)
    return rows


def confidences(out, seed, test):
    """Each score of a chip alone, as the mean of its cluster, and of the cluster's mean features."""
    head = test.seen(trained(out, seed, HEAD))
    known = head.training_features()
    near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(known))).fit(unit(known))
    gaussians = {name: value.numpy() for name, value in head.source["gaussians"].items()}
    white = np.linalg.cholesky(gaussians["precision"])
    centres = NearestNeighbors(n_neighbors=1).fit(gaussians["mean"] @ white)
    kinds = {
        "energy of the logits": lambda x: energy(head.head(x)),
        "maximum softmax": lambda x: torch.from_numpy(head.head(x)).softmax(1).amax(1).numpy(),
        "maximum logit": lambda x: head.head(x).max(1),
        "nearest neighbours": lambda x: -near.kneighbors(unit(x))[0].mean(1),
        "Mahalanobis": lambda x: -centres.kneighbors(x @ white)[0][:, 0],
        "energy on Gaussian features, BACKGROUND=0": lambda x: head.density(x, 0.0),
        "energy on Gaussian features": head.density,
    }
    clusters = head.cluster("both")
    labels, together = vote(head.logits, clusters, results.VOTE), cluster_mean(head.features, clusters)
    rows = {}
    for name, score in kinds.items():
        own = score(head.features)
        rows[name] = test.score(labels, own)
        rows[f"{name}, cluster mean"] = test.score(labels, cluster_mean(own, clusters))
        rows[f"{name}, mean features"] = test.score(labels, score(together))
    return rows


GROUPS = {
    "step by step": step_by_step,
    "one step less": one_step_less,
    "loss and sampling (one view)": in_one_view({
        "focal loss, BALANCE=1": STUDENT, "cross-entropy": "cross_entropy",
        "BALANCE=0": "as_they_are", "BALANCE=0.5": "half",
    }),
    "from EO to SAR (one view)": in_one_view({
        "SAR from scratch": SCRATCH, "from the EO weights, no KL": "no_kl", "KL alone": "kl_alone",
        "KL and labels": STUDENT, "KL on features too": "kl_on_features",
    }),
    "head (one view)": heads,
    "views": views,
    "vote": votes,
    "confidence": confidences,
    "KL by its settings (one view)": in_one_view({
        "KL_WEIGHT=0": "no_kl", "KL_WEIGHT=0.3": "light_kl", "KL_WEIGHT=1, TEMPERATURE=2": STUDENT,
        "TEMPERATURE=4": "soft_kl", "on features alone": "kl_on_features_alone",
    }),
}  # fmt: skip


class Test:
    """The labelled chips, and how networks see them."""

    def __init__(self, out):
        folder = Path(TEST_DIR) if TEST_DIR else find_test(DATA_ROOT)
        self.paths, self.out, self.kept = find_chips(folder), out, {}
        self.names = [path.name for path in self.paths]
        self.reference = find_reference(folder)
        self.chips = open_store(self.paths, Path(OUT_DIR, "chips"))

    def seen(self, path, views=ALL):
        if (path, views) not in self.kept:
            self.kept[path, views] = Seen(path, views, self)
        return self.kept[path, views]

    def one_view(self, path):
        seen = self.seen(path, IDENTITY)
        return self.score(seen.labels, seen.energy)

    def score(self, labels, score):
        truth = read_labelled(self.paths, self.reference, self.classes)
        found = scores(labels, score, truth.labels, truth.ood)
        return {column: found[column] for column in COLUMNS}


class Seen:
    """What a network says of the test chips: logits, features, and what follows from them."""

    def __init__(self, path, views, test):
        self.path, self.test = path, test
        self.source = load_checkpoint(path, "finetune.py")
        test.classes = self.source["classes"]
        self.model, self.size = build_model(self.source), self.source["image_size"]
        self.model.to(memory_format=torch.channels_last)
        found = predict(
            self.model, ChipStore(test.chips, torch.device("cpu")), self.size, self.source["grey"], views
        )
        self.logits, self.features = (x.numpy() for x in found)
        self.labels, self.energy = self.logits.argmax(1), energy(self.logits)

    def head(self, features):
        return features @ self.model.head.weight.detach().numpy().T + self.model.head.bias.detach().numpy()

    def density(self, features, background=None):
        background = results.BACKGROUND if background is None else background
        found = log_densities(torch.from_numpy(features), self.source["gaussians"], background)
        return confidence(found).numpy()

    def cluster(self, by, count=0):
        return cluster_chips(self.features, self.test.names, by, count)

    def training_features(self):
        """Features [M, D] over the eight flips and rotations of some training chips."""
        pairs = find_pairs(DATA_ROOT, self.source["classes"])
        train, _ = stratified_split(pairs.labels, self.source["val_fraction"])
        train = train[few_of_each(pairs.labels[train], 300)]
        chips = open_store(pairs.sar, Path(OUT_DIR, "chips"))
        store = ChipStore(chips, torch.device("cpu")).subset(train)
        _, features = predict(self.model, store, self.size, self.source["grey"], TURNED)
        return features.numpy()


def energy(logits):
    return confidence(torch.from_numpy(logits)).numpy()


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def trained(out, seed, name):
    """best.pt of a network, which is trained first where it is not there, in a process of its own."""
    script, *settings = NETWORKS[name]
    settings += [f"SEED={seed}", f"OUT_DIR={out / name}", f"STORE_DIR={Path(OUT_DIR, 'chips')}"]
    epochs = [f"EPOCHS={EPOCHS}"] if EPOCHS else []
    if script == "pretrain.py":
        # A SAR network of its own takes as many optimizer steps as a distilled one.
        sar = "SENSOR=SAR" in settings and not EPOCHS
        epochs = [f"EPOCHS={sar_feature.EPOCHS}"] if sar else epochs
        settings += [f"DATA_ROOT={DATA_ROOT}", f"BACKBONE={BACKBONE}", *epochs]
    elif script == "sar_feature.py":
        settings += [f"TEACHER={trained(out, seed, TEACHER)}", *epochs]
    else:
        settings += [f"STUDENT={trained(out, seed, SOURCES.get(name, STUDENT))}"]
    if not (out / name / "curves.png").exists():
        threads = str(max(1, (os.cpu_count() or 1) // JOBS))
        found = subprocess.run(
            [sys.executable, str(ROOT / script), *settings],
            env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True,
        )  # fmt: skip
        if found.returncode:
            raise SystemExit(f"{script} {' '.join(settings)} failed:\n{found.stderr}")
        print(f"done: {script} {' '.join(settings)}", flush=True)
    return out / name / "best.pt"


def draw(rows):
    """Mean and spread of every row, a panel for accuracy, AUROC and total each."""
    shown = [COLUMNS.index(name) for name in ("mean per-class accuracy", "AUROC", "total")]
    figure, axes = plt.subplots(
        1, len(shown), sharey=True, figsize=(12, 1 + 0.24 * len(rows)), layout="constrained"
    )
    groups = list(dict.fromkeys(group for group, *_ in rows))
    colours = [f"C{groups.index(group)}" for group, *_ in rows]
    for axis, column in zip(axes, shown, strict=True):
        for place, (_, _, mean, spread) in enumerate(rows):
            axis.errorbar(
                mean[column], place, xerr=spread[column], fmt="o", color=colours[place], capsize=2, ms=4
            )
        axis.set_title(COLUMNS[column])
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [name for _, name, *_ in rows], fontsize=8)
    for label, colour in zip(axes[0].get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes[0].invert_yaxis()
    figure.savefig(Path(OUT_DIR, "ablation.png"), dpi=90)


if __name__ == "__main__":
    run(main)
