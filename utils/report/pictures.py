"""The pictures of the report, one function each; `utils.report.page` puts them on a page.

Each function takes a `utils.report.prediction.Prediction` and returns a `matplotlib.figure.Figure`, or None
if there is nothing to draw. Its name is the name of the PNG. To add a picture, write its function and add it
with its caption to CAPTIONS, and to NEEDS_TRUTH if it uses the reference.
"""

from utils.report.figures import COLOURS, subplots

import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay, roc_curve

MAX_NAMES = 60  # classes; with more, the confusion matrix has no names and the map no legend
MAX_MAPPED = 1500  # chips on the map of features; of more, an evenly spaced sample
BINS = 10  # of the reliability diagram
HISTOGRAM_RANGE = 4  # interquartile ranges below and above the quartiles that the histogram covers
MAX_SHOWN = 12  # clusters, and wrong chips, that are shown
CLUSTER_CHIPS = 10  # chips that are shown of a cluster
MARKERS = "osD^vP*X"


def confusion(prediction):
    """Confusion matrix of the chips in distribution, each row divided by its sum."""
    matrix, names = prediction.confusion, printable(prediction.classes)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 3 + 0.45 * min(len(names), MAX_NAMES)
    figure, axis = subplots(size=(side + 1, side))
    if len(names) <= MAX_NAMES:
        display = ConfusionMatrixDisplay(shares, display_labels=names)
        display.plot(ax=axis, cmap="cividis", xticks_rotation="vertical", values_format=".2f", colorbar=False)
    else:
        axis.imshow(shares, cmap="cividis")
        axis.set(xlabel="Predicted label", ylabel="True label")
    axis.set_title("share of each true class")
    return figure


def recall(prediction):
    """Recall and number of training chips of each class, the class with most training chips first."""
    matrix, counts = prediction.confusion, np.array(prediction.counts)
    order = np.argsort(-counts, kind="stable")[:MAX_NAMES]
    names, total = printable(prediction.classes), matrix.sum(1)
    values = matrix.diagonal() / np.maximum(total, 1)
    figure, (left, right) = subplots(1, 2, size=(8, 1.2 + 0.32 * len(order)), sharey=True)
    positions = np.arange(len(order))
    left.barh(positions, values[order], color=COLOURS[0])
    for position, label in enumerate(order):
        text = f"{total[label]} chips" if total[label] else "none in the test"
        left.text(0.01, position, text, va="center", fontsize=8,
                  color="white" if values[label] > 0.15 else None)  # fmt: skip
    right.barh(positions, np.maximum(counts[order], 0.8), color=COLOURS[1])
    right.set(xscale="log", xlim=(0.7, 10 ** np.ceil(np.log10(counts.max() + 1))), title="training chips")
    right.xaxis.set_minor_formatter("")
    left.set(yticks=positions, yticklabels=[names[i] for i in order], xlim=(0, 1), title="recall")
    left.invert_yaxis()
    return figure


def reliability(prediction):
    """Share of correct chips over the probability of the predicted class, before the vote."""
    known = prediction.in_distribution
    probability = prediction.probabilities.max(1)[known]
    correct = (prediction.labels_before_vote == prediction.truth.labels)[known]
    share, mean = calibration_curve(correct, probability, n_bins=BINS)
    figure, axis = subplots(size=(5, 4.2))
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axis.plot(mean, share, marker="o", color=COLOURS[0])
    axis.set(xlabel="probability of the predicted class", ylabel="share of correct chips", xlim=(0, 1))
    axis.set(ylim=(0, 1), title=f"reliability, ECE {calibration_error(probability, correct):.3f}")
    return figure


