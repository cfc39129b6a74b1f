"""Clusters of test chips that show the same vehicle.

The frames that follow one vehicle have nearly consecutive numbers, but two vehicles may alternate in them.
So the numbers give the sequences, and the features decide which sequences are split:

    names -> sequences;  features -> Fisher's axes -> halves of a sequence, split or not -> ids

scikit-learn's clustering takes a second to import, so the training loop must not import this module.
"""

import re
from collections import Counter
from pathlib import PurePath

from data.errors import named
from utils.run.rules import CLUSTER_BY as BY
from utils.run.settings import SettingError

import numpy as np
from scipy.linalg import eigh
from sklearn import config_context
from sklearn.cluster import AgglomerativeClustering, KMeans, MiniBatchKMeans
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

LARGE = 1000  # chips above which clustering works on mini-batches and the silhouette on a sample
PATCH = 5  # chips of a patch: few enough neighbours in feature space to show one vehicle
AXES = 8  # number of Fisher's axes
SHRINKAGE = 0.3  # of the scatter within patches towards a multiple of the identity, for many chips
FEW = 4  # chips per dimension at which the shrinkage doubles; the increase is quadratic in dimension / chips
FLOOR = 1e-6  # variance on the unit sphere below which chips count as equal

# A sequence is split if the silhouette of its halves is at least ...
SPLIT_MIXED = 0.35  # ... this, where the halves alternate: the halves of one vehicle hardly do
SPLIT_APART = 0.70  # ... this, elsewhere: one vehicle that turns evenly has 0.62 when cut in the middle
MIXED = 0.6  # halves alternate at this many changes from frame to frame; 1 = as many as in random order
FRAMES = 4  # frames that each of two alternating halves has at least: one or two frames are outliers

# File numbers are no frame numbers if ...
SHARED = 0.05  # ... more than this share of the chips have a number that another chip has as well
PER_PATTERN = 4  # ... names of one pattern (the name without its digits) have fewer chips than this on average
LONGEST = 0.5  # ... one sequence would hold more than this share of the chips,
RELEASE_2021 = re.compile("SAR_[0-9]+")  # a test chip of 2021/22; later ones are Gotcha<number>
HANDFUL = 20  # where there are more chips than this: the chips of one scene may be one sequence


