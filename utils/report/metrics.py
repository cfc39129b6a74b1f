"""The challenge's scores, by scikit-learn."""

import warnings

import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, roc_curve


def scores(predicted, confidence, labels, ood):
    """Scores of a prediction.

    Args:
        predicted: [N] class positions; confidence: [N], higher = more in distribution;
        labels: [N], anything where ood; ood: [N] bool.

    Returns:
        dict of floats 0..1: "accuracy" and "mean per-class accuracy" over the chips in
        distribution, "AUROC" of in- against out-of-distribution chips, "FPR at 95 % TPR" (OOD
        chips passed where 95 % of the others are), "total" = 0.75 accuracy + 0.25 AUROC. nan
        where it is undefined: without chips in distribution, or without any out of it.
    """
    known = ~ood
    found = dict.fromkeys(
        ("accuracy", "mean per-class accuracy", "AUROC", "FPR at 95 % TPR", "total"), float("nan")
    )
    if known.any():
        found["accuracy"] = float(np.mean(predicted[known] == labels[known]))
        found["mean per-class accuracy"] = class_mean_accuracy(predicted[known], labels[known])
    if known.any() and ood.any():
        found["AUROC"] = float(roc_auc_score(known, confidence))
        passed, kept, _ = roc_curve(known, confidence, drop_intermediate=False)
        found["FPR at 95 % TPR"] = float(passed[np.searchsorted(kept, 0.95)])
    found["total"] = 0.75 * found["accuracy"] + 0.25 * found["AUROC"]
    return found


def undefined(ood):
    """A line on the scores that a reference with these flags, [N] bool, cannot give; else ""."""
    if ood.all():
        return "\nno chip of the reference is in distribution: all scores are undefined (-)"
    if not ood.any():
        return "\nno chip of the reference is out of distribution: AUROC, FPR and total are undefined (-)"
    return ""


def class_mean_accuracy(predicted, labels):
    """Mean over the classes that occur in `labels` of the share of their chips that is right."""
    # A class that is only ever predicted has no accuracy; scikit-learn leaves it out too.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        return float(balanced_accuracy_score(labels, predicted))


def intervals(predicted, confidence, labels, ood, groups, resamples=500):
    """95 % intervals of the scores, by a bootstrap over groups of chips that stand or fall together.

    Args:
        predicted, confidence, labels, ood: of `scores`.
        groups: [N] ids, 0..K-1, such as the clusters that voted.
        resamples: number of them; where a score is undefined, they count for the others.

    Returns:
        {score: (low, high)}.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile intervals.
    """
    random = np.random.default_rng(0)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    found = []
    for _ in range(resamples):
        drawn = random.integers(len(members), size=len(members))
        chips = np.concatenate([members[group] for group in drawn])
        found.append(scores(predicted[chips], confidence[chips], labels[chips], ood[chips]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        return {
            name: tuple(np.nanquantile([one[name] for one in found], (0.025, 0.975))) for name in found[0]
        }
