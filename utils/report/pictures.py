"""The pictures of a prediction, one function each; `utils.report.page` puts them on a page.

Each takes what was found (`utils.report.page.Found`) and draws on a figure of its own. Colours are those
of Okabe and Ito, which the colour-blind tell apart, with a marker each beside them.
"""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.calibration import calibration_curve
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import ConfusionMatrixDisplay, roc_curve

LEGIBLE = 60  # classes up to which the confusion matrix is drawn with all names and figures
MAPPED = 1500  # chips on the map of features; of more an even sample
BINS = 10  # of the reliability diagram
REACH = 4  # of the histogram of confidences, in ranges of its middle half
SHOWN = 12  # clusters, and wrong chips, that are shown
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#999999")
MARKERS = "osD^vP*X"


def confusion(found):
    """Share of each true class, row by row."""
    matrix, names = confusion_matrix(found), readable(found.classes)
    few = len(names) <= LEGIBLE
    side = 3 + 0.45 * min(len(names), LEGIBLE)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if few:
        shown = ConfusionMatrixDisplay(shares, display_labels=names)
        shown.plot(ax=axis, cmap="cividis", xticks_rotation="vertical", values_format=".2f", colorbar=False)
    else:
        axis.imshow(shares, cmap="cividis")
    axis.set_title("share of each true class")
    return figure


def recall(found):
    """Recall of each class, most frequent first, beside its number of training chips."""
    matrix, counts = confusion_matrix(found), np.array(found.counts)
    order = np.argsort(-counts, kind="stable")[:LEGIBLE]
    names, total = readable(found.classes), matrix.sum(1)
    share = np.where(total > 0, matrix.diagonal() / np.maximum(total, 1), np.nan)
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(8, 1.2 + 0.32 * len(order)), layout="constrained"
    )
    rows = np.arange(len(order))
    left.barh(rows, np.nan_to_num(share[order]), color=COLOURS[0])
    for row, chips in zip(rows, total[order], strict=True):
        left.text(0.01, row, f"{chips} chips" if chips else "none in the test", va="center", fontsize=8,
                  color="white" if chips and share[order][row] > 0.15 else None)  # fmt: skip
    right.barh(rows, np.maximum(counts[order], 0.8), color=COLOURS[1])
    right.set(xscale="log", xlim=(0.7, 10 ** np.ceil(np.log10(counts.max() + 1))))
    right.xaxis.set_minor_formatter("")
    left.set(yticks=rows, yticklabels=[names[i] for i in order], xlim=(0, 1), title="recall")
    right.set_title("training chips")
    left.invert_yaxis()
    return figure


def reliability(found):
    """Share of right chips against the probability that the network gave; equal on the diagonal."""
    sure, right = found.probabilities.max(1), found.before == found.truth.labels
    sure, right = sure[found.known], right[found.known]
    share, mean = calibration_curve(right, sure, n_bins=BINS)
    figure, axis = plt.subplots(figsize=(5, 4.2), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axis.plot(mean, share, marker="o", color=COLOURS[0])
    axis.set(xlabel="probability of the predicted class", ylabel="share of right chips", xlim=(0, 1))
    axis.set(ylim=(0, 1), title=f"reliability, ECE {calibration_error(sure, right):.3f}")
    return figure


def energy(found):
    """Confidence of the chips in and out of distribution, with the threshold at 95 % TPR."""
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    # Empty chips lie a hundred times as far out as all others.
    low, high = np.quantile(found.score, (0.25, 0.75))
    outer = low - REACH * (high - low), high + REACH * (high - low)
    clipped = found.score.clip(*outer)
    bins = np.linspace(clipped.min(), clipped.max(), 41) if low < high else 10
    if found.truth is None:
        axis.hist(clipped, bins, color=COLOURS[0])
    else:
        for chips, name, colour, filled in (
            (found.known, "in distribution", COLOURS[0], "stepfilled"),
            (~found.known, "out of distribution", COLOURS[3], "step"),
        ):
            if chips.any():
                axis.hist(
                    clipped[chips], bins, density=True, histtype=filled, label=name, color=colour,
                    alpha=0.6 if filled == "stepfilled" else 1, linewidth=2,
                )  # fmt: skip
        if found.known.any():
            threshold = np.quantile(found.score[found.known], 0.05)
            axis.axvline(threshold, color="grey", linestyle="--", label="95 % of those in pass")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    axis.set(xlabel="confidence (minus energy); what lies beyond is at the edges", yticks=[])
    return figure


def roc(found):
    """Chips in distribution that pass, against those out of it, over all thresholds."""
    passed, kept, _ = roc_curve(found.known, found.score)
    figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
    axis.plot(passed, kept, color=COLOURS[0], linewidth=2)
    axis.axhline(0.95, color="grey", linestyle="--", linewidth=1)
    axis.set(xlabel="out of distribution passed", ylabel="in distribution passed", title="ROC")
    return figure


def feature_map(found):
    """The features in two dimensions (t-SNE), by predicted class; rings are out of distribution."""
    chips, places = found.places
    figure, axis = plt.subplots(figsize=(7.5, 6.5), layout="constrained")
    names = readable(found.classes)
    for label in np.unique(found.labels[chips]):
        around, index = divmod(label, len(COLOURS))
        axis.scatter(
            *places[found.labels[chips] == label].T, s=16, label=names[label],
            color=COLOURS[index], marker=MARKERS[(index + around) % len(MARKERS)],
        )  # fmt: skip
    if found.truth is not None and (~found.known[chips]).any():
        axis.scatter(
            *places[~found.known[chips]].T, s=60, facecolors="none",
            edgecolors=matplotlib.rcParams["text.color"], linewidths=0.7, label="out of distribution",
        )  # fmt: skip
    if len(names) <= LEGIBLE:
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, markerscale=1.5)
    axis.set(xticks=[], yticks=[])
    return figure


