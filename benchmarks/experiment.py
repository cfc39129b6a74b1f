"""What benchmarks/ablation.py measures on: the networks of a seed, and the labelled chips that they predict."""

import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pretrain
import results
import sar_feature
from data.files import read_table
from data.labelled import (
    COLUMNS,
    FLAG_NOTE,
    find_reference,
    find_test,
    find_validation,
    read_chips,
    write_reference,
)
from data.layouts import find_pairs, find_unlabelled
from data.split import choose_labelled
from data.store import ChipStore, open_store
from utils.predict.clusters import cluster_chips, suitable_clustering
from utils.predict.members import load_members
from utils.predict.ood import DEFAULT, NO_FIT
from utils.predict.pipeline import PipelineSettings, run_pipeline
from utils.predict.tta import IDENTITY
from utils.report.metrics import resampled_scores, scores
from utils.run.settings import check

import numpy as np
import torch

SCORED = ("accuracy", "AUROC", "total")
NEAR_AND_FAR = ("AUROC", "AUROC, near unknowns", "AUROC, far unknowns")
NEAR = ("w_trailer", "bicycle", "semi")  # in the names of unknown kinds that resemble a class

# What results.py does by default; the same with the energy of each chip's logits; and that without the vote.
COMPLETE = PipelineSettings(
    DEFAULT, results.OOD_TEMPERATURE, results.CLUSTER_BY, results.CLUSTERS, results.SEQUENCE_GAP,
    results.VOTE, results.VOTE_MIN_SHARE, results.CLUSTER_SCORE, results.CLASS_SHARES,
)  # fmt: skip
WITH_VOTE = replace(COMPLETE, ood_score=NO_FIT, cluster_score="none")
NO_VOTE = replace(WITH_VOTE, cluster_by="none")

PLAIN, SCRATCH, TEACHER, STUDENT, HEAD = "plain", "scratch", "teacher", "student", "head"


class Network(NamedTuple):
    """How a network is trained.

    script, settings: its script, and what differs from the script's defaults.
    source: the network that it starts from.
    epochs: by default; times: how many times these, or those that are asked for, it takes.
    share: of the pairs of each class that it learns from, in as many steps as other networks take for all pairs.
    """

    script: str
    settings: tuple = ()
    source: str = ""
    epochs: int = sar_feature.EPOCHS  # every SAR network takes as many optimizer steps as a distilled one
    times: float = 1
    share: float = 1


def _student(*settings, source=TEACHER):
    return Network("sar_feature.py", settings, source)


def _mutual(*settings):
    return Network("benchmarks/mutual.py", settings, TEACHER)


def _head(*settings, source=STUDENT):
    return Network("finetune.py", settings, source)


# Percent of the SAR labels: a network with KL on all pairs, and one without, which learns from the labelled ones alone.
SHARES = (25, 10, 5)
CONTRAST = "FEATURE_WEIGHT=0.3", "FEATURE_LOSS=contrastive", "FEATURE_TEMPERATURE=0.1"
MSE = "FEATURE_WEIGHT=1", "FEATURE_LOSS=mse"
WASSERSTEIN = "FEATURE_WEIGHT=1", "FEATURE_LOSS=wasserstein"
# By their folders.
NETWORKS = {
    PLAIN: Network("pretrain.py", ("SENSOR=SAR", "SPECKLE=0.1", "GAMMA=0", "BALANCE=0", "TRAIN_SCALES=1")),
    SCRATCH: Network("pretrain.py", ("SENSOR=SAR", "SPECKLE=0.1", f"BALANCE={sar_feature.BALANCE}")),
    TEACHER: Network("pretrain.py", epochs=pretrain.EPOCHS),
    "short_teacher": Network("pretrain.py", epochs=pretrain.EPOCHS, times=0.5),
    STUDENT: _student(),
    HEAD: _head(),
    "cross_entropy": _student("GAMMA=0"),
    "as_they_are": _student("BALANCE=0"),
    "half": _student("BALANCE=0.5"),
    "entities": _student("BALANCE_ENTITIES=1"),
    "ema": _student("EMA=0.99"),
    "rotated": _student("ROTATION=20"),
    "no_kl": _student("KL_WEIGHT=0"),
    "prior_not_matched": _student("MATCH_PRIOR=False"),
    "no_labels": _student("LABELLED_SHARE=0"),
    "kl_on_features": _student("FEATURE_WEIGHT=1"),
    "kl_on_features_alone": _student("FEATURE_WEIGHT=1", "KL_WEIGHT=0"),
    "relations": _student("FEATURE_WEIGHT=1", "FEATURE_LOSS=relations", "FEATURE_TEMPERATURE=0.1"),
    "contrastive": _student(*CONTRAST),
    "contrastive_no_kl": _student(*CONTRAST, "KL_WEIGHT=0"),
    "mse": _student(*MSE),
    "mse_no_kl": _student(*MSE, "KL_WEIGHT=0"),
    "wasserstein": _student(*WASSERSTEIN),
    "wasserstein_no_kl": _student(*WASSERSTEIN, "KL_WEIGHT=0"),
    "mutual": _mutual(),
    "mutual_entities_mixstyle": _mutual("BALANCE_ENTITIES=1", "MIXSTYLE=0.5"),
    "of_short_teacher": _student(source="short_teacher"),
    "no_kl_of_short_teacher": _student("KL_WEIGHT=0", source="short_teacher"),
    "light_kl": _student("KL_WEIGHT=0.3"),
    "soft_kl": _student("TEMPERATURE=4"),
    "head_as_they_are": _head("BALANCED=False"),
    "head_one_view": _head("ALL_VIEWS=False"),
    "head_no_kl": _head(source="no_kl"),
    **{f"kl_{share}": _student(f"LABELLED_SHARE={share / 100}") for share in SHARES},
    **{
        f"no_kl_{share}": _student(f"LABELLED_SHARE={share / 100}", "KL_WEIGHT=0")._replace(share=share / 100)
        for share in SHARES
    },
}
ROOT = Path(__file__).resolve().parents[1]
locks = defaultdict(threading.Lock)  # one for each folder of a network


