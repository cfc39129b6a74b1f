"""The effect of each part of the method, with intervals: which step pays, on any data root.

python benchmarks/ablation.py [DATA_ROOT=datasets/demo] [TEST_DIR=] [TRAIN_EPOCHS=0] [SEEDS=0,1,2] [ROWS=]

Trains the networks that the rows need. Every SAR network takes the same number of optimizer steps and
starts from the same seed, and each row differs from the scripts' defaults only in what its name says.
Each row is compared with another one, chip by chip and seed by seed: the difference stands with its 95 %
interval, of a bootstrap over the objects of the test and over the seeds. Started again, it goes on after the
groups that are finished. Prints Markdown tables and writes them into OUT_DIR, with the scores of every seed
(ablation.csv) and a picture (ablation.png).
"""

import contextlib
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results
import sar_feature
from data.demo import ensure_demo
from data.layouts import find_pairs, find_test, read_chips
from data.store import ChipStore, open_store
from utils.predict.clusters import choose_clustering, cluster_chips
from utils.predict.members import load_members
from utils.predict.ood import DEFAULT, NO_FIT, SCORES, log_densities
from utils.predict.pipeline import PipelineSettings, run_pipeline
from utils.predict.tta import IDENTITY, tta_views
from utils.predict.vote import HOW
from utils.report.metrics import scores
from utils.run.files import atomic_file
from utils.run.settings import read_settings
from utils.run.start import run as run_script

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

DATA_ROOT = "datasets/demo"  # folder of the data set
TEST_DIR = ""  # labelled chips to predict; empty: the data set's test folder
BACKBONE = "test_resnet"  # of all networks
TRAIN_EPOCHS = 0  # of the EO and of each SAR network; 0 = the scripts' defaults
SEEDS = (0, 1, 2)  # all networks are trained once for each
JOBS = 2  # seeds that run at the same time, each on its share of the cores
OUT_DIR = "runs/ablation"  # one folder for each seed, and the tables
ROWS = ()  # first words of the groups to measure; empty: all

# What follows cannot be set, so the names are in lower case.
root = Path(__file__).resolve().parents[1]
columns = ("accuracy", "mean per-class accuracy", "AUROC", "total")
turns = (0, 90, 180, 270)  # degrees
resamples = 1000  # of the bootstrap

# What results.py does by default; the same with the energy of each chip's logits; and that without the vote.
complete = PipelineSettings(
    DEFAULT, results.OOD_TEMPERATURE, results.CLUSTER_BY, results.CLUSTERS, results.SEQUENCE_GAP,
    results.VOTE, results.VOTE_MIN_SHARE, results.CLUSTER_SCORE,
)  # fmt: skip
with_vote = replace(complete, ood_score=NO_FIT, cluster_score="none")
no_vote = replace(with_vote, cluster_by="none")

