from dataclasses import replace

from utils.predict.clusters import cluster_chips
from utils.predict.ood import SCORES, cluster_mean, fit_scores
from utils.predict.pipeline import Output, PipelineSettings, nearest_classes, ood_confidence, run_pipeline
from utils.predict.vote import vote

import numpy as np
import pytest
import torch

NAMES = [f"Gotcha{number}.png" for number in [*range(6), *range(500, 506)]]


def member(seed, width=8):
    """An Output for 12 chips in 3 classes, and its training features."""
    random = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], 30)
    known = random.normal(size=(90, width)) + 2 * labels[:, None]
    fitted = fit_scores(known.astype(np.float32), labels, np.array([30, 30, 30]))
    torch.manual_seed(seed)
    head = torch.nn.Linear(width, 3)
    features = torch.from_numpy(random.normal(size=(12, width)) + random.integers(0, 3, (12, 1)) * 2).float()
    return Output(head(features).detach(), features, head, fitted)


@pytest.mark.parametrize("score", SCORES)
def test_one_member_step_by_step(score):
    output = member(0)
    logits, features, head, ood = output
    settings = PipelineSettings(score, 2.0, "both", vote="soft", vote_min_share=0.5)
    result = run_pipeline([output], NAMES, settings)
    clusters = cluster_chips(features.numpy(), NAMES, "both")
    assert (result.clusters == clusters).all() and clusters.max() > 0
    assert (result.labels == vote(logits.numpy(), clusters, "soft", 0.5)).all()
    assert (result.features == features.numpy()).all()
    torch.testing.assert_close(torch.from_numpy(result.probabilities), logits.softmax(1))
    own = SCORES[score].score(logits, features, ood.get(score), 2.0).numpy()
    np.testing.assert_allclose(result.chip_confidence, own)
    means = torch.from_numpy(cluster_mean(features.numpy(), clusters)).float()
    expected = {
        "none": own,
        "mean": cluster_mean(own, clusters),
        "features": SCORES[score].score(head(means).detach(), means, ood.get(score), 2.0).numpy(),
    }
    for cluster_score, confidence in expected.items():
        result = run_pipeline([output], NAMES, replace(settings, cluster_score=cluster_score))
        np.testing.assert_allclose(result.confidence, confidence, rtol=1e-6)


def test_an_ensemble_averages_probabilities_and_puts_features_side_by_side():
    members = [member(0), member(1, width=5)]
    result = run_pipeline(members, NAMES, PipelineSettings("gaussian_energy", cluster_by="none"))
    probabilities = sum(output.logits.softmax(1) for output in members) / 2
    torch.testing.assert_close(torch.from_numpy(result.probabilities), probabilities)
    assert (result.labels == probabilities.argmax(1).numpy()).all()
    assert result.features.shape == (12, 13)
    np.testing.assert_allclose(np.linalg.norm(result.features[:, :8], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(result.features[:, 8:], axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_an_ensemble_averages_standardised_confidences(score):
    members, expected = [member(0), member(1, width=5)], 0
    for logits, features, _, ood in members:
        values = SCORES[score].score(logits, features, ood.get(score))
        if score in ood:
            values = (values - ood[score]["location"]) / ood[score]["spread"]
        expected = expected + values / 2
    torch.testing.assert_close(ood_confidence(members, score), expected)


def test_a_scale_of_the_features_does_not_give_a_member_more_weight():
    one, two = member(0), member(1)
    large = fit_large(two, 100.0)
    for score in ("gaussian_energy", "relative_mahalanobis", "knn"):
        expected = ood_confidence([one, two], score)
        torch.testing.assert_close(ood_confidence([one, large], score), expected, rtol=1e-3, atol=1e-3)


def fit_large(output, factor):
    """The output as if its network gave features `factor` times as large."""
    random, labels = np.random.default_rng(1), np.repeat([0, 1, 2], 30)
    known = factor * (random.normal(size=(90, 8)) + 2 * labels[:, None])
    fitted = fit_scores(known.astype(np.float32), labels, np.array([30, 30, 30]))
    return output._replace(features=output.features * factor, ood=fitted)


def test_many_chips_are_scored_in_parts(monkeypatch):
    output = member(0)
    expected = ood_confidence([output], "knn")
    monkeypatch.setattr("utils.predict.pipeline.CHUNK", 5)
    torch.testing.assert_close(ood_confidence([output], "knn"), expected)


def test_nearest_classes_are_by_the_distance_to_their_mean():
    output = member(0)
    means = output.ood["gaussian_energy"]["mean"].float()
    nearest = nearest_classes(output._replace(features=means[[2, 0, 1]]))
    assert nearest[:, 0].tolist() == [2, 0, 1] and nearest.shape == (3, 3)
    assert nearest_classes(output._replace(ood={})) is None