def confidence(prediction):
    """Histogram of the confidence in and out of distribution, with the threshold at 95 % TPR."""
    figure, axis = subplots(size=(6, 3.8))
    # Empty chips can lie a hundred times as far out as all others.
    low, high = np.quantile(prediction.confidence, (0.25, 0.75))
    margin = HISTOGRAM_RANGE * (high - low)
    values = prediction.confidence.clip(low - margin, high + margin)
    bins = np.linspace(values.min(), values.max(), 41) if low < high else 10
    if prediction.truth is None:
        axis.hist(values, bins, color=COLOURS[0])
    else:
        known = prediction.in_distribution
        if known.any():
            axis.hist(values[known], bins, density=True, color=COLOURS[0], alpha=0.6, label="in distribution")
            threshold = np.quantile(prediction.confidence[known], 0.05)
            axis.axvline(threshold, color="grey", linestyle="--", label="threshold at 95 % TPR")
        if not known.all():
            axis.hist(values[~known], bins, density=True, histtype="step", linewidth=2, color=COLOURS[3],
                      label="out of distribution")  # fmt: skip
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    axis.set(xlabel="confidence; the outermost bars include all values beyond them", yticks=[])
    return figure


def roc(prediction):
    """ROC curve of the confidence, chips in distribution against the others; None if there are no others."""
    if prediction.in_distribution.all():
        return None
    fpr, tpr, _ = roc_curve(prediction.in_distribution, prediction.confidence)
    figure, axis = subplots(size=(4.6, 4.2))
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axis.plot(fpr, tpr, color=COLOURS[0], linewidth=2)
    axis.axhline(0.95, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel="false positive rate (out of distribution)", title="ROC")
    axis.set(ylabel="true positive rate (in distribution)")
    return figure


def feature_map(prediction):
    """The features in two dimensions by predicted class, with a ring around chips out of distribution."""
    chips, positions = map_positions(prediction.features)
    labels, names = prediction.labels[chips], printable(prediction.classes)
    figure, axis = subplots(size=(7.5, 6.5))
    for label in np.unique(labels):
        cycle, index = divmod(label, len(COLOURS))  # the next cycle shifts the markers
        axis.scatter(*positions[labels == label].T, s=16, label=names[label], color=COLOURS[index],
                     marker=MARKERS[(index + cycle) % len(MARKERS)])  # fmt: skip
    if prediction.truth is not None and prediction.truth.ood[chips].any():
        axis.scatter(*positions[prediction.truth.ood[chips]].T, s=60, facecolors="none", edgecolors="dimgrey",
                     linewidths=0.7, label="out of distribution")  # fmt: skip
    if len(names) <= MAX_NAMES:
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, markerscale=1.5)
    axis.set(xticks=[], yticks=[])
    return figure


