"""From logits and features to clusters, labels and confidence: what follows the networks, for all callers.

    features, file names -> clusters
    logits -> class shares moved -> vote within clusters -> labels, and how far each chip belongs to its cluster
    features -> OOD score of each chip -> mean over its cluster, as far as the chip belongs to it -> confidence
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from utils.predict.clusters import LARGE, chip_numbers, cluster_chips
from utils.predict.ood import SCORES, cluster_mean
from utils.predict.vote import estimate_belief, fit_temperature, measure_belief, shift_to_shares, vote

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 4096  # chips scored at a time, to bound the memory of a score
SHUFFLES = 5  # of the numbers of FEW chips; of more chips one is enough
FEW = 1000


class Output(NamedTuple):
    """What one network computes for N chips, averaged over its views.

    logits: [N, C], features: [N, D], float32 on the device.
    head: [N, D] -> [N, C], the network's head on the same device.
    ood: {score name: {tensor name: tensor}}, "ood" of its checkpoint.
    validation: {"features": [M, D], "labels": int64 [M]} of labelled chips, "validation" of its checkpoint, with
        "counts", int64 [C], if these are chips of val/: how many each class has there. Empty if it has none.
    """

    logits: torch.Tensor
    features: torch.Tensor
    head: Callable
    ood: dict
    validation: dict = {}


@dataclass(frozen=True)
class PipelineSettings:
    """See the constants of results.py with the same names.

    ood_score: name in `utils.predict.ood.SCORES`; temperature: its OOD_TEMPERATURE.
    cluster_score: "features" scores the mean features of a chip's cluster, "mean" takes the mean score
        of the cluster, both as far as the vote counts the chip to its cluster; "none" the chip's own score.
    class_shares: 0..1, how far the mixture vote moves the classes' shares to those of val/ (`shift_to_shares`), times
        its belief in the clusters.
    """

    ood_score: str
    temperature: float = 1.0
    cluster_by: str = "both"
    clusters: int = 0
    sequence_gap: int = 100
    vote: str = "mixture"
    vote_min_share: float = 0.0
    cluster_score: str = "mean"
    class_shares: float = 0.0


class Result(NamedTuple):
    """Prediction of N chips; all are arrays in host memory.

    probabilities: [N, C] before the vote.
    features: [N, D] that the chips were clustered by.
    clusters: int64 [N], 0..K-1.
    labels: int64 [N] after the vote, positions in the checkpoint's classes.
    belief: float 0..1, how far the vote believes the clusters.
    calibrated: False if the mixture vote found no labelled chips, the same in all checkpoints, to calibrate by.
    shift: [C], what the vote added to the logits to move the classes' shares; 0 = nothing.
    chip_confidence: [N], each chip's own; higher = more in distribution.
    confidence: [N], by cluster_score.
    """

    probabilities: np.ndarray
    features: np.ndarray
    clusters: np.ndarray
    labels: np.ndarray
    belief: float
    calibrated: bool
    shift: np.ndarray
    chip_confidence: np.ndarray
    confidence: np.ndarray


@torch.no_grad()
def run_pipeline(outputs, names, settings):
    """The Result for N chips.

    Several outputs are the members of an ensemble. Its probabilities are the mean of the members'
    probabilities, its features the members' L2-normalised features side by side, its confidence that of
    `ood_confidence`.

    Args:
        outputs: list of Output, of the same chips and classes.
        names: N file names.
        settings: PipelineSettings.

    Raises:
        SettingError: of `cluster_chips` and `vote`.
    """
    logits = _mean_logits([output.logits for output in outputs])
    features, host_logits = _joint_features([output.features for output in outputs]), logits.cpu().numpy()
    clusters = cluster_chips(features, names, settings.cluster_by, settings.clusters, settings.sequence_gap)
    belief, calibrated, shift = 0.0, True, np.zeros(host_logits.shape[1])
    if settings.vote == "mixture" and settings.cluster_by != "none":
        validation = _validation(outputs)
        calibrated = validation is not None
        host_logits = host_logits / _temperature(validation)
        belief = belief_in_clusters(validation, host_logits, features, names, settings, clusters)
        counts = outputs[0].validation.get("counts")
        if validation and counts is not None and settings.class_shares:
            # A move of the shares pays where chips vote; a chip by itself is better off without it.
            shift = belief * settings.class_shares * shift_to_shares(host_logits, counts)
            host_logits = host_logits + shift
    voted = vote(host_logits, clusters, settings.vote, settings.vote_min_share, belief)
    own = confidence = ood_confidence(outputs, settings.ood_score, settings.temperature).cpu().numpy()
    if settings.cluster_score == "mean":
        confidence = _shared(own[:, None], clusters, voted.share)[:, 0]
    elif settings.cluster_score == "features":
        shared = [_with_shared_features(output, clusters, voted.share) for output in outputs]
        confidence = ood_confidence(shared, settings.ood_score, settings.temperature).cpu().numpy()
    probabilities = logits.softmax(1).cpu().numpy()
    return Result(probabilities, features, clusters, voted.labels, voted.belief, calibrated, shift, own, confidence)


def _mean_logits(logits):
    """Log of the members' mean probabilities, [N, C]; of one member its logits."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([values.log_softmax(1) for values in logits]).logsumexp(0) - np.log(len(logits))


def _joint_features(features):
    """The members' L2-normalised features side by side, array [N, D]; of one member its features."""
    joint = torch.cat([F.normalize(values) for values in features], dim=1) if len(features) > 1 else features[0]
    return joint.cpu().numpy()