@dataclass(frozen=True)
class Networks:
    """The networks of one seed, each trained when it is first asked for.

    data_root, backbone: of the scripts. epochs: of the EO and of each SAR network, 0 = the scripts' defaults.
    out: folder of all seeds; seed: of the training; threads: of a training process.
    """

    data_root: str
    backbone: str
    epochs: int
    out: Path
    seed: int
    threads: int

    def best(self, name):
        """best.pt of a network."""
        folder = self.out / f"seed{self.seed}" / name
        with locks[folder]:
            if not (folder / "curves.png").exists():
                self._train(name, folder)
        return folder / "best.pt"

    def _train(self, name, folder):
        script, settings, source, epochs, times, share = NETWORKS[name]
        settings = [*settings, f"SEED={self.seed}", f"OUT_DIR={folder}", f"STORE_DIR={self.out / 'chips'}"]
        if script == "pretrain.py":
            settings += [f"DATA_ROOT={self.data_root}", f"BACKBONE={self.backbone}"]
        else:
            settings += [f"{'STUDENT' if script == 'finetune.py' else 'TEACHER'}={self.best(source)}"]
        if script != "finetune.py":  # the heads keep their own epochs
            epochs = round((self.epochs or epochs) * times)
            if share < 1:
                longer = self._steps_an_epoch() / self._steps_an_epoch(share)
                settings += [f"WARMUP_EPOCHS={sar_feature.WARMUP_EPOCHS * longer}"]
                epochs = round(epochs * longer)
            settings += [f"EPOCHS={epochs}"]
        process = subprocess.run(
            [sys.executable, str(ROOT / script), *settings],
            env={**os.environ, "OMP_NUM_THREADS": str(self.threads)}, capture_output=True, text=True,
        )  # fmt: skip
        if process.returncode:
            raise SystemExit(f"{script} {' '.join(settings)} failed:\n{process.stderr}")
        print(f"trained: {script} {' '.join(settings)}", flush=True)

    def _steps_an_epoch(self, share=1):
        """Of a network that learns from this share of the pairs; all of them train, since val/ has labels."""
        pairs = choose_labelled(find_pairs(self.data_root).labels, share).sum()
        return -(-pairs // sar_feature.BATCH_SIZE)


class LabelledChips:
    """The chips of a folder with their reference, and the objects that they show (`objects_of`).

    Args:
        folder: of N chips with a reference; data_root: the data set whose classes they have.
    """

    def __init__(self, folder, data_root):
        pairs = find_pairs(data_root)
        self.paths, self.truth = read_chips(folder, pairs.classes, pairs.class_ids)
        check(self.truth, f"{folder} has no reference CSV, so it cannot be scored")
        self.names = [path.name for path in self.paths]
        self.objects = objects_of(data_root, self.names)
        reference = find_reference(folder)
        rows = read_table(reference, COLUMNS[:2], "a reference", FLAG_NOTE) if reference else ()
        kinds = {image_id: kind for _, image_id, kind in rows}
        self.near = np.array([any(word in kinds.get(Path(name).stem, "") for word in NEAR) for name in self.names])

    def scores(self, labels, confidence, columns):
        """Scores of an answer (labels [N], confidence [N]) in SCORED or NEAR_AND_FAR, a list."""
        answer = labels, confidence, self.truth.labels, self.truth.ood
        values = scores(*answer)
        for column, unknown in zip(NEAR_AND_FAR[1:], (self.near, ~self.near), strict=True):
            chosen = ~self.truth.ood | unknown
            values[column] = scores(*(values_of_chips[chosen] for values_of_chips in answer))["AUROC"]
        return [values[column] for column in columns]

    def resampled(self, labels, confidence, repeated):
        """(accuracy, total) of an answer in each of R samples, [2, R]; `repeated` as of `resampled_scores`."""
        samples = resampled_scores(labels, confidence, self.truth.labels, self.truth.ood, repeated)
        return np.stack((samples["accuracy"], samples["total"]))


class Experiment:
    """The networks of one seed and labelled chips. Its rows are (labels [N], confidence [N]).

    Args:
        networks: `Networks`; chips: `LabelledChips`.
    """

    def __init__(self, networks, chips):
        self.networks, self.chips, self.outputs = networks, chips, {}

    def output(self, network, views=None):
        """`Output` of a network for the chips; views: None = those of its checkpoint."""
        if (network, views) not in self.outputs:
            (member,) = load_members(self.networks.best(network), torch.device("cpu"))
            chips = open_store(self.chips.paths, self.networks.out / "chips", False, *member.reading)
            stores = {member.reading: ChipStore(chips, torch.device("cpu"))}
            self.outputs[network, views] = member.output(stores, views=views)
        return self.outputs[network, views]

    def score(self, *outputs, settings=COMPLETE):
        """The answer of `run_pipeline`, of one output or of an ensemble's."""
        cluster_by, _ = suitable_clustering(settings.cluster_by, self.chips.names, settings.sequence_gap)
        result = run_pipeline(list(outputs), self.chips.names, replace(settings, cluster_by=cluster_by))
        return result.labels, result.confidence

    def untrained_head(self):
        """`Output` of the student's own head, with views, OOD scores and calibration of the trained head's checkpoint.

        The backbone is the same, so what finetune.py fits on features holds for both heads.
        """
        (member,) = load_members(self.networks.best(HEAD), torch.device("cpu"))
        fitted = {key: member.checkpoint[key] for key in ("ood", "validation")}
        return self.output(STUDENT, member.views)._replace(**fitted)

    def one_view(self, network):
        """The answer of a network that predicts each chip from one view, without a vote."""
        return self.score(self.output(network, IDENTITY), settings=NO_VOTE)

    def other_seed(self, seed):
        """The same chips with the networks of another seed."""
        return Experiment(replace(self.networks, seed=seed), self.chips)


def objects_of(root, names):
    """Group ids of N chips, int64 [N]; the chips of one group are not independent.

    The fragment of a map that a chip was cut from, where the data set says so in val_sources.csv
    (`image_id,fragment`); else the object that the numbers in the file names tell.
    """
    sources = Path(root, "val_sources.csv")
    if sources.is_file():
        rows = read_table(sources, ("image_id", "fragment"), "a list of sources", "fragment is any text")
        fragment_of = {image_id: fragment for _, image_id, fragment in rows}
        stems = [Path(name).stem for name in names]
        check(set(stems) <= set(fragment_of), f"{sources} does not have every chip; move it away to group by numbers")
        return np.unique([fragment_of[stem] for stem in stems], return_inverse=True)[1]
    numbered, why_not = suitable_clustering("sequence", names)
    if why_not:
        print(f"{root}: each chip counts as an object, so intervals may be too narrow. {why_not}", flush=True)
    return cluster_chips(np.zeros((len(names), 1)), names, numbered)


def choosing_and_scored(data_root, test_dir, out):
    """(data root, folder of the chips that choose, folder of the chips that are scored).

    A data set without a labelled test is cut: every second object of its val/ chooses, the others are scored. The
    cut data set is written below `out`, its training chips are links.
    """
    root, pairs = Path(data_root), find_pairs(data_root)
    check(not find_unlabelled(root)[0], f"{root} has pairs without labels, which the rows with KL alone would train on")
    if test_dir:
        return data_root, root / "val", Path(test_dir)
    if any((root / name).is_dir() for name in ("test", "test_images")):
        test = find_test(root)
        if read_chips(test, pairs.classes, pairs.class_ids)[1]:
            return data_root, root / "val", test
    labelled = find_validation(root, pairs.classes, pairs.class_ids)
    check(labelled, f"{root} has no labelled chips in val/ or test/; set TEST_DIR")
    cut = Path(out, "data")
    if cut.exists():
        return str(cut), cut / "val", cut / "test"
    # Objects whose first chip has the same class alternate, so that both halves hold every class.
    objects = objects_of(root, [path.name for path in labelled.paths])
    first = np.unique(objects, return_index=True)[1]
    order = np.lexsort((first, labelled.labels[first]))
    scored = np.empty(len(first), bool)
    scored[order] = np.arange(len(first)) % 2 == 1
    partial = Path(f"{cut}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for entry in root.iterdir():
        if entry.name not in ("val", "test"):
            (partial / entry.name).symlink_to(entry.resolve())
    for name, chosen in (("val", ~scored), ("test", scored)):
        half = labelled.subset(np.flatnonzero(chosen[objects]))
        (partial / name).mkdir()
        for path in half.paths:
            shutil.copy(path, partial / name)
        kinds = ("unknown" if label < 0 else pairs.classes[label] for label in half.labels)
        rows = zip((path.stem for path in half.paths), kinds, half.ood, strict=True)
        write_reference(partial / name / f"{name}_reference.csv", rows)
    partial.rename(cut)
    return str(cut), cut / "val", cut / "test"
