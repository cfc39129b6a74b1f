"""Out-of-distribution confidence from the energy, on the head's logits or on Gaussian ones."""

from data.errors import DataError

import numpy as np
import torch
from sklearn.covariance import LedoitWolf


def confidence(logits, temperature=1.0):
    """In-distribution confidence T logsumexp(f / T): minus the energy; higher = more in distribution.

    Args:
        logits: f, [N, C]: the head's logits, or log densities log p(c) + log p(z | c).
        temperature: T > 0.

    Returns:
        [N], dtype of the logits.

    Source: Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, eq. 4:
    E(x) = -T logsumexp(f(x) / T) is low for chips in distribution.
    """
    return temperature * torch.logsumexp(logits / temperature, dim=1)


def cluster_mean(values, clusters):
    """Mean over the chips of the same cluster: [N, ...] values, [N] ids 0..K-1 -> [N, ...]."""
    counts = np.bincount(clusters)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, clusters, values)
    return (sums / counts.reshape(-1, *[1] * (values.ndim - 1)))[clusters]


def fit_gaussians(features, labels, counts):
    """One Gaussian per class over the features, with a shared covariance (Ledoit-Wolf).

    Args:
        features: [N, D] array; labels: [N], 0..C-1; counts: [C], chips of each class in training.

    Returns:
        dict of float64 tensors: "mean" [C, D], "precision" [D, D], "log_prior" [C]
        (-inf for a class without chips), and "log_det" [] of the precision.

    Raises:
        DataError: the features do not vary within the classes.

    Source: Ledoit and Wolf, J. Multivariate Analysis 88, 2004, in scikit-learn.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    mean = np.zeros((len(counts), features.shape[1]))
    np.add.at(mean, labels, features)
    mean /= np.maximum(np.bincount(labels, minlength=len(counts)), 1)[:, None]
    spread = LedoitWolf(store_precision=False, assume_centered=True).fit(features - mean[labels])
    if np.trace(spread.covariance_) <= 1e-10 * np.square(features).sum(1).mean():  # rounding, at most
        raise DataError(
            "in every class all training chips have the same features, so that their spread is "
            "unknown: the chips are empty, copies, or one for each class; give others"
        )
    precision = np.linalg.inv(spread.covariance_)  # shrunk, so never singular
    with np.errstate(divide="ignore"):
        log_prior = np.log(counts / counts.sum())
    fitted = {"mean": mean, "precision": precision, "log_prior": log_prior}
    fitted["log_det"] = np.linalg.slogdet(precision)[1]
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in fitted.items()}


def log_densities(features, gaussians, background=0.0):
    """log N(z; mu_c, Sigma) - background log N(z; mu, Sigma + B): the logits of the generative head.

    mu is the mean of all training chips and B the covariance of the class means about it. The second
    term discounts the directions in which classes do not differ; without it they outvote the few in
    which they do.

    Args:
        features: z, [N, D]; gaussians: of fit_gaussians, on the same device; background: 0 to 1.

    Returns:
        [N, C] float64; -inf for a class without training chips.

    Source: Ren et al., "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection", 2021,
    where background is 1.
    """
    features, mean, share = features.double(), gaussians["mean"], gaussians["log_prior"].softmax(0)
    white = torch.linalg.cholesky(gaussians["precision"])  # features @ white have unit covariance
    exactly = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(features @ white, mean @ white, compute_mode=exactly)
    found = 0.5 * (gaussians["log_det"] - distance**2)
    if background:
        apart = (mean - share @ mean) * share.sqrt()[:, None]
        spread = torch.linalg.cholesky(torch.cholesky_inverse(white) + apart.T @ apart)
        away = torch.linalg.solve_triangular(spread, (features - share @ mean).T, upper=False)
        of_all = -0.5 * away.square().sum(0) - spread.diagonal().log().sum()
        found = found - background * of_all[:, None]
    constant = 0.5 * (1 - background) * features.shape[1] * float(np.log(2 * np.pi))
    return torch.where(share > 0, found - constant, -torch.inf)