# Folder of a network, script, and how it differs from the scripts' defaults.
PLAIN, SCRATCH, TEACHER, STUDENT, HEAD = "plain", "scratch", "teacher", "student", "head"
networks = {
    PLAIN: ("pretrain.py", "SENSOR=SAR", "SPECKLE=0.1", "GAMMA=0", "BALANCE=0", "TRAIN_SCALES=1"),
    SCRATCH: ("pretrain.py", "SENSOR=SAR", "SPECKLE=0.1", f"BALANCE={sar_feature.BALANCE}"),
    TEACHER: ("pretrain.py",),
    STUDENT: ("sar_feature.py",),
    HEAD: ("finetune.py",),
    "cross_entropy": ("sar_feature.py", "GAMMA=0"),
    "as_they_are": ("sar_feature.py", "BALANCE=0"),
    "half": ("sar_feature.py", "BALANCE=0.5"),
    "no_kl": ("sar_feature.py", "KL_WEIGHT=0"),
    "prior_not_matched": ("sar_feature.py", "MATCH_PRIOR=False"),
    "tenth": ("sar_feature.py", "LABELLED_SHARE=0.1"),
    # Ten epochs of a tenth of the pairs are as many steps as one epoch of all.
    "tenth_no_kl": ("sar_feature.py", "LABELLED_SHARE=0.1", "KL_WEIGHT=0", f"EPOCHS={10 * sar_feature.EPOCHS}"),
    "kl_alone": ("sar_feature.py", "LABEL_WEIGHT=0"),
    "rotated": ("sar_feature.py", "ROTATION=20"),
    "kl_on_features": ("sar_feature.py", "FEATURE_WEIGHT=1"),
    "relations": ("sar_feature.py", "FEATURE_WEIGHT=1", "FEATURE_LOSS=relations", "FEATURE_TEMPERATURE=0.1"),
    "contrastive": ("sar_feature.py", "FEATURE_WEIGHT=0.3", "FEATURE_LOSS=contrastive", "FEATURE_TEMPERATURE=0.1"),
    "contrastive_no_kl": (
        "sar_feature.py", "KL_WEIGHT=0", "FEATURE_WEIGHT=0.3", "FEATURE_LOSS=contrastive", "FEATURE_TEMPERATURE=0.1"
    ),
    "mse": ("sar_feature.py", "FEATURE_WEIGHT=1", "FEATURE_LOSS=mse"),
    "kl_on_features_alone": ("sar_feature.py", "KL_WEIGHT=0", "FEATURE_WEIGHT=1"),
    "light_kl": ("sar_feature.py", "KL_WEIGHT=0.3"),
    "soft_kl": ("sar_feature.py", "TEMPERATURE=4"),
    "head_as_they_are": ("finetune.py", "BALANCED=False"),
    "head_one_view": ("finetune.py", "ALL_VIEWS=False"),
    "head_no_kl": ("finetune.py",),
}
# Networks that do not start from the default network of the stage before.
sources = {"head_no_kl": "no_kl"}


