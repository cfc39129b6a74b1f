"""Clusters of test chips, and the vote that gives every chip of a cluster the winner's label.

The frames of a scene are numbered in a row, and in two scenes of five two vehicles take turns in
them. So the numbers give the scenes, and the features say which scenes to split:

    names -> sequences;  features -> Fisher's axes -> halves of a sequence, kept or split -> ids
"""

import re
from pathlib import PurePath

from utils.run.settings import SettingError

import numpy as np
from scipy.linalg import eigh
from scipy.special import log_softmax, softmax
from sklearn import config_context
from sklearn.cluster import AgglomerativeClustering, KMeans, MiniBatchKMeans
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

BY = ("features", "sequence", "both", "none")
HOW = ("hard", "soft", "product")

LARGE = 1000  # chips above which clustering works on mini-batches and the silhouette on a sample
PATCH = 5  # chips of a patch: so few neighbours in feature space that they show one vehicle
AXES = 8  # Fisher's axes kept
SHRINKAGE = 0.3  # of the scatter in patches towards a ball, given many chips per dimension
FEW = 4  # chips per dimension at which that doubles; it grows with the square as they get fewer
FLOOR = 1e-6  # variance on the unit sphere below which chips count as equal

# A sequence is split where the silhouette of its halves reaches ...
SPLIT_MIXED = 0.35  # ... this, if the halves take turns: one vehicle's halves hardly do
SPLIT_APART = 0.70  # ... this, if not: a pose that turns evenly has 0.62 when cut in the middle
MIXED = 0.6  # changes of half from frame to frame, 1 = as many as in random order
FRAMES = 4  # the fewest frames that may count as mixed: one or two are outliers