def clusters(prediction):
    """The largest clusters, one per row: some of their chips, their votes and, if known, their classes."""
    ids, sizes = np.unique(prediction.clusters, return_counts=True)
    largest = ids[np.argsort(-sizes, kind="stable")][:MAX_SHOWN]
    figure, axes = subplots(len(largest), 2, size=(11, 0.8 * len(largest) + 0.2), squeeze=False, width_ratios=(3, 2))
    names = printable(prediction.classes)
    for (strip_axis, text_axis), cluster in zip(axes, largest, strict=True):
        chips = np.flatnonzero(prediction.clusters == cluster)
        _draw_strip(strip_axis, prediction.chips(chips[:: -(-len(chips) // CLUSTER_CHIPS)]))
        votes = _most_frequent(prediction.labels_before_vote[chips], names, 3)
        text = f"{len(chips)} chips: {', '.join(votes)}"
        if prediction.truth is not None:
            known = prediction.in_distribution[chips]
            true = _most_frequent(prediction.truth.labels[chips][known], names, 2)
            true += [] if known.all() else [f"{(~known).sum()} out of distribution"]
            text += f"\ntruth: {', '.join(true)}"
        text_axis.text(0, 0.5, text, va="center", fontsize=9)
        text_axis.set_axis_off()
    return figure


def mistakes(prediction):
    """The wrong chips in distribution with the highest probability; None if there are no wrong chips."""
    wrong = np.flatnonzero(prediction.in_distribution & (prediction.labels != prediction.truth.labels))
    probability = prediction.probabilities[wrong, prediction.labels[wrong]]
    wrong = wrong[np.argsort(-probability, kind="stable")][:MAX_SHOWN]
    if not len(wrong):
        return None
    names = printable(prediction.classes)
    rows = -(-len(wrong) // 4)
    figure, axes = subplots(rows, 4, size=(10, 3.1 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, index, chip in zip(axes.flat, wrong, prediction.chips(wrong), strict=False):
        axis.imshow(chip, cmap="gray", vmin=0, vmax=255)
        text = f"true: {names[prediction.truth.labels[index]]}\npredicted: {names[prediction.labels[index]]}"
        if prediction.nearest is not None:
            text += f"\nnearest: {', '.join(names[i] for i in prediction.nearest[index][:2])}"
        axis.set_title(text, fontsize=8)
    return figure


def map_positions(features):
    """Chips on the map of features and their positions.

    Args:
        features: [N, D], D >= 2.

    Returns:
        indices [M] of the chips, evenly spaced, M <= MAX_MAPPED; positions [M, 2] by PCA and t-SNE, or, of
        30 chips or fewer, or if all have the same features, their first two features.
    """
    chips = np.arange(len(features))[:: -(-len(features) // MAX_MAPPED)]
    features = features[chips]
    if len(chips) > 30 and np.ptp(features, axis=0).any():  # t-SNE divides by the spread
        features = PCA(min(30, features.shape[1]), random_state=0).fit_transform(features)
        features = TSNE(perplexity=min(30, len(chips) / 4), random_state=0).fit_transform(features)
    return chips, features[:, :2]


def calibration_error(probability, correct, bins=BINS):
    """Expected calibration error, 0..1.

    The sum over the bins of |accuracy - mean probability|, weighted by the share of chips in the bin.

    Args:
        probability: [N] float, 0..1, of the predicted class.
        correct: [N] bool.
        bins: number of bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    bin_of = np.minimum((probability * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, correct - probability, bins)
    return float(np.abs(gap).sum() / len(probability))


def printable(names):
    """Class names for matplotlib: bytes that are not UTF-8 become "?", and $ does not start a formula."""
    return [name.encode(errors="replace").decode().replace("$", r"\$") for name in names]


def _most_frequent(labels, names, count):
    """The most frequent labels as "number name", at most `count` of them."""
    numbers = np.bincount(labels, minlength=len(names))
    return [f"{numbers[i]} {names[i]}" for i in np.argsort(-numbers, kind="stable")[:count] if numbers[i]]


def _draw_strip(axis, chips):
    """Draw chips [B, S, S] side by side; the strip has room for CLUSTER_CHIPS."""
    side = chips.shape[1]
    strip = np.full((side, (side + 2) * CLUSTER_CHIPS), np.nan)
    for position, chip in enumerate(chips):
        strip[:, position * (side + 2) :][:, :side] = chip
    axis.imshow(strip, cmap="gray", vmin=0, vmax=255)
    axis.set_axis_off()


CAPTIONS = {  # in the order of the page
    confusion: "Confusion matrix of the chips in distribution, after the vote.",
    recall: "Recall of each class and its number of training chips, to show the long tail.",
    reliability: "Share of correct predictions over the predicted probability, before the vote. A calibrated "
    "network lies on the diagonal.",
    confidence: "Confidence of the chips. 5 % of the chips in distribution lie below the dashed threshold.",
    feature_map: "The features of the chips by t-SNE, coloured by predicted class.",
    clusters: "The largest clusters and their votes.",
    roc: "How well the confidence separates chips in distribution from the others, over all thresholds.",
    mistakes: "Wrong predictions with the highest probability, and the two classes whose mean training "
    "feature is nearest.",
}
NEEDS_TRUTH = (confusion, recall, reliability, roc, mistakes)