def places(features):
    """Which chips are on the map, [M] indices, and where, [M, 2]: by t-SNE, few of them by two features."""
    chips = np.arange(len(features))[:: -(-len(features) // MAPPED)]
    features = features[chips]
    if len(chips) > 30:
        features = PCA(min(30, features.shape[1]), random_state=0).fit_transform(features)
        features = TSNE(perplexity=min(30, len(chips) / 4), random_state=0).fit_transform(features)
    return chips, features[:, [0, min(1, features.shape[1] - 1)]]


def clusters(found):
    """The largest clusters, a row each: some of their chips, and how they voted."""
    ids, sizes = np.unique(found.clusters, return_counts=True)
    rows = ids[np.argsort(-sizes, kind="stable")][:SHOWN]
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(11, 0.8 * len(rows) + 0.2), layout="constrained", squeeze=False,
        width_ratios=(3, 2),
    )  # fmt: skip
    names = readable(found.classes)
    for (axis, beside), cluster in zip(axes, rows, strict=True):
        chips = np.flatnonzero(found.clusters == cluster)
        shown = found.chips(chips[:: -(-len(chips) // 10)])
        _strip(axis, [*shown, *[None] * (10 - len(shown))])
        votes = np.bincount(found.before[chips], minlength=len(names))
        counted = [f"{votes[i]} {names[i]}" for i in np.argsort(-votes, kind="stable")[:3] if votes[i]]
        text = f"{len(chips)} chips: {', '.join(counted)}"
        if found.truth is not None:
            known = found.known[chips]
            true = np.bincount(found.truth.labels[chips][known], minlength=len(names))
            told = [f"{true[i]} {names[i]}" for i in np.argsort(-true, kind="stable")[:2] if true[i]]
            out = [f"{(~known).sum()} out of distribution"] if (~known).any() else []
            text += f"\ntruth: {', '.join(told + out)}"
        beside.text(0, 0.5, text, va="center", fontsize=9)
        beside.set_axis_off()
    return figure


def mistakes(found):
    """The chips in distribution that the vote got most surely wrong, with the nearest class centres."""
    wrong = np.flatnonzero(found.known & ~found.right)
    wrong = wrong[np.argsort(-found.probabilities[wrong, found.labels[wrong]], kind="stable")][:SHOWN]
    if not len(wrong):
        return None
    names = readable(found.classes)
    rows = -(-len(wrong) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(10, 3.1 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, chip, picture in zip(axes.flat, wrong, found.chips(wrong), strict=False):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        text = f"{names[found.truth.labels[chip]]}\ntaken for {names[found.labels[chip]]}"
        if found.nearest is not None:
            text += f"\nnear {', '.join(names[i] for i in found.nearest[chip][:2])}"
        axis.set_title(text, fontsize=8)
    return figure


def confusion_matrix(found):
    """Counts [C, C] of the chips in distribution: true class by predicted one."""
    matrix = np.zeros((len(found.classes),) * 2, np.int64)
    np.add.at(matrix, (found.truth.labels[found.known], found.labels[found.known]), 1)
    return matrix


def calibration_error(sure, right, bins=BINS):
    """Expected calibration error: mean over the chips of |share of right - mean probability| of their bin.

    Args:
        sure: [N] probability of the predicted class; right: [N] bool.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    which = np.minimum((sure * bins).astype(int), bins - 1)
    gap = np.bincount(which, right - sure, bins)
    return float(np.abs(gap).sum() / len(sure))


def readable(names):
    """Class names that matplotlib can set: what is no text is replaced, and a $ starts no formula."""
    return [name.encode(errors="replace").decode().replace("$", r"\$") for name in names]


def _strip(axis, pictures):
    """Pictures of one size side by side; None leaves a gap."""
    side = next(picture for picture in pictures if picture is not None).shape[0]
    row = np.full((side, (side + 2) * len(pictures)), np.nan)
    for place, picture in enumerate(pictures):
        if picture is not None:
            row[:, place * (side + 2) : place * (side + 2) + side] = picture
    axis.imshow(row, cmap="gray", vmin=0, vmax=255)
    axis.set_axis_off()


IN_ORDER = (confusion, recall, reliability, energy, feature_map, clusters, roc, mistakes)
WITH_TRUTH = (confusion, recall, reliability, roc, mistakes)
