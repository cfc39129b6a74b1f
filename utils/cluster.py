"""Clusters of test chips, and the vote that gives every chip of a cluster the winner's label."""

import re
from pathlib import PurePath

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans, MiniBatchKMeans
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

BY = ("features", "sequence", "both", "none")
HOW = ("hard", "soft")
LARGE = 2000  # chips above which k-means works on mini-batches and silhouettes on a sample
SPLIT = 0.25  # silhouette above which two halves of a sequence count as two vehicles


def cluster_chips(features, names, by="both", clusters=0, sequence_gap=100):
    """int64 [N] cluster ids 0..K-1."""
    if by not in BY:
        raise ValueError(f"Clusters are made by {', '.join(BY)}, not by '{by}'.")
    features, names = np.asarray(features), np.asarray(names, dtype=str)
    if len(features) != len(names):
        raise ValueError(f"{len(features)} rows of features but {len(names)} names: give one each.")
    if by == "none" or len(names) < 2:
        return np.arange(len(names))
    # One canonical order first: seeded k-means would otherwise depend on the order of the input.
    order = np.lexsort((features[:, 0], names))
    unit = normalize(features[order])
    if by == "features":
        found = _k_means(unit, clusters)
    else:
        found = _sequences(names[order], sequence_gap)
        if by == "both":
            found = _split(unit, found)
    ids = np.empty(len(names), np.int64)
    ids[order] = np.unique(found, return_inverse=True)[1]
    return ids


def vote(logits, clusters, how="hard", min_share=0.0):
    """int64 [N] labels."""
    if how not in HOW:
        raise ValueError(f"Votes are counted {' or '.join(HOW)}, not '{how}'.")
    logits = np.asarray(logits, np.float64)
    labels = logits.argmax(1)
    _, clusters = np.unique(clusters, return_inverse=True)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    shape = (clusters.max(initial=-1) + 1, logits.shape[1])
    counts, sums = np.zeros(shape), np.zeros(shape)
    np.add.at(counts, (clusters, labels), 1)
    np.add.at(sums, clusters, probabilities)
    votes = counts if how == "hard" else np.where(counts > 0, sums, 0)
    winners = np.where(votes == votes.max(1, keepdims=True), sums, -1).argmax(1)
    total = (counts if how == "hard" else sums).sum(1)
    share = votes[np.arange(len(votes)), winners] / total
    return np.where(share[clusters] >= min_share, winners[clusters], labels)


def _sequences(names, gap):
    numbers = np.empty(len(names), np.int64)
    for i, name in enumerate(names):
        digits = re.findall(r"\d+", PurePath(name).stem)
        if not digits:
            raise ValueError(f"'{name}' has no number in its name: cluster by 'features' instead.")
        numbers[i] = int(digits[-1])
    order = np.argsort(numbers, kind="stable")
    ids = np.empty(len(names), np.int64)
    ids[order] = np.cumsum(np.diff(numbers[order], prepend=numbers[order[0]]) > gap)
    return ids


def _split(features, sequences):
    ids, count = np.zeros(len(features), np.int64), 0
    todo = [np.flatnonzero(sequences == s) for s in np.unique(sequences)]
    while todo:
        chips = todo.pop()
        halves = _halves(features[chips])
        if halves is None:
            ids[chips], count = count, count + 1
        else:
            todo += [chips[halves == 0], chips[halves == 1]]
    return ids


def _halves(x):
    if len(x) < 6:
        return None
    halves = AgglomerativeClustering(2).fit_predict(x)
    if min(np.bincount(halves)) < 3 or silhouette_score(x, halves) < SPLIT:
        return None
    return halves


def _k_means(features, clusters):
    k = min(clusters or round(len(features) ** 0.5), len(features))
    model = KMeans if len(features) <= LARGE else MiniBatchKMeans
    return model(k, random_state=0, n_init=3).fit_predict(features)