def cluster_chips(features, names, by="both", clusters=0, sequence_gap=100):
    """Cluster ids of chips, int64 [N], 0..K-1 without holes.

    features: float [N, D], averaged over the TTA views; L2-normalised here.
    names: N file names or paths; the last run of digits in the stem is the chip's number.
    by: "features" (k-means over all chips), "sequence" (chips whose sorted numbers are at most
        `sequence_gap` apart), "both" (sequences, split where they hold more than one vehicle) or
        "none" (each chip alone).
    clusters: number of clusters for "features"; 0 takes one for five chips, 1000 at most.

    The order of the chips does not matter, and the same input gives the same clusters.
    Raises SettingError if `by` is unknown, if the lengths differ, or if a name without a number is
    to be put into a sequence.
    """
    if by not in BY:
        raise SettingError(f"Chips are clustered by one of {', '.join(BY)}, not by '{by}'.")
    features, names = np.asarray(features), np.asarray(names, dtype=str)
    if len(features) != len(names):
        raise SettingError(f"There are {len(features)} rows of features but {len(names)} names.")
    numbers = chip_numbers(names) if by in ("sequence", "both") else np.zeros(len(names), np.int64)
    if by == "none" or len(names) < 2:
        return np.arange(len(names))
    # In one order whatever the input's: k-means starts from rows, Ward breaks ties by rows.
    order = np.lexsort((features[:, 0], names, numbers))
    features = normalize(features[order])
    if by == "features":
        found = _k_means(features, clusters or min(max(len(names) // PATCH, 1), LARGE))
    else:
        found = np.cumsum(np.diff(numbers[order], prepend=numbers[order[0]]) > sequence_gap)
        if by == "both":
            # Thousands of small clusterings, of which checking the arguments takes the most time.
            with config_context(assume_finite=True, skip_parameter_validation=True):
                found = _split(features, found)
    ids = np.empty(len(names), np.int64)
    ids[order] = np.unique(found, return_inverse=True)[1]
    return ids


def vote(logits, clusters, how="hard", min_share=0.0):
    """Labels after the vote, int64 [N]: each chip takes the winner of its cluster.

    logits: float [N, C]; clusters: int [N], any ids.
    how: "hard" counts the chips' labels, "soft" sums their probabilities, "product" multiplies them:
        one chip that is sure against a label counts for many that are in doubt (Kittler et al., "On
        Combining Classifiers", 1998). Ties go to the label with the higher summed probability. Only
        labels that some chip of the cluster has can win.
    min_share: a cluster whose winner has less than this share (0..1) of the counted votes ("hard"),
        of the summed probability ("soft") or of its geometric mean ("product") keeps the labels of
        its chips.
    Raises SettingError if `how` is unknown.
    """
    if how not in HOW:
        raise SettingError(f"Votes are counted in one of the ways {', '.join(HOW)}, not '{how}'.")
    logits = np.asarray(logits, np.float64)
    labels = logits.argmax(1)
    ids, clusters = np.unique(clusters, return_inverse=True)

    def cluster_means(values):
        sums = np.zeros((len(ids), values.shape[1]))
        np.add.at(sums, clusters, values)
        return sums / np.bincount(clusters)[:, None]

    counted = cluster_means(np.eye(logits.shape[1])[labels])
    summed = cluster_means(softmax(logits, 1))
    shares = {"hard": counted, "soft": summed}.get(how)
    if how == "product":
        shares = softmax(cluster_means(log_softmax(logits, 1)), 1)
    votes = np.where(counted > 0, shares, 0)
    winners = np.where(votes == votes.max(1, keepdims=True), summed, -1).argmax(1)
    won = votes[np.arange(len(ids)), winners]
    return np.where(won[clusters] >= min_share, winners[clusters], labels)


def chip_numbers(names):
    """The last run of digits in each file's stem, int64 [N].

    Raises SettingError for a name without any: it belongs to no sequence.
    """
    numbers = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        digits = re.findall(r"[0-9]+", PurePath(name).stem)
        if not digits:
            raise SettingError(
                f"'{name}' has no number in its name, so it belongs to no sequence: "
                "cluster by 'features' instead."
            )
        numbers[i] = int(digits[-1][-18:])  # of longer ones what fits
    return numbers


def _k_means(features, clusters):
    """Labels of `clusters` clusters at most, int [N]."""
    model = KMeans if len(features) <= LARGE else MiniBatchKMeans
    model = model(min(clusters, len(features)), random_state=0)
    return model.fit_predict(features)


def _cut(features, clusters):
    """Labels of a few chips by Ward's method, of many by k-means, int [N]."""
    if len(features) > LARGE:
        return _k_means(features, clusters)
    return AgglomerativeClustering(clusters, linkage="ward").fit_predict(features)


def _split(features, sequences):
    """Cluster ids, int64 [N]: sequences cut in two for as long as the halves are two vehicles.

    The chips come sorted by number, `sequences` holds their sequence's id.
    """
    starts = np.flatnonzero(np.diff(sequences)) + 1
    todo = np.split(np.arange(len(features)), starts)
    features = _fisher(features, todo)
    ids, count = np.empty(len(features), np.int64), 0
    while todo:
        chips = todo.pop()
        halves = _cut(features[chips], 2) if len(chips) >= 4 else np.zeros(len(chips), np.int64)
        if _are_two(features[chips], halves):
            todo += [chips[halves == 0], chips[halves == 1]]
        else:
            ids[chips], count = count, count + 1
    return ids


def _fisher(features, sequences):
    """Features [N, <= AXES] along which the chips differ most, in units of the spread in a patch.

    A patch is a handful of neighbours within a sequence, so its scatter is what speckle does to one
    vehicle; pooled over all sequences, it is known far better than one sequence could tell
    (Fisher 1936: the axes maximise total over within-patch variance).
    """
    within = np.zeros_like(features)
    for chips in sequences:
        patches = min(max(len(chips) // PATCH, 2), LARGE // PATCH)
        patch = _cut(features[chips], patches) if len(chips) > patches else np.arange(len(chips))
        for one in np.unique(patch):
            rows = chips[patch == one]
            within[rows] = features[rows] - features[rows].mean(0)
    features = features - features.mean(0)
    total, scatter = (x.T @ x / len(x) for x in (features, within))
    shrinkage = SHRINKAGE * (1 + (FEW * len(total) / len(features)) ** 2)
    ball = shrinkage * np.trace(scatter) / len(scatter) + FLOOR
    kept = [max(len(total) - AXES, 0), len(total) - 1]
    axes = eigh(total, scatter + ball * np.eye(len(total)), subset_by_index=kept)[1]
    return np.round(features @ axes, 3)  # equal chips stay equal: rounding errors are no vehicle


def _are_two(features, halves):
    """Whether two halves of a sequence, sorted by number, show two vehicles."""
    sizes = np.bincount(halves)
    sample = slice(None, None, -(-len(halves) // LARGE))
    if len(sizes) < 2 or len(np.unique(halves[sample])) < 2:
        return False
    at_random = 1 - ((sizes / len(halves)) ** 2).sum()  # chance that two frames differ in half
    mixed = np.mean(halves[1:] != halves[:-1]) > MIXED * at_random
    needed = SPLIT_MIXED if mixed and sizes.min() >= FRAMES else SPLIT_APART
    return silhouette_score(features[sample], halves[sample]) >= needed
