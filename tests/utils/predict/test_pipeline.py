from dataclasses import replace

from utils.predict.clusters import cluster_chips
from utils.predict.ood import SCORES, cluster_mean, fit_scores
from utils.predict.pipeline import (
    Output,
    PipelineSettings,
    Result,
    calibration_temperature,
    describe_vote,
    nearest_classes,
    ood_confidence,
    run_pipeline,
)
from utils.predict.vote import fit_temperature, vote

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
    logits, features, head, ood, _ = output
    settings = PipelineSettings(score, 2.0, "both", vote="soft", vote_min_share=0.5)
    result = run_pipeline([output], NAMES, settings)
    clusters = cluster_chips(features.numpy(), NAMES, "both")
    assert (result.clusters == clusters).all() and clusters.max() > 0
    assert (result.labels == vote(logits.numpy(), clusters, "soft", 0.5).labels).all()
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


def test_the_mixture_vote_is_calibrated_on_the_validation_chips_of_the_checkpoint():
    output = member(0)
    labels = torch.arange(12) % 3
    validation = {"features": output.features.half(), "labels": labels}
    calibrated = output._replace(validation=validation)
    expected = fit_temperature(output.head(output.features).detach().numpy(), labels.numpy())
    assert calibration_temperature([output]) == calibration_temperature([calibrated, output]) == 1
    assert calibration_temperature([calibrated]) == pytest.approx(expected, rel=0.01)
    assert calibration_temperature([calibrated] * 2) == pytest.approx(expected, rel=0.3)
    result = run_pipeline([calibrated], NAMES, PipelineSettings("energy"))
    clusters = cluster_chips(output.features.numpy(), NAMES, "both")
    logits = output.logits.numpy() / calibration_temperature([calibrated])
    voted = vote(logits, clusters, belief=result.belief)
    assert (result.labels == voted.labels).all() and result.belief <= vote(logits, clusters).belief
    assert result.calibrated and not run_pipeline([calibrated, output], NAMES, PipelineSettings("energy")).calibrated


def test_the_cluster_score_follows_the_belief_in_the_clusters(monkeypatch):
    output, settings = member(0), PipelineSettings("gaussian_energy", cluster_by="sequence")
    for belief, form, same in ((0.0, "mean", "none"), (0.0, "features", "none"), (1.0, "mean", "mean"),
                               (1.0, "features", "features")):  # fmt: skip
        monkeypatch.setattr("utils.predict.pipeline.belief_in_clusters", lambda *_, s=belief: s)
        mixed = run_pipeline([output], NAMES, replace(settings, cluster_score=form))
        plain = run_pipeline([output], NAMES, replace(settings, vote="product", cluster_score=same))
        np.testing.assert_allclose(mixed.confidence, plain.confidence, rtol=1e-5)


def many_chips(seed=0):
    """An Output of 600 chips in 3 classes, with validation chips; names of tracks of 6; the true classes."""
    random, output = np.random.default_rng(seed), member(0)
    centres = 2 * random.normal(size=(3, 8))
    tracks = random.integers(0, 3, 100)
    classes, known = np.repeat(tracks, 6), np.repeat([0, 1, 2], 100)
    features, labelled = (
        torch.from_numpy(centres[of] + 1.5 * random.normal(size=(len(of), 8))).float() for of in (classes, known)
    )
    head = torch.nn.Linear(8, 3)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(centres / 1.5**2))
        head.bias.copy_(torch.from_numpy(-(centres**2).sum(1) / 2 / 1.5**2))
        logits = head(features)
    names = [f"Gotcha{1000 * (i // 6) + i % 6}.png" for i in range(600)]
    validation = {"features": labelled, "labels": torch.from_numpy(known)}
    return output._replace(logits=logits, features=features, head=head, validation=validation), names, classes


@pytest.mark.parametrize("cluster_by", ["sequence", pytest.param("both", marks=pytest.mark.slow)])
def test_numbers_are_believed_where_they_mean_something(cluster_by):
    output, names, classes = many_chips()
    settings = PipelineSettings("energy", cluster_by=cluster_by)
    result = run_pipeline([output], names, settings)
    without_vote = (result.probabilities.argmax(1) == classes).mean()
    assert result.belief > 0.9 and (result.labels == classes).mean() > without_vote
    shuffled = run_pipeline([output], np.random.default_rng(1).permutation(names), settings)
    assert shuffled.belief < 0.1 and (shuffled.labels == classes).mean() > without_vote - 0.01
    by_features = replace(settings, cluster_by="features")
    result = run_pipeline([output], names, by_features)
    assert (result.labels == classes).mean() > without_vote - 0.01
    assert run_pipeline([output._replace(validation={})], names, by_features).belief == 0


def test_clusters_of_labelled_chips_are_as_large_as_those_whose_belief_they_measure(monkeypatch):
    output, names, _ = many_chips()
    asked = []

    def capture(features, names, by, clusters, *others):
        asked.append((len(features), clusters))
        return cluster_chips(features, names, by, clusters, *others)

    monkeypatch.setattr("utils.predict.pipeline.cluster_chips", capture)
    run_pipeline([output], names, PipelineSettings("energy", cluster_by="features", clusters=20))
    assert asked == [(600, 20), (300, 10)]


def test_class_shares_undo_what_a_shifted_network_prefers():
    output, names, classes = many_chips()
    shifted = output._replace(logits=output.logits + torch.tensor([4.0, 0.0, -4.0]))
    accuracy = {}
    for share in (0.0, 1.0):
        settings = PipelineSettings("energy", cluster_by="sequence", class_shares=share)
        counted = shifted._replace(validation=shifted.validation | {"counts": torch.from_numpy(np.bincount(classes))})
        result = run_pipeline([counted], names, settings)
        accuracy[share] = (result.labels == classes).mean()
        without_counts = run_pipeline([shifted], names, settings)
        assert not without_counts.shift.any() and (share or (without_counts.labels == result.labels).all())
        assert np.array_equal(result.probabilities, without_counts.probabilities)
    assert accuracy[1.0] > accuracy[0.0] + 0.05
    assert result.shift.argmax() == 2 and result.shift.argmin() == 0
    shuffled = run_pipeline([counted], np.random.default_rng(1).permutation(names), settings)
    assert abs(shuffled.shift).max() < 0.1 * abs(result.shift).max()  # numbers that are not believed move nothing


def test_what_the_vote_did_in_words():
    names = np.array([0, 0, 1, 1, 2])
    shift = np.array([0.24, -0.5, 0.26])
    result = Result(np.eye(3)[[0, 1, 2, 2, 1]], None, names, np.array([0, 0, 2, 1, 1]), 0.5, True, shift, None, None)
    start = (
        "2 of 5 labels changed; belief in the clusters 0.50 of 1; labels still differ in 1 of 2 clusters of several "
        "chips"
    )
    moved = "; class shares moved towards those of val/, from b (-0.5) to c (+0.3)"
    assert describe_vote(result, "abc") == start + moved
    without = result._replace(shift=0 * shift)
    assert describe_vote(without, "abc") == start
    single_chips = without._replace(clusters=np.arange(5), labels=without.probabilities.argmax(1))
    assert describe_vote(single_chips, "abc") == "0 of 5 labels changed; each chip is a cluster of its own"
    not_calibrated = "; not calibrated, since the checkpoints have no labelled chips in common"
    assert describe_vote(without._replace(calibrated=False), "abc") == start + not_calibrated
    assert describe_vote(without, "abc", 0.5).startswith(f"{start}; CLASS_SHARES moved nothing: it needs")


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
    for logits, features, _, ood, _ in members:
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