def main():
    read_settings(globals())
    ensure_demo(DATA_ROOT)  # before the seeds start at the same time
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // JOBS))
    with ThreadPoolExecutor(JOBS) as pool:
        measured = list(pool.map(one_seed, SEEDS))
    experiment = Experiment(Path(OUT_DIR), 0)
    weights = experiment.resampled_weights()
    known = int((~experiment.truth.ood).sum())
    text, picture = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; {len(experiment.names)} test chips of "
        f"{len(np.unique(experiment.objects))} objects, {known} of them known.\n"
    ], []
    with open(Path(OUT_DIR, "ablation.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "row", "seed", *columns])
        for group, rows in measured[0].items():
            heads = [*columns, "compared with", "difference of accuracy", "difference of total"]
            text += [f"| {group} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
            resampled = {}
            for name in rows:
                answers = [one[group][name] for one in measured]
                values = np.array([experiment.scores(*answer) for answer in answers])
                writer.writerows([group, name, seed, *row] for seed, row in zip(SEEDS, values, strict=True))
                mean, spread = values.mean(0), values.std(0, ddof=int(len(SEEDS) > 1))
                cells = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True)]
                resampled[name] = values, np.array([experiment.resampled(*answer, weights) for answer in answers])
                other = list(resampled)[-2 if group in each_adds_to_the_one_above else 0] if len(resampled) > 1 else ""
                cells += [other, *differences(resampled[name], resampled[other])] if other else ["", "", ""]
                text.append(f"| {name} | {' | '.join(cells)} |")
                picture.append((group, name, mean, spread))
            text.append("")
    Path(OUT_DIR, "ablation.md").write_text("\n".join(text), encoding="utf-8")
    draw(picture)
    print("\n".join(text))


def differences(row, other):
    """Differences of accuracy and of total between two rows, each with its 95 % interval, in words.

    row, other: (scores [seeds, columns], (accuracy, total) of each resample [seeds, 2, resamples]).
    """
    seeds = np.random.default_rng(1).integers(len(SEEDS), size=(len(SEEDS), resamples))
    cells = []
    for which, column in enumerate(("accuracy", "total")):
        difference = (row[0] - other[0])[:, columns.index(column)].mean()
        drawn = np.take_along_axis(row[1][:, which] - other[1][:, which], seeds, 0).mean(0)
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        cells.append(f"{difference:+.3f} ({low:+.3f} to {high:+.3f})")
    return cells


def one_seed(seed):
    """{group: {row: (labels [N], confidence [N])}} of one seed."""
    out, measured = Path(OUT_DIR, f"seed{seed}"), {}
    experiment = Experiment(out, seed)
    for number, (group, measure) in enumerate(groups.items()):
        if ROWS and not group.startswith(tuple(ROWS)):
            continue
        finished = out / f"group{number}.npz"
        if not finished.exists():
            rows = measure(experiment)
            out.mkdir(parents=True, exist_ok=True)
            arrays = {f"{name}|l": labels for name, (labels, _) in rows.items()}
            arrays |= {f"{name}|c": confidence for name, (_, confidence) in rows.items()}
            with atomic_file(finished, "wb") as file:
                np.savez_compressed(file, **arrays)
        with np.load(finished) as arrays:
            names = dict.fromkeys(key[:-2] for key in arrays)
            measured[group] = {name: (arrays[f"{name}|l"], arrays[f"{name}|c"]) for name in names}
    return measured


class Experiment:
    """The networks of one seed and the labelled test chips. Its rows are (labels [N], confidence [N]).

    Args:
        out: folder of the networks.
        seed: of their training.
    """

    def __init__(self, out, seed):
        folder, pairs = Path(TEST_DIR) if TEST_DIR else find_test(DATA_ROOT), find_pairs(DATA_ROOT)
        self.out, self.seed, self.outputs = out, seed, {}
        self.paths, self.truth = read_chips(folder, pairs.classes, pairs.class_ids)
        self.names = [path.name for path in self.paths]
        with contextlib.redirect_stdout(None):
            numbered = choose_clustering("sequence", self.names)
        self.objects = cluster_chips(np.zeros((len(self.names), 1)), self.names, numbered)

    def output(self, network, views=None):
        """`Output` of a network for the test chips; views: None = those of its checkpoint."""
        if (network, views) not in self.outputs:
            (member,) = load_members(trained(self.out, self.seed, network), torch.device("cpu"))
            chips = open_store(self.paths, Path(OUT_DIR, "chips"), False, *member.reading)
            stores = {member.reading: ChipStore(chips, torch.device("cpu"))}
            self.outputs[network, views] = member.output(stores, views=views)
        return self.outputs[network, views]

    def score(self, output, settings=complete):
        """The answer of `run_pipeline`."""
        cluster_by = choose_clustering(settings.cluster_by, self.names, settings.sequence_gap)
        result = run_pipeline([output], self.names, replace(settings, cluster_by=cluster_by))
        return result.labels, result.confidence

    def scores(self, labels, confidence):
        """The columns' scores of an answer, a list."""
        values = scores(labels, confidence, self.truth.labels, self.truth.ood)
        return [values[column] for column in columns]

    def resampled_weights(self):
        """How often each chip occurs in each resample of the objects, [resamples, N]."""
        random, count = np.random.default_rng(0), self.objects.max() + 1
        return random.multinomial(count, np.full(count, 1 / count), size=resamples)[:, self.objects]

    def resampled(self, labels, confidence, weights):
        """(accuracy, total) of an answer in each resample, [2, resamples]."""
        known = ~self.truth.ood
        accuracy = weights[:, known] @ (labels == self.truth.labels)[known] / weights[:, known].sum(1)
        order = np.argsort(confidence)
        ties = np.flatnonzero(np.diff(confidence[order], prepend=-np.inf))
        of_known, of_unknown = (np.add.reduceat(weights[:, order] * x[order], ties, axis=1) for x in (known, ~known))
        below = np.cumsum(of_unknown, axis=1) - of_unknown / 2
        if known.all():
            return np.stack((accuracy, accuracy))
        area = (of_known * below).sum(1) / (of_known.sum(1) * of_unknown.sum(1))
        return np.stack((accuracy, 0.75 * accuracy + 0.25 * area))

    def one_view(self, network):
        """The scores of a network that predicts each chip from one view, without a vote."""
        return self.score(self.output(network, IDENTITY), no_vote)


# The groups. Each takes an Experiment and returns {row: (labels, confidence)}. A row is compared with the first
# one of its group, or here with the one above it:
each_adds_to_the_one_above = {"step by step"}


def step_by_step(experiment):
    head = experiment.output(HEAD)
    return {
        "plain SAR baseline": experiment.one_view(PLAIN),
        "+ focal loss, weighted sampling, scales": experiment.one_view(SCRATCH),
        "+ distillation from EO": experiment.one_view(STUDENT),
        "+ class-balanced head": experiment.one_view(HEAD),
        "+ test-time augmentation": experiment.score(head, no_vote),
        "+ cluster vote": experiment.score(head, with_vote),
        "+ energy on Gaussian features": experiment.score(head, replace(complete, cluster_score="none")),
        "+ mean of the cluster (all of results.py)": experiment.score(head),
    }


def one_step_less(experiment):
    """The complete pipeline, and the pipeline without one of its steps."""
    head, score = experiment.output(HEAD), experiment.score
    return {
        "complete": score(head),
        "without KL": score(experiment.output("head_no_kl")),
        # The features are the same, so the OOD scores are those of the trained head's checkpoint.
        "without the head's training": score(experiment.output(STUDENT)._replace(ood=head.ood)),
        "without views": score(experiment.output("head_one_view")),
        # Not matched: the head and the OOD scores know all views, but see one.
        "all-views head on one view": score(experiment.output(HEAD, IDENTITY)),
        "without the vote": score(head, replace(complete, cluster_by="none")),
        "without numbers in the file names": score(head, replace(complete, cluster_by="features")),
        "without Gaussian features": score(head, replace(complete, ood_score=NO_FIT)),
    }


def in_one_view(rows):
    """A group whose rows are networks, {row: network}, each of which sees one view of a chip."""
    return lambda experiment: {name: experiment.one_view(network) for name, network in rows.items()}


def heads(experiment):
    rows = in_one_view({
        "the student's": STUDENT, "trained, classes equally often": HEAD,
        "trained, chips as they are": "head_as_they_are",
    })(experiment)  # fmt: skip
    # Without training: the student's head corrected for the long tail, and the Gaussians of the classes.
    student, fitted = experiment.output(STUDENT, IDENTITY), experiment.output(HEAD).ood[DEFAULT]
    weight, bias = student.head.weight.detach(), student.head.bias.detach()
    logits = {
        "logit adjustment, tau = 0.5": student.logits - 0.5 * fitted["log_prior"],
        "tau-normalisation, tau = 0.5": (student.logits - bias) / weight.norm(dim=1).sqrt(),
        "Gaussian of each class": log_densities(student.features, without_background(fitted)),
    }
    return rows | {
        name: experiment.score(student._replace(logits=values), no_vote) for name, values in logits.items()
    }


def views(experiment):
    """A head that was trained on all views, tested on some of them."""
    scales = sar_feature.TRAIN_SCALES
    kinds = {
        "one": IDENTITY,
        "flip": tta_views((0,), (1.0,)),
        "flip, rotations": tta_views(turns, (1.0,)),
        "scales": tuple((0, scale) for scale in scales),
        "flip, rotations, scales": tta_views(turns, scales),
    }
    return {name: experiment.score(experiment.output(HEAD, kind), no_vote) for name, kind in kinds.items()}


def votes(experiment):
    settings = {"none": no_vote}
    for share in (20, 10, 5, 3):
        clusters = max(1, len(experiment.names) // share)
        name = f"features, a cluster for {share} chips"
        settings[name] = replace(with_vote, cluster_by="features", clusters=clusters)
    settings["sequence"] = replace(with_vote, cluster_by="sequence")
    settings |= {f"both, {how}": replace(with_vote, cluster_by="both", vote=how) for how in HOW}
    head = experiment.output(HEAD)
    return {name: experiment.score(head, chosen) for name, chosen in settings.items()}


def confidences(experiment):
    """Each OOD score of a chip, its mean over the chip's cluster, and that of the cluster's mean features."""
    head = experiment.output(HEAD)
    kinds = {name: (name, head) for name in SCORES}
    without = {DEFAULT: without_background(head.ood[DEFAULT])}
    kinds[f"{DEFAULT}, BACKGROUND=0"] = DEFAULT, head._replace(ood=without)
    forms = {"": "none", ", cluster mean": "mean", ", mean features": "features"}
    return {
        name + form: experiment.score(output, replace(complete, ood_score=score, cluster_score=cluster_score))
        for name, (score, output) in kinds.items()
        for form, cluster_score in forms.items()
    }


def without_background(fitted):
    """The fit of an OOD score, as of finetune.py BACKGROUND=0."""
    return fitted | {"background": torch.tensor(0.0)}


groups = {
    "step by step": step_by_step,
    "one step less": one_step_less,
    "loss and sampling (one view)": in_one_view({
        "focal loss, BALANCE=1": STUDENT, "cross-entropy": "cross_entropy",
        "BALANCE=0": "as_they_are", "BALANCE=0.5": "half", "ROTATION=20": "rotated",
    }),
    "from EO to SAR (one view)": in_one_view({
        "SAR from scratch": SCRATCH, "from the EO weights, no KL": "no_kl", "KL alone": "kl_alone",
        "KL and labels": STUDENT,
    }),
    "features (one view)": in_one_view({
        "KL on the classes": STUDENT, "and KL on features": "kl_on_features", "and relations": "relations",
        "and contrast": "contrastive", "contrast without KL": "contrastive_no_kl", "and MSE": "mse",
    }),
    "labels (one view)": in_one_view({
        "a tenth of the labels, no KL": "tenth_no_kl", "a tenth of the labels, KL on all pairs": "tenth",
        "all labels, no KL": "no_kl", "all labels, KL": STUDENT, "KL, prior not matched": "prior_not_matched",
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


def trained(out, seed, name):
    """best.pt of a network; if it is not there, a process of its own trains it first."""
    script, *settings = networks[name]
    settings += [f"SEED={seed}", f"OUT_DIR={out / name}", f"STORE_DIR={Path(OUT_DIR, 'chips')}"]
    epochs = [f"EPOCHS={TRAIN_EPOCHS}"] if TRAIN_EPOCHS else []
    if script == "pretrain.py":
        # A SAR network without a teacher takes as many optimizer steps as a distilled one.
        sar = "SENSOR=SAR" in settings and not TRAIN_EPOCHS
        epochs = [f"EPOCHS={sar_feature.EPOCHS}"] if sar else epochs
        settings += [f"DATA_ROOT={DATA_ROOT}", f"BACKBONE={BACKBONE}", *epochs]
    elif script == "sar_feature.py":
        settings += [f"TEACHER={trained(out, seed, TEACHER)}", *epochs]
    else:
        settings += [f"STUDENT={trained(out, seed, sources.get(name, STUDENT))}"]
    if not (out / name / "curves.png").exists():
        threads = str(max(1, (os.cpu_count() or 1) // JOBS))
        process = subprocess.run(
            [sys.executable, str(root / script), *settings],
            env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True,
        )  # fmt: skip
        if process.returncode:
            raise SystemExit(f"{script} {' '.join(settings)} failed:\n{process.stderr}")
        print(f"trained: {script} {' '.join(settings)}", flush=True)
    return out / name / "best.pt"


def draw(rows):
    """Draw ablation.png: mean and standard deviation of every row, in a panel for each of three scores."""
    shown = [columns.index(name) for name in ("mean per-class accuracy", "AUROC", "total")]
    figure, axes = plt.subplots(
        1, len(shown), sharey=True, figsize=(12, 1 + 0.24 * len(rows)), layout="constrained"
    )
    groups = list(dict.fromkeys(group for group, *_ in rows))
    colours = [f"C{groups.index(group)}" for group, *_ in rows]
    for axis, column in zip(axes, shown, strict=True):
        for position, (_, _, mean, spread) in enumerate(rows):
            axis.errorbar(
                mean[column], position, xerr=spread[column], fmt="o", color=colours[position], capsize=2, ms=4
            )
        axis.set_title(columns[column])
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [name for _, name, *_ in rows], fontsize=8)
    for label, colour in zip(axes[0].get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes[0].invert_yaxis()
    figure.savefig(Path(OUT_DIR, "ablation.png"), dpi=90)


if __name__ == "__main__":
    run_script(main)
