"""The vote within each cluster of chips.

A cluster claims that its chips show one object. "mixture" believes that as far as it was told or as far as the
chips' own predictions agree; the other votes believe it wholly and give all chips of a cluster the label of the
winner ("winner takes all").
"""

from typing import NamedTuple

from utils.predict.ood import cluster_mean
from utils.run.rules import VOTE as HOW
from utils.run.settings import SettingError

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

BELIEFS = np.linspace(0, 1, 101)  # values of s that are compared
GAIN = 3.0  # in log likelihood over s = 0, from which s is believed: 20 times as likely
LEAST = -30.0  # log probability below which a chip does not count further against a class
PRIOR_ROUNDS = 100  # of `estimate_prior`
SHARE_ROUNDS, CLOSE = 200, 1e-3  # of `shift_to_shares`: until every share is as near as this, relative
FEW = 10  # chips a class; so many test chips are moved half as far as a great many
TEMPERATURES = 0.1, 10.0  # limits of T


class Vote(NamedTuple):
    """The result of a vote over N chips in K clusters, C classes.

    labels: int64 [N].
    share: float [N], 0..1: how far each chip counts as a chip of its cluster's object. 1 for all votes
        other than "mixture".
    belief: float 0..1, how far the clusters are believed: s of "mixture", else 1.
    """

    labels: np.ndarray
    share: np.ndarray
    belief: float


def vote(logits, clusters, how="mixture", min_share=0.0, belief=None):
    """The labels after the vote, as a `Vote`.

    Args:
        logits: float [N, C].
        clusters: int [N], any ids.
        how: "mixture" (`mixture_vote`), or one winner for each cluster: "hard" counts the chips' labels,
            "soft" sums their probabilities, "product" multiplies them, so that one chip that is sure
            against a label outweighs many that are unsure (Kittler et al., "On Combining Classifiers",
            1998). Ties go to the label with the higher summed probability. Only labels that some chip of
            the cluster has can win.
        min_share: of one winner: a cluster whose winner has less than this share (0..1) of the counted
            votes ("hard"), of the summed probability ("soft") or of its geometric mean ("product")
            keeps the labels of its chips.
        belief: s of "mixture", 0..1; None = `estimate_belief`.

    Raises:
        SettingError: `how` is unknown.
    """
    if how not in HOW:
        raise SettingError(f"VOTE is one of {', '.join(HOW)}, not '{how}'")
    logits, clusters = np.asarray(logits, np.float64), np.unique(clusters, return_inverse=True)[1]
    if how == "mixture":
        return mixture_vote(logits, clusters, estimate_belief(logits, clusters) if belief is None else belief)
    return Vote(_winners(logits, clusters, how, min_share), np.ones(len(logits)), 1.0)


def mixture_vote(logits, clusters, belief):
    """The vote of a mixture: a chip shows its cluster's object with probability s, else any object.

    With p_i(c) the softmax of the logits of chip i and uniform classes, chip i has the likelihood
    s C p_i(c) + 1 - s if its cluster's class is c. Their geometric mean over the chips of a cluster gives the class of
    the cluster, and not their product, for the chips of one object err together: ten of them say little more than one.
    The posterior of a chip's label follows from both of its cases. s = 1 gives a cluster one label, as the vote
    "product" does, which admits only labels that some chip has; s = 0 is no vote.

    Args:
        logits: float [N, C]; their softmax should be calibrated, see `fit_temperature`.
        clusters: int [N], 0..K-1.
        belief: s, 0..1.

    Returns:
        Vote.

    Source: Genest and Zidek, "Combining Probability Distributions", Statistical Science 1986, for the geometric mean
    of opinions that are not independent.
    """
    posterior, share = _posterior(logits, clusters, belief)
    return Vote(posterior.argmax(1), share, belief)


def _posterior(logits, clusters, belief):
    """Posterior [N, C] of the labels, and share [N], as of `mixture_vote`."""
    log_p = _log_probabilities(logits)
    log_ratio = log_p + np.log(logits.shape[1])  # of a chip's likelihoods: class c against any class
    evidence = _evidence(log_ratio, belief)
    weight = softmax(cluster_mean(evidence, clusters), 1) / np.exp(evidence)
    of_cluster = belief * weight * np.exp(log_ratio)
    by_itself = (1 - belief) * weight.sum(1, keepdims=True) * np.exp(log_p)
    return of_cluster + by_itself, of_cluster.sum(1)


def _log_probabilities(logits):
    return np.maximum(log_softmax(logits, 1), LEAST)


