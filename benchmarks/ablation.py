"""The effect of each part of the method, with intervals: which step pays, on any data root.

python benchmarks/ablation.py [DATA_ROOT=datasets/demo] [TEST_DIR=] [TRAIN_EPOCHS=0] [SEEDS=0,1,2,3,4] [ROWS=]

Trains the networks that the rows need (benchmarks/experiment.py). Every SAR network takes the same number of optimizer
steps and starts from the same seed, and each row differs from the scripts' defaults only in what its name says. Each
row is compared with another one, chip by chip and seed by seed: the difference stands with its 95 % interval, of a
bootstrap over the objects of the test and over the seeds. The last columns are the same scores on the validation chips:
settings are chosen by them. A data set without a labelled test is cut in two by object: half of its val/ chooses, the
other half is the test. Started again, it goes on after the groups that are finished. Prints Markdown tables and writes
them into OUT_DIR, with the scores of every seed (ablation.csv) and a picture (ablation.png).
"""

import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sar_feature
from benchmarks.experiment import (
    COMPLETE,
    HEAD,
    NEAR_AND_FAR,
    NO_VOTE,
    PLAIN,
    SCORED,
    SCRATCH,
    SHARES,
    STUDENT,
    WITH_VOTE,
    Experiment,
    LabelledChips,
    Networks,
    choosing_and_scored,
)
from data.demo import ensure_demo
from utils.predict.ood import DEFAULT, NO_FIT, SCORES, log_densities
from utils.predict.tta import IDENTITY, tta_views
from utils.predict.vote import HOW
from utils.report.metrics import resampled_groups
from utils.run.files import atomic_file
from utils.run.settings import check, read_settings
from utils.run.start import run as run_script

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

DATA_ROOT = "datasets/demo"  # folder of the data set
TEST_DIR = ""  # labelled chips to score; empty: the data set's test folder, or half of its validation chips
BACKBONE = "test_resnet"  # of all networks
TRAIN_EPOCHS = 0  # of the EO and of each SAR network; 0 = the scripts' defaults
SEEDS = (0, 1, 2, 3, 4)  # all networks are trained once for each
JOBS = 2  # seeds that run at the same time, each on its share of the cores
OUT_DIR = "runs/ablation"  # one folder for each seed, and the tables
ROWS = ()  # first words of the groups to measure; empty: all

# What follows cannot be set, so the names are in lower case.
turns = (0, 90, 180, 270)  # degrees
resamples = 1000  # of the bootstrap


def main():
    read_settings(globals())
    ensure_demo(DATA_ROOT)  # before the seeds start at the same time
    threads = max(1, (os.cpu_count() or 1) // JOBS)
    torch.set_num_threads(threads)
    refuse_other_settings()
    root, choosing, scored = choosing_and_scored(DATA_ROOT, TEST_DIR, OUT_DIR)
    chips = {"validation": LabelledChips(choosing, root), "test": LabelledChips(scored, root)}

    def one_seed(seed):
        """{group: {"validation" and "test": {row: (labels [N], confidence [N])}}}"""
        networks = Networks(root, BACKBONE, TRAIN_EPOCHS, Path(OUT_DIR), seed, threads)
        experiments = {which: Experiment(networks, chips[which]) for which in chips}
        asked = {g: measure for g, measure in groups.items() if not ROWS or g.startswith(tuple(ROWS))}
        return {group: measured(experiments, group, measure) for group, measure in asked.items()}

    with ThreadPoolExecutor(JOBS) as pool:
        of_seeds = list(pool.map(one_seed, SEEDS))
    text, picture = tables(of_seeds, chips)
    Path(OUT_DIR, "ablation.md").write_text(text, encoding="utf-8")
    draw(picture)
    print(text)


def refuse_other_settings():
    """Store in OUT_DIR what its networks and scores depend on.

    Raises:
        SettingError: they were made with other values.
    """
    made_with = {"DATA_ROOT": DATA_ROOT, "TEST_DIR": TEST_DIR, "BACKBONE": BACKBONE, "TRAIN_EPOCHS": TRAIN_EPOCHS}
    path = Path(OUT_DIR, "settings.json")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        check(before == made_with, f"{OUT_DIR} was made with {before}, not {made_with}; set another OUT_DIR")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made_with), encoding="utf-8")


