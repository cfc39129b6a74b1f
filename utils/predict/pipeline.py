"""From logits and features to clusters, labels and confidence: what follows the networks, for all callers.

    logits -> probabilities -> vote within clusters -> labels
    features -> clusters -> mean features of each cluster -> OOD score -> confidence
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from utils.predict.clusters import cluster_chips
from utils.predict.ood import SCORES, cluster_mean
from utils.predict.vote import vote

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 4096  # chips scored at a time, to bound the memory of a score


class Output(NamedTuple):
    """What one network computes for N chips, averaged over its views.

    logits: [N, C], features: [N, D], float32 on the device.
    head: [N, D] -> [N, C], the network's head on the same device.
    ood: {score name: {tensor name: tensor}}, "ood" of its checkpoint.
    """

    logits: torch.Tensor
    features: torch.Tensor
    head: Callable
    ood: dict


@dataclass(frozen=True)
class PipelineSettings:
    """See the constants of results.py with the same names.

    ood_score: name in `utils.predict.ood.SCORES`; temperature: its OOD_TEMPERATURE.
    cluster_score: "features" scores the mean features of a chip's cluster, "mean" takes the mean score
        of the cluster, "none" the chip's own score.
    """

    ood_score: str
    temperature: float = 1.0
    cluster_by: str = "both"
    clusters: int = 0
    sequence_gap: int = 100
    vote: str = "product"
    vote_min_share: float = 0.0
    cluster_score: str = "features"


class Result(NamedTuple):
    """Prediction of N chips; all are arrays in host memory.

    probabilities: [N, C] before the vote.
    features: [N, D] that the chips were clustered by.
    clusters: int64 [N], 0..K-1.
    labels: int64 [N] after the vote, positions in the checkpoint's classes.
    chip_confidence: [N], each chip's own; higher = more in distribution.
    confidence: [N], by cluster_score.
    """

    probabilities: np.ndarray
    features: np.ndarray
    clusters: np.ndarray
    labels: np.ndarray
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
    logits, features = outputs[0].logits, outputs[0].features
    if len(outputs) > 1:
        log_probabilities = torch.stack([output.logits.log_softmax(1) for output in outputs])
        logits = log_probabilities.logsumexp(0) - np.log(len(outputs))
        features = torch.cat([F.normalize(output.features) for output in outputs], dim=1)
    features = features.cpu().numpy()
    clusters = cluster_chips(features, names, settings.cluster_by, settings.clusters, settings.sequence_gap)
    labels = vote(logits.cpu().numpy(), clusters, settings.vote, settings.vote_min_share)
    own = confidence = ood_confidence(outputs, settings.ood_score, settings.temperature).cpu().numpy()
    if settings.cluster_score == "mean":
        confidence = cluster_mean(own, clusters)
    elif settings.cluster_score == "features":
        means = [_of_cluster_mean(output, clusters) for output in outputs]
        confidence = ood_confidence(means, settings.ood_score, settings.temperature).cpu().numpy()
    return Result(logits.softmax(1).cpu().numpy(), features, clusters, labels, own, confidence)


def ood_confidence(outputs, score_name, temperature=1.0):
    """Confidence [N] on the device; higher = more in distribution.

    Of one member it is the score itself. Of several members it is the mean of their scores; a score with
    a fit is first standardised, (score - location) / spread over the member's training chips, because
    its scale depends on the features. Scores of logits are comparable as they are.
    """
    score, scores = SCORES[score_name], []
    for logits, features, _, ood in outputs:
        fitted = score.fit and {name: value.to(features.device) for name, value in ood[score_name].items()}
        chunks = zip(logits.split(CHUNK), features.split(CHUNK), strict=True)
        values = torch.cat([score.score(*chunk, fitted, temperature) for chunk in chunks])
        if fitted and len(outputs) > 1:
            values = (values - fitted["location"]) / fitted["spread"].clamp_min(1e-12)
        scores.append(values)
    return torch.stack(scores).mean(0)


def nearest_classes(output):
    """Classes, int64 [N, C], in the order of the distance from their mean training features to each chip.

    None if the checkpoint holds no Gaussians.
    """
    if "gaussian_energy" not in output.ood:
        return None
    means = output.ood["gaussian_energy"]["mean"].to(output.features)
    return torch.cdist(output.features, means).argsort(1).cpu().numpy()


def _of_cluster_mean(output, clusters):
    """The output with each chip's features replaced by the mean over its cluster."""
    mean = torch.from_numpy(cluster_mean(output.features.cpu().numpy(), clusters)).to(output.features)
    return output._replace(logits=output.head(mean), features=mean)