def estimate_belief(logits, clusters):
    """The s of `mixture_vote` with the highest likelihood over all clusters of two chips or more; 0 without any.

    0 also if that likelihood is not clearly higher than that of s = 0, as with predictions that say little.

    Here "any object" is one of the classes as often as they occur (`estimate_prior`), so that many chips which
    look like the most frequent class are no sign that the clusters hold.

    Args:
        logits: float [N, C], calibrated; clusters: int [N], 0..K-1.
    """
    several = np.bincount(clusters) > 1
    if not several.any():
        return 0.0
    log_p = _log_probabilities(logits)
    prior = estimate_prior(np.exp(log_p))
    log_ratio = log_p - logsumexp(log_p, axis=1, b=prior, keepdims=True)

    def log_likelihood(belief):
        total = np.zeros((len(several), len(prior)))
        np.add.at(total, clusters, _evidence(log_ratio, belief))
        return logsumexp(total[several], axis=1, b=prior).sum()

    return _best([log_likelihood(belief) for belief in BELIEFS])


def _best(log_likelihoods):
    """The entry of BELIEFS with the highest log likelihood; 0 if it is not GAIN above that of 0."""
    best = np.argmax(log_likelihoods)
    return float(BELIEFS[best]) if log_likelihoods[best] - log_likelihoods[0] > GAIN else 0.0


def measure_belief(logits, clusters, labels):
    """The s of `mixture_vote` with which the labels of labelled chips have the highest probability; 0 as above.

    Args:
        logits: float [N, C], calibrated; clusters: int [N], 0..K-1; labels: int [N].
    """
    chips = np.arange(len(labels))
    posteriors = (_posterior(logits, clusters, belief)[0] for belief in BELIEFS)
    return _best([np.log(posterior[chips, labels]).sum() for posterior in posteriors])


def estimate_prior(p):
    """How often each class occurs, [C], by expectation maximisation.

    Source: Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural
    Computation 14, 2002.

    Args:
        p: float [N, C] probabilities under equally frequent classes.
    """
    prior = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(PRIOR_ROUNDS):
        posterior = p * prior
        prior = (posterior / posterior.sum(1, keepdims=True)).mean(0)
    return prior


def shift_to_shares(logits, counts):
    """What to add to the logits of the test chips, [C], so that they show the classes as the labelled chips do.

    A network that meets another flight than its training's names some classes far too often, and a vote of chips that
    err alike names them more often still. If the test is put together like the labelled chips of val/, these say how
    often each class should be named. N test chips are moved by N / (N + FEW C) of the way, for few say little.

    Args:
        logits: float [N, C], calibrated.
        counts: [C], labelled chips of each class, of val/; one is added to each.

    Returns:
        float64 [C], with the mean 0. Unknown chips count like others, so that many of them bend it.

    Source: the fixed point that makes the mean of softmax(logits + shift) equal to the shares; Saerens et al.,
    "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural Computation 14, 2002, for posteriors
    under other priors.
    """
    log_p, counts = _log_probabilities(np.asarray(logits, np.float64)), np.asarray(counts, np.float64) + 1
    shares, shift = counts / counts.sum(), np.zeros(len(counts))
    for _ in range(SHARE_ROUNDS):
        step = np.log(shares) - np.log(softmax(log_p + shift, 1).mean(0))
        shift += step
        if abs(step).max() < CLOSE:
            break
    return (shift - shift.mean()) * len(log_p) / (len(log_p) + FEW * len(counts))


def _evidence(log_ratio, belief):
    """log(s r + 1 - s) of each chip, [N, C]."""
    return np.log1p(belief * np.expm1(log_ratio)) if belief < 1 else log_ratio


def fit_temperature(logits, labels):
    """The T at which softmax(logits / T) gives labelled chips the highest likelihood; 1 if all logits are right.

    Without a wrong chip the likelihood rises without end as T falls, so that it says nothing of T.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        logits: float [N, C]; labels: int [N].
    """

    def loss(log_temperature):
        log_p = log_softmax(logits / np.exp(log_temperature), 1)
        return -log_p[np.arange(len(labels)), labels].mean()

    logits = np.asarray(logits, np.float64)
    if (logits.argmax(1) == labels).all():
        return 1.0
    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def _winners(logits, clusters, how, min_share):
    """Labels int64 [N] of a vote with one winner for each cluster; see `vote`."""
    labels = logits.argmax(1)
    counted = cluster_mean(np.eye(logits.shape[1])[labels], clusters)
    summed = cluster_mean(softmax(logits, 1), clusters)
    if how == "product":
        shares = softmax(cluster_mean(log_softmax(logits, 1), clusters), 1)
    else:
        shares = counted if how == "hard" else summed
    votes = np.where(counted > 0, shares, 0)
    winners = np.where(votes == votes.max(1, keepdims=True), summed, -1).argmax(1)
    winning_share = votes[np.arange(len(labels)), winners]
    return np.where(winning_share >= min_share, winners, labels)