def cluster_chips(features, names, by="both", clusters=0, sequence_gap=100):
    """Cluster ids of chips, int64 [N], 0..K-1, each used.

    The order of the chips does not matter, and the same input gives the same clusters.

    Args:
        features: float [N, D], averaged over the TTA views; L2-normalised here.
        names: N file names or paths; `chip_numbers` reads their numbers.
        by: "features" (k-means over all chips), "sequence" (chips whose sorted numbers are at most
            `sequence_gap` apart), "both" (sequences, split if they show more than one vehicle) or
            "none" (each chip is a cluster).
        clusters: number of clusters of "features"; 0 = one for five chips, at most 1000.
        sequence_gap: largest step between the numbers of one sequence.

    Raises:
        SettingError: `by` is unknown, the lengths differ, or a sequence is asked for and a name has no
            number.
    """
    if by not in BY or by == "auto":
        raise SettingError(f"chips are clustered by one of {', '.join(BY[1:])}, not '{by}'")
    features, names = np.asarray(features), np.asarray(names, dtype=str)
    if len(features) != len(names):
        raise SettingError(f"there are {len(features)} rows of features but {len(names)} names")
    numbers = chip_numbers(names) if by in ("sequence", "both") else np.zeros(len(names), np.int64)
    if by == "none" or len(names) < 2:
        return np.arange(len(names))
    # Sorted, because k-means and Ward's ties depend on the order of the rows.
    order = np.lexsort((features[:, 0], names, numbers))
    features = normalize(features[order])
    if by == "features":
        sorted_ids = _k_means(features, clusters or min(max(len(names) // PATCH, 1), LARGE))
    else:
        sorted_ids = np.cumsum(np.diff(numbers[order], prepend=numbers[order[0]]) > sequence_gap)
        if by == "both":
            # In thousands of small clusterings, checking the arguments takes most of the time.
            with config_context(assume_finite=True, skip_parameter_validation=True):
                sorted_ids = _split(features, sorted_ids)
    ids = np.empty(len(names), np.int64)
    ids[order] = np.unique(sorted_ids, return_inverse=True)[1]
    return ids


def dependent_chips(names, clusters, sequence_gap=100):
    """Groups of chips that may show one vehicle, int64 [N]: sequences of frame numbers, whatever the vote clusters by.

    names: N file names; without frame numbers the groups are the `clusters`, int [N].
    """
    if suitable_clustering("auto", names, sequence_gap)[0] != "both":
        return clusters
    return cluster_chips(np.zeros((len(names), 1)), names, "sequence", sequence_gap=sequence_gap)


def choose_clustering(by, names, sequence_gap=100):
    """What `cluster_chips` is to cluster by, of `suitable_clustering`; prints why, unless it is `by` itself."""
    chosen, sentence = suitable_clustering(by, names, sequence_gap)
    if sentence:
        print(sentence, flush=True)
    return chosen


def suitable_clustering(by, names, sequence_gap=100):
    """What `cluster_chips` is to cluster by, and a sentence that says why; "" if it is `by` itself.

    "auto" gives "both" if the file names hold frame numbers, else "features". "sequence" and "both" give
    "none" if they hold none: numbers that repeat, names without a common pattern (hashes), and numbers that
    put most chips into one sequence would give one label to chips of different vehicles.

    Args:
        by: "auto", or as in `cluster_chips`.
        names, sequence_gap: of `cluster_chips`.

    Raises:
        SettingError: sequences are asked for, and a name has no number.
    """
    if by in ("features", "none") or len(names) < 2:
        return "none" if by == "auto" else by, ""
    if by == "auto":
        reason = _no_tracks(names, sequence_gap)
        chosen = "features" if reason else "both"
        reason = reason or "the numbers in the file names give the sequences, the features split them"
        return chosen, f"CLUSTER_BY=auto: {chosen}; {reason}"
    reason = _no_frame_numbers(names, sequence_gap)
    if not reason:
        return by, ""
    return "none", (
        f"CLUSTER_BY={by} is not used, each chip is predicted by itself: {reason}. CLUSTER_BY=features clusters "
        "without numbers"
    )


def _no_tracks(names, sequence_gap):
    """Why neighbouring numbers in the names are not frames of one vehicle, in words; "" if they may be."""
    if all(RELEASE_2021.fullmatch(PurePath(name).stem) for name in names):
        return "the chips are named as in 2021/22, where neighbouring numbers are different vehicles of one frame"
    if not all(re.search("[0-9]", PurePath(name).stem) for name in names):
        return "some file names hold no number"
    return _no_frame_numbers(names, sequence_gap)


def _no_frame_numbers(names, sequence_gap):
    """Why the numbers in the names cannot be frame numbers, in words; "" if they can."""
    patterns = Counter(re.sub("[0-9]+", "#", PurePath(name).stem) for name in names)
    numbered = sum("#" in pattern for pattern in patterns)
    if numbered > 1 and len(patterns) * PER_PATTERN > len(names):
        return f"the file names have no common pattern ({named(names, 2)})"
    numbers = chip_numbers(names)
    _, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts[inverse] > 1)
    if len(shared) > SHARED * len(names):
        examples = [names[i] for i in np.flatnonzero(inverse == inverse[shared[0]])]
        return f"{len(shared)} of {len(names)} chips have the same number as another one ({named(examples, 2)})"
    gaps = np.flatnonzero(np.diff(np.sort(numbers)) > sequence_gap) + 1
    longest = np.diff(gaps, prepend=0, append=len(names)).max()
    if len(names) > HANDFUL and longest > LONGEST * len(names):
        return f"one sequence would hold {longest} of {len(names)} chips (SEQUENCE_GAP={sequence_gap})"
    return ""


def chip_numbers(names):
    """The frame number of each chip, int64 [N], read from its file name.

    Of the runs of digits in a stem it is the one that has the most different values over all names, such as
    01001 in HB01001.006.png and 1001 in chip1001_000.png; of several the last one. Runs are compared by
    their position from the end of the stem, and from its start where some names have more runs than others.

    Raises:
        SettingError: a name has no digits.
    """
    # The last 18 digits are as many as int64 takes.
    runs = [[int(run[-18:]) for run in re.findall("[0-9]+", PurePath(name).stem)] for name in names]
    if without := [name for name, digits in zip(names, runs, strict=True) if not digits]:
        raise SettingError(
            f"'{without[0]}' has no number in its name, so it belongs to no sequence; set "
            "CLUSTER_BY=features or CLUSTER_BY=none"
        )
    counts = {len(digits) for digits in runs}
    least = min(counts, default=0)
    positions = [*range(-1, -1 - least, -1), *(range(least) if len(counts) > 1 else ())]
    columns = [np.array([digits[i] for digits in runs], np.int64) for i in positions]
    return max(columns, key=lambda column: len(np.unique(column)), default=np.zeros(0, np.int64))


def _k_means(features, clusters):
    """Ids of at most `clusters` clusters, int [N]."""
    model = KMeans if len(features) <= LARGE else MiniBatchKMeans
    model = model(min(clusters, len(features)), random_state=0)
    return model.fit_predict(features)


def _cut(features, clusters):
    """Ids of `clusters` clusters, int [N]: by Ward's method, or by k-means for many chips."""
    if len(features) > LARGE:
        return _k_means(features, clusters)
    return AgglomerativeClustering(clusters, linkage="ward").fit_predict(features)


def _split(features, sequences):
    """Cluster ids, int64 [N]: sequences are cut in two as long as the halves show two vehicles.

    features: [N, D] of chips sorted by number; sequences: [N] id of each chip's sequence.
    """
    starts = np.flatnonzero(np.diff(sequences)) + 1
    pending = np.split(np.arange(len(features)), starts)
    features = _fisher(features, pending)
    ids, count = np.empty(len(features), np.int64), 0
    while pending:
        chips = pending.pop()
        halves = _cut(features[chips], 2) if len(chips) >= 4 else np.zeros(len(chips), np.int64)
        if _are_two(features[chips], halves):
            pending += [chips[halves == 0], chips[halves == 1]]
        else:
            ids[chips], count = count, count + 1
    return ids


def _fisher(features, sequences):
    """Features [N, <= AXES] along which the chips differ most, in units of the spread within a patch.

    A patch is a few neighbours within a sequence, so its scatter shows the effect of speckle on one
    vehicle; pooled over all sequences it is a far better estimate than from one sequence (Fisher 1936:
    the axes maximise total over within-patch variance).

    sequences: list of int arrays, the chips of each sequence.
    """
    within = np.zeros_like(features)
    for chips in sequences:
        patches = min(max(len(chips) // PATCH, 2), LARGE // PATCH)
        patch = _cut(features[chips], patches) if len(chips) > patches else np.arange(len(chips))
        for patch_id in np.unique(patch):
            members = chips[patch == patch_id]
            within[members] = features[members] - features[members].mean(0)
    features = features - features.mean(0)
    total, scatter = (x.T @ x / len(x) for x in (features, within))
    shrinkage = SHRINKAGE * (1 + (FEW * len(total) / len(features)) ** 2)
    isotropic = shrinkage * np.trace(scatter) / len(scatter) + FLOOR
    largest = [max(len(total) - AXES, 0), len(total) - 1]
    axes = eigh(total, scatter + isotropic * np.eye(len(total)), subset_by_index=largest)[1]
    return np.round(features @ axes, 3)  # so that equal chips stay equal in spite of rounding errors


def _are_two(features, halves):
    """Whether the halves of a sequence, [N] ids 0 and 1 of chips sorted by number, show two vehicles."""
    sizes = np.bincount(halves)
    sample = slice(None, None, -(-len(halves) // LARGE))
    if len(sizes) < 2 or len(np.unique(halves[sample])) < 2:
        return False
    at_random = 1 - ((sizes / len(halves)) ** 2).sum()  # chance that two frames lie in different halves
    mixed = np.mean(halves[1:] != halves[:-1]) > MIXED * at_random
    needed = SPLIT_MIXED if mixed and sizes.min() >= FRAMES else SPLIT_APART
    return silhouette_score(features[sample], halves[sample]) >= needed
