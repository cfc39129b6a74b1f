"""The vote that gives every chip of a cluster the winner's label."""

from utils.run.rules import VOTE as HOW
from utils.run.settings import SettingError

import numpy as np
from scipy.special import log_softmax, softmax


def vote(logits, clusters, how="hard", min_share=0.0):
    """Labels after the vote, int64 [N]: each chip takes the winner of its cluster.

    Args:
        logits: float [N, C].
        clusters: int [N], any ids.
        how: "hard" counts the chips' labels, "soft" sums their probabilities, "product" multiplies
            them, so that one chip that is sure against a label outweighs many that are unsure (Kittler
            et al., "On Combining Classifiers", 1998). Ties go to the label with the higher summed
            probability. Only labels that some chip of the cluster has can win.
        min_share: a cluster whose winner has less than this share (0..1) of the counted votes
            ("hard"), of the summed probability ("soft") or of its geometric mean ("product") keeps
            the labels of its chips.

    Raises:
        SettingError: `how` is unknown.
    """
    if how not in HOW:
        raise SettingError(f"VOTE is one of {', '.join(HOW)}, not '{how}'")
    logits = np.asarray(logits, np.float64)
    labels = logits.argmax(1)
    ids, clusters = np.unique(clusters, return_inverse=True)

    def cluster_means(values):
        sums = np.zeros((len(ids), values.shape[1]))
        np.add.at(sums, clusters, values)
        return sums / np.bincount(clusters)[:, None]

    counted = cluster_means(np.eye(logits.shape[1])[labels])
    summed = cluster_means(softmax(logits, 1))
    if how == "product":
        shares = softmax(cluster_means(log_softmax(logits, 1)), 1)
    else:
        shares = counted if how == "hard" else summed
    votes = np.where(counted > 0, shares, 0)
    winners = np.where(votes == votes.max(1, keepdims=True), summed, -1).argmax(1)
    winning_share = votes[np.arange(len(ids)), winners]
    return np.where(winning_share[clusters] >= min_share, winners[clusters], labels)
