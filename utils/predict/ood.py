"""Out-of-distribution scores. All are confidences: higher = more in distribution.

Each score in the dictionary SCORES is a pair:

    fit(features [N, D], labels [N], counts [C], background) -> {name: tensor}, or None if nothing is fitted
    score(logits [N, C], features [N, D], fitted, temperature=1.0) -> confidence [N]

The fit gets arrays, and `background` as a number. A score with a fit uses the features alone: its scale is taken when
it is fitted, before the head is trained, and `logits` is None then.

`score` takes the device from its tensors, never waits for the device, and uses matrix products only, so
that it runs in an exported program. A further score is one function (two with a fit) and one line in SCORES.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from data.errors import DataError
from data.split import few_of_each

import numpy as np
import torch
import torch.nn.functional as F

NEIGHBOURS = 10  # nearest training features that the score "knn" averages over
KNN_CHIPS = 300  # training chips of each class that it stores, at most


class Score(NamedTuple):
    """A score: see the top of this file."""

    fit: Callable | None
    score: Callable


def energy(logits, features, fitted, temperature=1.0):
    """Minus the energy of the logits: T logsumexp(f / T).

    Source: Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, eq. 4:
    E(x) = -T logsumexp(f(x) / T) is low for chips in distribution.
    """
    return temperature * torch.logsumexp(logits / temperature, dim=1)


def max_softmax(logits, features, fitted, temperature=1.0):
    """The highest probability: max_c softmax(f / T).

    Source: Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
    Examples in Neural Networks", ICLR 2017; the temperature is that of Liang et al., "ODIN", ICLR 2018.
    """
    return torch.softmax(logits / temperature, dim=1).amax(1)


def max_logit(logits, features, fitted, temperature=1.0):
    """The highest logit: max_c f. The temperature has no effect.

    Source: Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings", ICML 2022.
    """
    return logits.amax(1)


def fit_gaussians(features, labels, counts, background=0.75):
    """One Gaussian per class, N(mu_c, Sigma), and one of all training chips, N(mu, Sigma + B).

    Sigma is the Ledoit-Wolf covariance within the classes, mu the mean of the class means weighted by
    `counts`, and B the covariance of the class means about mu.

    Args:
        features: [N, D] array.
        labels: [N], 0..C-1.
        counts: [C], training chips of each class; 0 for a class without chips.
        background: weight 0..1 of the Gaussian of all training chips in "gaussian_energy".

    Returns:
        dict of float64 tensors: "mean" [C, D] of the classes (0 for a class without chips); "log_prior" [C]
        (-inf for such a class); "white" [D, D], where z @ white has unit covariance within a class;
        "log_det" [], log |Sigma^-1|; "background_white" and "background_log_det", the same for
        (Sigma + B)^-1; "background" [].

    Raises:
        DataError: the features do not vary within the classes, or are those of two chips.

    Source: Ledoit and Wolf, J. Multivariate Analysis 88, 2004, in scikit-learn.
    """
    from sklearn.covariance import LedoitWolf  # here, because scoring does not need scikit-learn

    features, labels, counts = np.asarray(features, np.float64), np.asarray(labels), np.asarray(counts)
    mean = np.zeros((len(counts), features.shape[1]))
    np.add.at(mean, labels, features)
    mean /= np.maximum(np.bincount(labels, minlength=len(counts)), 1)[:, None]
    within = LedoitWolf(store_precision=False, assume_centered=True).fit(features - mean[labels]).covariance_
    # Rounding, at most; or two chips in all, which Ledoit-Wolf does not shrink.
    if np.trace(within) <= 1e-10 * np.square(features).sum(1).mean() or len(features) <= 2:
        raise DataError(
            "in every class all training chips have the same features, or there are two chips in all, so their "
            "covariance is unknown: the chips are empty, copies, or too few; give others"
        )
    share = counts / counts.sum()
    between = (mean - share @ mean) * np.sqrt(share)[:, None]
    with np.errstate(divide="ignore"):
        fitted = {"mean": mean, "log_prior": np.log(share), "background": background}
    for name, covariance in {"": within, "background_": within + between.T @ between}.items():
        precision = np.linalg.inv(covariance)  # Ledoit-Wolf shrinks it, so it is not singular
        fitted[f"{name}white"] = np.linalg.cholesky(precision)
        fitted[f"{name}log_det"] = np.linalg.slogdet(precision)[1]
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in fitted.items()}


def mahalanobis(features, fitted):
    """Squared Mahalanobis distances to the Gaussians of `fit_gaussians`, float64.

    Returns:
        [N, C] to the classes, inf for a class without training chips; [N] to all training chips.
    """
    share = fitted["log_prior"].softmax(0)
    centre = share @ fitted["mean"]
    # Distances are taken about the centre, because |x|^2 - 2 x.y + |y|^2 loses digits far from the origin.
    features, mean = features.double() - centre, fitted["mean"] - centre
    points, centres = features @ fitted["white"], mean @ fitted["white"]
    to_classes = points.square().sum(1, keepdim=True) - 2 * points @ centres.T + centres.square().sum(1)
    to_all = (features @ fitted["background_white"]).square().sum(1)
    return torch.where(share > 0, to_classes.clamp_min(0), torch.inf), to_all


def log_densities(features, fitted):
    """log N(z; mu_c, Sigma) - b log N(z; mu, Sigma + B): the logits of a generative head.

    b is the "background" of the fit. The second term discounts the directions in which classes do not
    differ; without it these outweigh the few directions in which they do.

    Args:
        features: z, [N, D]; fitted: of `fit_gaussians`, on the same device.

    Returns:
        [N, C] float64; -inf for a class without training chips.

    Source: Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021,
    where b = 1.
    """
    to_classes, to_all = mahalanobis(features, fitted)
    background = fitted["background"]
    constant = 0.5 * features.shape[1] * math.log(2 * math.pi)
    of_class = 0.5 * (fitted["log_det"] - to_classes) - constant
    of_all = 0.5 * (fitted["background_log_det"] - to_all) - constant
    return of_class - background * of_all[:, None]


def gaussian_energy(logits, features, fitted, temperature=1.0):
    """Minus the energy of the Gaussians' log densities g: T logsumexp(g / T), float64, in nats.

    Source: `energy` on the logits of `log_densities`.
    """
    return energy(log_densities(features, fitted), features, None, temperature)


def relative_mahalanobis(logits, features, fitted, temperature=1.0):
    """Minus the relative Mahalanobis distance: -min_c (M_c(z) - M(z)), float64.

    M_c and M are the squared Mahalanobis distances to the class and to all training chips. The
    temperature has no effect.

    Source: Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021.
    """
    to_classes, to_all = mahalanobis(features, fitted)
    return to_all - to_classes.amin(1)


def fit_knn(features, labels, counts, background=0.75):
    """{"features": float16 [M, D]}: L2-normalised features of at most KNN_CHIPS chips of each class."""
    chips = few_of_each(np.asarray(labels), KNN_CHIPS)
    return {"features": F.normalize(torch.as_tensor(np.asarray(features)[chips])).half()}


def knn(logits, features, fitted, temperature=1.0):
    """Minus the mean distance to the NEIGHBOURS nearest training features, all L2-normalised: -2..0, float64.

    The temperature has no effect.

    Source: Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022, who take
    the distance to the k-th neighbour; the mean over k neighbours varies less.
    """
    known = F.normalize(fitted["features"].double())  # again: float16 changes the length
    nearest = (F.normalize(features.double()) @ known.T).topk(min(NEIGHBOURS, len(known)), dim=1).values
    return -(2 - 2 * nearest).clamp_min(0).sqrt().mean(1)


SCORES = {
    "energy": Score(None, energy),
    "gaussian_energy": Score(fit_gaussians, gaussian_energy),
    "max_softmax": Score(None, max_softmax),
    "max_logit": Score(None, max_logit),
    "knn": Score(fit_knn, knn),
    "relative_mahalanobis": Score(fit_gaussians, relative_mahalanobis),
}
DEFAULT = "gaussian_energy"  # where a checkpoint holds its fit; else NO_FIT
NO_FIT = "energy"


def fit_scores(features, labels, counts, background=0.75):
    """The fits of all scores that need one, on training chips.

    Args:
        features: [N, D] array; labels: [N], 0..C-1; counts: [C] training chips of each class.
        background: 0..1, of `fit_gaussians`.

    Returns:
        {score name: {tensor name: tensor}}. Each also holds "location" and "spread" [], the mean and the
        standard deviation of that score on these chips, by which the members of an ensemble are combined.
        Scores with the same fit share its tensors, in a checkpoint's file too.

    Raises:
        DataError: of `fit_gaussians`; or a score does not keep to what the top of this file says.
    """
    fits = {score.fit for score in SCORES.values() if score.fit}
    fits = {fit: fit(features, labels, counts, background) for fit in fits}
    chips, fitted = torch.as_tensor(np.asarray(features)), {}
    for name, score in SCORES.items():
        if score.fit:
            values = fits[score.fit]
            if not isinstance(values, dict) or not all(map(torch.is_tensor, values.values())):
                raise DataError(f"the fit of the OOD score {name!r} does not return a dictionary of tensors")
            confidence = score.score(None, chips, values)
            if confidence.shape != (len(chips),):
                raise DataError(f"the OOD score {name!r} gives {list(confidence.shape)} for [{len(chips)}] chips")
            moments = {"location": confidence.mean(), "spread": confidence.std(correction=0)}
            fitted[name] = values | moments
    return fitted


def cluster_mean(values, clusters):
    """Mean over the chips of the same cluster: [N, ...] values, [N] ids 0..K-1 -> [N, ...]."""
    counts = np.bincount(clusters)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, clusters, values)
    return (sums / counts.reshape(-1, *[1] * (values.ndim - 1)))[clusters]