@torch.no_grad()
def _validation(outputs):
    """Logits [M, C], features [M, D] and labels [M] of the labelled chips in the checkpoints, or None."""
    labels = [output.validation.get("labels") for output in outputs]
    if any(other is None or not torch.equal(other, labels[0]) for other in labels):
        return None
    features = [output.validation["features"].to(output.features) for output in outputs]
    logits = _mean_logits([output.head(values) for output, values in zip(outputs, features, strict=True)])
    return logits.cpu().numpy(), _joint_features(features), labels[0].numpy()


def calibration_temperature(outputs):
    """`fit_temperature` on the labelled chips in the checkpoints; 1.0 without any."""
    return _temperature(_validation(outputs))


def _temperature(validation):
    return fit_temperature(validation[0], validation[2]) if validation else 1.0


def belief_in_clusters(validation, logits, features, names, settings, clusters):
    """How far the mixture vote believes the clusters, 0..1.

    Clusters by features are believed as far as those of the labelled chips in the checkpoints deserve it, and
    not at all without such chips, because chips with alike features have alike predictions, right or wrong. Clusters
    by numbers are believed as far as the chips' predictions agree, beyond the most that they do with shuffled numbers.

    Args:
        validation: of `_validation`; names, settings: of `run_pipeline`.
        logits: [N, C], calibrated; features: [N, D]; clusters: int [N] of these chips.
    """
    if settings.cluster_by == "features":
        if validation is None:
            return 0.0
        size = len(clusters) / (clusters.max() + 1)  # clusters of other sizes deserve another belief
        logits, features, labels = validation
        number = min(max(1, round(len(labels) / size)), LARGE)
        clusters = cluster_chips(features, np.arange(len(labels)), "features", number)
        return measure_belief(logits / _temperature(validation), clusters, labels)
    belief = estimate_belief(logits, clusters)
    if not belief:
        return 0.0
    # Of many chips the first ones along the numbers are enough.
    chips = np.argsort(chip_numbers(names), kind="stable")[:CHUNK]
    names, logits, features = np.asarray(names)[chips], logits[chips], features[chips]
    random, by_chance = np.random.default_rng(0), []
    for _ in range(SHUFFLES if len(chips) <= FEW else 1):
        shuffled = random.permutation(names)
        shuffled = cluster_chips(features, shuffled, settings.cluster_by, sequence_gap=settings.sequence_gap)
        by_chance.append(estimate_belief(logits, shuffled))
    chance = min(max(by_chance), 0.99)
    return max(0.0, (belief - chance) / (1 - chance))


def ood_confidence(outputs, score_name, temperature=1.0):
    """Confidence [N] on the device; higher = more in distribution.

    Of one member it is the score itself. Of several members it is the mean of their scores; a score with
    a fit is first standardised, (score - location) / spread over the member's training chips, because
    its scale depends on the features. Scores of logits are comparable as they are.
    """
    score, scores = SCORES[score_name], []
    for output in outputs:
        device = output.features.device
        fitted = score.fit and {name: value.to(device) for name, value in output.ood[score_name].items()}
        chunks = zip(output.logits.split(CHUNK), output.features.split(CHUNK), strict=True)
        values = torch.cat([score.score(*chunk, fitted, temperature) for chunk in chunks])
        if fitted and len(outputs) > 1:
            values = (values - fitted["location"]) / fitted["spread"].clamp_min(1e-12)
        scores.append(values)
    return torch.stack(scores).mean(0)


def describe_vote(result, classes, class_shares=0.0):
    """What the vote did, in words; classes: C names; class_shares: of `PipelineSettings`."""
    changed = (result.labels != result.probabilities.argmax(1)).sum()
    several = (np.bincount(result.clusters) > 1).sum()
    labels_of_cluster = np.unique(np.stack((result.clusters, result.labels)), axis=1)[0]
    differ = (np.bincount(labels_of_cluster) > 1).sum()
    words = f"{changed} of {len(result.labels)} labels changed; "
    if several:
        words += f"belief in the clusters {result.belief:.2f} of 1; labels still differ in {differ} of {several} "
        words += "clusters of several chips"
    else:
        words += "each chip is a cluster of its own"
    if not result.calibrated:
        words += "; not calibrated, since the checkpoints have no labelled chips in common"
    if result.shift.any():
        most, least = result.shift.argmax(), result.shift.argmin()
        words += f"; class shares moved towards those of val/, from {classes[least]} ({result.shift[least]:+.1f}) to "
        words += f"{classes[most]} ({result.shift[most]:+.1f})"
    elif class_shares:
        words += (
            "; CLASS_SHARES moved nothing: it needs the vote \"mixture\", clusters that are believed, and a checkpoint "
            "of finetune.py from a data set with labelled chips in val/"
        )
    return words


def nearest_classes(output):
    """Classes, int64 [N, C], in the order of the distance from their mean training features to each chip.

    None if the checkpoint holds no Gaussians.
    """
    if "gaussian_energy" not in output.ood:
        return None
    means = output.ood["gaussian_energy"]["mean"].to(output.features)
    return torch.cdist(output.features, means).argsort(1).cpu().numpy()


def _with_shared_features(output, clusters, share):
    """The output with the features of `_shared`."""
    shared = _shared(output.features.cpu().numpy(), clusters, share)
    shared = torch.from_numpy(shared).to(output.features)
    return output._replace(logits=output.head(shared), features=shared)


def _shared(values, clusters, share):
    """Values [N, D], each moved towards the mean of its cluster by its share, 0..1 [N], which also weighs the mean."""
    share = share[:, None]
    mean = cluster_mean(values * share, clusters) / np.maximum(cluster_mean(share, clusters), 1e-12)
    return values + share * (mean - values)
