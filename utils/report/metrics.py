"""The scores of the challenge, computed with scikit-learn."""

import warnings

import numpy as np
from sklearn.metrics import auc, balanced_accuracy_score, roc_curve

SCORES = ("accuracy", "mean per-class accuracy", "AUROC", "FPR at 95 % TPR", "total")


def scores(predicted, confidence, labels, ood):
    """Scores of a prediction of N chips.

    Args:
        predicted: [N] int, predicted classes.
        confidence: [N] float; higher is more in distribution.
        labels: [N] int, true classes; any value where `ood`.
        ood: [N] bool, True for chips out of distribution.

    Returns:
        dict of floats 0..1, in the order of SCORES: "accuracy" and "mean per-class accuracy" of the chips in
        distribution; "AUROC" of the confidence, chips in distribution against the others; "FPR at 95 % TPR",
        the share of out-of-distribution chips above the threshold that 95 % of the chips in distribution
        reach; "total" = 0.75 accuracy + 0.25 AUROC. A score that is undefined is nan: all of them without
        chips in distribution, the last three without chips out of distribution.
    """
    known = ~ood
    result = dict.fromkeys(SCORES, float("nan"))
    if known.any():
        result["accuracy"] = float(np.mean(predicted[known] == labels[known]))
        result["mean per-class accuracy"] = class_mean_accuracy(predicted[known], labels[known])
    if known.any() and ood.any():
        fpr, tpr, _ = roc_curve(known, confidence, drop_intermediate=False)
        result["AUROC"] = float(auc(fpr, tpr))
        result["FPR at 95 % TPR"] = float(fpr[np.searchsorted(tpr, 0.95)])
    result["total"] = 0.75 * result["accuracy"] + 0.25 * result["AUROC"]
    return result


def undefined(ood):
    """Which scores are undefined for a reference with these flags, as a line of text; "" if none is.

    Args:
        ood: [N] bool, True for chips out of distribution.
    """
    if ood.all():
        return "\nno chip of the reference is in distribution: all scores are undefined (-)"
    if not ood.any():
        return "\nno chip of the reference is out of distribution: AUROC, FPR and total are undefined (-)"
    return ""


def class_mean_accuracy(predicted, labels):
    """Accuracy per class, averaged over the classes that occur in `labels`; both are [N] int."""
    # scikit-learn warns of a class that is predicted but does not occur, and of a single class.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", message="A single label was found")
        return float(balanced_accuracy_score(labels, predicted))


def intervals(predicted, confidence, labels, ood, groups, resamples=500):
    """95 % confidence intervals of the scores, by a bootstrap that draws groups of chips, not chips.

    Chips of one cluster vote together, so their errors are not independent.

    Args:
        predicted, confidence, labels, ood: as of `scores`.
        groups: [N] int, 0..K-1, the group of each chip, such as its cluster.
        resamples: number of bootstrap samples. A score ignores those in which it is undefined.

    Returns:
        {score: (low, high)}; of fewer than two groups nothing is known, and they are nan.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile intervals.
    """
    if groups.max() < 1:
        return dict.fromkeys(SCORES, (float("nan"), float("nan")))
    samples = resampled_scores(predicted, confidence, labels, ood, resampled_groups(groups, resamples))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All-NaN slice")
        return {name: tuple(np.nanquantile(values, (0.025, 0.975))) for name, values in samples.items()}


def resampled_groups(groups, resamples):
    """How often each chip occurs, int [N], in each sample of as many groups as there are, drawn with replacement.

    Args:
        groups: [N] int, 0..K-1.
        resamples: number of samples, which are yielded one by one: all at once would fill the memory.
    """
    random, count = np.random.default_rng(0), int(groups.max()) + 1
    for _ in range(resamples):
        yield random.multinomial(count, np.full(count, 1 / count))[groups]


def resampled_scores(predicted, confidence, labels, ood, repeated):
    """The `scores` of samples in which chips are repeated: {score: [R]}.

    Args:
        predicted, confidence, labels, ood: as of `scores`, [N].
        repeated: for each of R samples how often each chip occurs in it, [N], 0 or more times.
    """
    known, right = ~ood, ~ood & (predicted == labels)
    order = np.argsort(-confidence, kind="stable")
    thresholds = np.flatnonzero(np.diff(confidence[order], append=np.nan) != 0)  # the last chip of each value
    samples = []
    for weights in repeated:
        sample = dict.fromkeys(SCORES, float("nan"))
        samples.append(sample)
        count = weights @ known, weights @ ood
        if not count[0]:
            continue
        sample["accuracy"] = weights @ right / count[0]
        of_class = np.bincount(labels[known], weights[known])
        right_of_class = np.bincount(labels[right], weights[right], len(of_class))
        sample["mean per-class accuracy"] = (right_of_class[of_class > 0] / of_class[of_class > 0]).mean()
        if not count[1]:
            continue
        tpr, fpr = (np.cumsum((weights * flag)[order])[thresholds] for flag in (known, ood))
        tpr, fpr = tpr / count[0], fpr / count[1]
        sample["AUROC"] = auc(np.append(0, fpr), np.append(0, tpr))
        sample["FPR at 95 % TPR"] = fpr[(tpr >= 0.95).argmax()]
        sample["total"] = 0.75 * sample["accuracy"] + 0.25 * sample["AUROC"]
    return {name: np.array([sample[name] for sample in samples]) for name in SCORES}