def measured(experiments, group, measure):
    """The rows of a group for each set of chips; they are read again if they were measured before."""
    networks, rows = experiments["test"].networks, {}
    folder, name = networks.out / f"seed{networks.seed}", group.split(" (")[0].replace(" ", "_")
    if group == "ensemble":
        name += "_" + "_".join(map(str, member_seeds(networks.seed)))
    for which, experiment in experiments.items():
        finished = folder / f"{name}_{which}.npz"
        if not finished.exists():
            answers = measure(experiment)
            folder.mkdir(parents=True, exist_ok=True)
            arrays = {f"{row}|{i}": values for row, both in answers.items() for i, values in enumerate(both)}
            with atomic_file(finished, "wb") as file:
                np.savez_compressed(file, **arrays)
        with np.load(finished) as arrays:
            names = dict.fromkeys(key[:-2] for key in arrays)
            rows[which] = {row: (arrays[f"{row}|0"], arrays[f"{row}|1"]) for row in names}
    return rows


def tables(of_seeds, chips):
    """Markdown of all groups, and the rows of the picture. Writes ablation.csv."""
    test, picture = chips["test"], []
    known, objects = int((~test.truth.ood).sum()), len(np.unique(test.objects))
    text = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; {len(test.names)} test chips of "
        f"{objects} objects, {known} of them known.\n"
    ]
    # The first row is the test as it is.
    repeated = [np.ones(len(test.names)), *resampled_groups(test.objects, resamples)]
    with open(Path(OUT_DIR, "ablation.csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "row", "chips", "seed", "score", "value"])
        for group, first in of_seeds[0].items():
            columns = NEAR_AND_FAR if group == "confidence" and (test.near & test.truth.ood).any() else SCORED
            heads = [*columns, "compared with", "difference of accuracy", "difference of total"]
            heads += [f"validation {column}" for column in columns]
            text += [f"| {group} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
            resampled = {}
            for row in first["test"]:
                cells = {}
                for which in chips:
                    answers = [one[group][which][row] for one in of_seeds]
                    values = np.array([chips[which].scores(*answer, columns) for answer in answers])
                    for seed, of_seed in zip(SEEDS, values, strict=True):
                        scored = zip(columns, of_seed, strict=True)
                        writer.writerows([group, row, which, seed, *pair] for pair in scored)
                    mean, spread = values.mean(0), values.std(0, ddof=int(len(SEEDS) > 1))
                    cells[which] = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True)]
                # The test is the last of both.
                picture.append((group, row, columns, mean, spread))
                resampled[row] = np.array([test.resampled(*answer, repeated) for answer in answers])
                other = compared_with(group, list(resampled))
                compared = [other, *differences(resampled[row], resampled[other])] if other else ["", "", ""]
                text.append(f"| {row} | {' | '.join([*cells['test'], *compared, *cells['validation']])} |")
            text.append("")
    return "\n".join(text), picture


def compared_with(group, rows):
    """The row that the last of these rows of a group is compared with, or "" for the first."""
    if len(rows) < 2:
        return ""
    return rivals.get(rows[-1], rows[-2 if group in each_adds_to_the_one_above else 0])


def differences(row, other):
    """Differences of accuracy and of total between two rows, each with its 95 % interval, in words.

    row, other: (accuracy, total) of all objects and of each resample, [seeds, 2, 1 + resamples].
    """
    seeds = np.random.default_rng(1).integers(len(SEEDS), size=(len(SEEDS), resamples))
    cells = []
    for which in range(2):
        difference = (row - other)[:, which, 0].mean()
        drawn = np.take_along_axis((row - other)[:, which, 1:], seeds, 0).mean(0)
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        cells.append(f"{difference:+.3f} ({low:+.3f} to {high:+.3f})")
    return cells


# The groups. Each takes an Experiment and returns {row: (labels, confidence)}. A row is compared with the first
# one of its group, in these groups with the one above it, and these rows with the one that stands beside them.
each_adds_to_the_one_above = {"step by step", "ensemble"}
rivals = {f"{share} % of the labels, KL": f"{share} % of the labels, no KL" for share in SHARES}
rivals["all labels, KL, prior not matched"] = "all labels, KL"
rivals["the default's, KL"] = "half, KL"
adjusted = "its logits adjusted, tau = 1", "its head tau-normalised, tau = 1"
rivals |= dict.fromkeys(adjusted, "of a student of BALANCE=0")


def step_by_step(experiment):
    head, score = experiment.output(HEAD), experiment.score
    return {
        "plain SAR baseline": experiment.one_view(PLAIN),
        "+ focal loss, weighted sampling, scales": experiment.one_view(SCRATCH),
        "+ EO weights": experiment.one_view("no_kl"),
        "+ KL": experiment.one_view(STUDENT),
        "+ class-balanced head": experiment.one_view(HEAD),
        "+ test-time augmentation": score(head, settings=NO_VOTE),
        "+ cluster vote": score(head, settings=WITH_VOTE),
        "+ energy on Gaussian features": score(head, settings=replace(COMPLETE, cluster_score="none")),
        "+ mean of the cluster (all of results.py)": score(head),
    }


def one_step_less(experiment):
    """The complete pipeline, and the pipeline without one of its steps."""
    head, score = experiment.output(HEAD), experiment.score
    return {
        "complete": score(head),
        "without KL": score(experiment.output("head_no_kl")),
        "without the head's training": score(experiment.untrained_head()),
        # The head and the OOD scores are fitted on one view as well.
        "without views": score(experiment.output("head_one_view")),
        # The confidence of a chip is then its own as well.
        "without clusters": score(head, settings=replace(COMPLETE, cluster_by="none")),
        "without numbers in the file names": score(head, settings=replace(COMPLETE, cluster_by="features")),
        "without Gaussian features": score(head, settings=replace(COMPLETE, ood_score=NO_FIT)),
    }


def ensemble(experiment):
    """The whole pipeline with the heads of one seed and of the seeds after it."""
    members = [experiment.other_seed(seed).output(HEAD) for seed in member_seeds(experiment.networks.seed)]
    names = ["one member", "two members", "three members", "four members"]
    return {name: experiment.score(*members[:n]) for n, name in enumerate(names, 1) if n <= len(members)}


def member_seeds(seed):
    """This seed, and the next three of SEEDS; fewer than all of them, or each seed would have the same ensemble."""
    start = SEEDS.index(seed)
    return (SEEDS[start:] + SEEDS[:start])[: max(1, min(4, len(SEEDS) - 1))]


def in_one_view(rows):
    """A group whose rows are networks, {row: network}, each of which sees one view of a chip."""
    return lambda experiment: {name: experiment.one_view(network) for name, network in rows.items()}


def heads(experiment):
    rows = in_one_view({
        "the student's": STUDENT, "trained, classes equally often": HEAD,
        "trained, chips as they are": "head_as_they_are",
    })(experiment)  # fmt: skip
    # Without training: the head of a student that saw the classes as they are, corrected for the long tail, and the
    # Gaussians of the classes, which are fitted on the mean over the views.
    student, long_tailed = experiment.output(STUDENT, IDENTITY), experiment.output("as_they_are", IDENTITY)
    fitted = experiment.output(HEAD).ood[DEFAULT]
    weight, bias = long_tailed.head.weight.detach(), long_tailed.head.bias.detach()
    outputs = {
        "of a student of BALANCE=0": long_tailed,
        "its logits adjusted, tau = 1": long_tailed._replace(logits=long_tailed.logits - fitted["log_prior"]),
        "its head tau-normalised, tau = 1": long_tailed._replace(
            logits=(long_tailed.logits - bias) / weight.norm(dim=1)
        ),
        "Gaussian of each class": student._replace(logits=log_densities(student.features, without_background(fitted))),
    }
    return rows | {name: experiment.score(output, settings=NO_VOTE) for name, output in outputs.items()}


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
    return {name: experiment.score(experiment.output(HEAD, kind), settings=NO_VOTE) for name, kind in kinds.items()}


def votes(experiment):
    settings = {"none": NO_VOTE}
    for share in (20, 10, 5, 3):
        clusters = max(1, len(experiment.chips.names) // share)
        name = f"features, a cluster for {share} chips"
        settings[name] = replace(WITH_VOTE, cluster_by="features", clusters=clusters)
    settings["sequence"] = replace(WITH_VOTE, cluster_by="sequence")
    settings |= {f"both, {how}": replace(WITH_VOTE, cluster_by="both", vote=how) for how in HOW}
    head = experiment.output(HEAD)
    return {name: experiment.score(head, settings=chosen) for name, chosen in settings.items()}


def class_shares(experiment):
    head = experiment.output(HEAD)
    settings = {f"CLASS_SHARES={share}": replace(COMPLETE, class_shares=share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)}
    return {name: experiment.score(head, settings=chosen) for name, chosen in settings.items()}


def confidences(experiment):
    """Each OOD score of a chip, its mean over the chip's cluster, and that of the cluster's mean features."""
    head = experiment.output(HEAD)
    kinds = {name: (name, head) for name in SCORES}
    without = {DEFAULT: without_background(head.ood[DEFAULT])}
    kinds[f"{DEFAULT}, BACKGROUND=0"] = DEFAULT, head._replace(ood=without)
    forms = {"": "none", ", cluster mean": "mean", ", mean features": "features"}
    return {
        name + form: experiment.score(output, settings=replace(COMPLETE, ood_score=score, cluster_score=cluster_score))
        for name, (score, output) in kinds.items()
        for form, cluster_score in forms.items()
    }


def without_background(fitted):
    """The fit of an OOD score, as of finetune.py BACKGROUND=0."""
    return fitted | {"background": torch.tensor(0.0)}


def of_labels():
    """{row: network}: how many SAR labels there are, without KL and with KL on all pairs."""
    rows = {"all labels, no KL": "no_kl", "all labels, KL": STUDENT}
    for share in SHARES:
        rows |= {f"{share} % of the labels, no KL": f"no_kl_{share}", f"{share} % of the labels, KL": f"kl_{share}"}
    return rows | {"no labels, KL": "no_labels", "all labels, KL, prior not matched": "prior_not_matched"}


groups = {
    "step by step": step_by_step,
    "one step less": one_step_less,
    "labels (one view)": in_one_view(of_labels()),
    "loss and sampling (one view)": in_one_view({
        "focal loss, BALANCE=1": STUDENT, "cross-entropy": "cross_entropy", "BALANCE=0": "as_they_are",
        "BALANCE=0.5": "half", "BALANCE_ENTITIES=1": "entities", "EMA=0.99": "ema", "ROTATION=20": "rotated",
    }),
    "teacher (one view)": in_one_view({
        "half the default's epochs, no KL": "no_kl_of_short_teacher", "half, KL": "of_short_teacher",
        "the default's epochs, no KL": "no_kl", "the default's, KL": STUDENT,
    }),
    "features (one view)": in_one_view({
        "KL on the classes": STUDENT, "and KL on features": "kl_on_features", "and relations": "relations",
        "and contrast": "contrastive", "and MSE": "mse", "and sliced Wasserstein": "wasserstein",
    }),
    # What other teams do, with our batches, network and number of steps; the labels teach as well in every row.
    "rivals (one view)": in_one_view({
        "KL from a frozen teacher (ours)": STUDENT, "labels alone": "no_kl", "two-way KL, both trained": "mutual",
        "two-way KL, draws by entity, MixStyle": "mutual_entities_mixstyle", "contrast": "contrastive_no_kl",
        "MSE of the features": "mse_no_kl", "sliced Wasserstein of the features": "wasserstein_no_kl",
    }),
    "head (one view)": heads,
    "views": views,
    "vote": votes,
    "class shares": class_shares,
    "confidence": confidences,
    "ensemble": ensemble,
    "KL by its settings (one view)": in_one_view({
        "KL_WEIGHT=0": "no_kl", "KL_WEIGHT=0.3": "light_kl", "KL_WEIGHT=1, TEMPERATURE=2": STUDENT,
        "TEMPERATURE=4": "soft_kl", "on features alone": "kl_on_features_alone",
    }),
}  # fmt: skip


def draw(rows):
    """Draw ablation.png: mean and standard deviation of every row, in a panel for each of three scores."""
    size = (12, 1 + 0.24 * len(rows))
    figure, axes = plt.subplots(1, len(SCORED), sharey=True, figsize=size, layout="constrained")
    groups = list(dict.fromkeys(group for group, *_ in rows))
    colours = [f"C{groups.index(group)}" for group, *_ in rows]
    for axis, score in zip(axes, SCORED, strict=True):
        for position, (_, _, columns, mean, spread) in enumerate(rows):
            if score in columns:
                x, error = mean[columns.index(score)], spread[columns.index(score)]
                axis.errorbar(x, position, xerr=error, fmt="o", color=colours[position], capsize=2, ms=4)
        axis.set_title(score)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [name for _, name, *_ in rows], fontsize=8)
    for label, colour in zip(axes[0].get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    axes[0].invert_yaxis()
    figure.savefig(Path(OUT_DIR, "ablation.png"), dpi=90)


if __name__ == "__main__":
    run_script(main)
