from data.errors import DataError
from utils.predict import ood
from utils.predict.ood import DEFAULT, SCORES, cluster_mean, fit_gaussians, fit_scores, log_densities

import numpy as np
import pytest
import torch
from pytorch_ood.detector import RMD, EnergyBased, MaxLogit, MaxSoftmax
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

LOGITS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def sample(count, dimensions=5, classes=3):
    """Features [N, D] of overlapping classes with a common covariance, labels [N], counts [C]."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, count)
    mixing = np.eye(dimensions) + 0.2 * random.normal(size=(dimensions, dimensions))
    means = 3 * random.normal(size=(classes, dimensions))
    features = random.normal(size=(count, dimensions)) @ mixing + means[labels]
    return features, labels, np.bincount(labels, minlength=classes)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_scores_of_logits_are_minus_the_outlier_scores_of_pytorch_ood(temperature):
    for name, outlier_score in {
        "energy": EnergyBased.score(LOGITS, t=temperature),
        "max_softmax": MaxSoftmax.score(LOGITS, t=temperature),
        "max_logit": MaxLogit.score(LOGITS),
    }.items():
        torch.testing.assert_close(SCORES[name].score(LOGITS, None, None, temperature), -outlier_score)


@pytest.mark.parametrize("background", [0, 0.75])
def test_gaussians_equal_scipy(background):
    features, labels, counts = sample(300)
    fitted = fit_gaussians(features, labels, counts, background)
    densities = log_densities(torch.from_numpy(features), fitted).numpy()
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    covariance = LedoitWolf(assume_centered=True).fit(features - means[labels]).covariance_
    total = covariance + np.cov(means[labels].T, bias=True)
    of_all = multivariate_normal(features.mean(0), total).logpdf(features)
    for c in range(3):
        expected = multivariate_normal(means[c], covariance).logpdf(features) - background * of_all
        np.testing.assert_allclose(densities[:, c], expected, rtol=1e-9, atol=1e-9)
    energy = SCORES["gaussian_energy"].score(None, torch.from_numpy(features), fitted, 2.0)
    np.testing.assert_allclose(energy, 2 * np.log(np.exp(densities / 2).sum(1)), rtol=1e-9)


def test_relative_mahalanobis_is_that_of_pytorch_ood():
    features, labels, counts = sample(20_000)  # so many that Ledoit-Wolf hardly shrinks
    fitted, points = fit_gaussians(features, labels, counts), torch.from_numpy(features).float()
    reference = RMD(None).fit_features(points, torch.from_numpy(labels))
    points = points[:500]
    to_classes, to_all = reference._calc_gaussian_scores(points), reference._background_score(points)
    expected = (to_classes - to_all[:, None]).amin(1) * len(features)  # it does not divide covariances by N
    confidence = SCORES["relative_mahalanobis"].score(None, points, fitted)
    torch.testing.assert_close(confidence.float(), -expected, rtol=0.01, atol=0.05)


def test_knn_is_that_of_scikit_learn():
    features, labels, counts = sample(600, 16)
    points = features + 0.3
    known = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances, _ = NearestNeighbors(n_neighbors=10).fit(known).kneighbors(
        points / np.linalg.norm(points, axis=1, keepdims=True)
    )
    fitted = ood.fit_knn(features, labels, counts)
    assert fitted["features"].dtype == torch.float16 and len(fitted["features"]) == 600
    confidence = SCORES["knn"].score(None, torch.from_numpy(points), fitted)
    np.testing.assert_allclose(confidence, -distances.mean(1), atol=2e-3)


def test_knn_stores_few_chips_of_each_class_and_takes_fewer_than_its_neighbours():
    labels = np.repeat([0, 1, 2], [1000, 50, 1])
    fitted = ood.fit_knn(np.random.default_rng(0).normal(size=(1051, 4)), labels, np.bincount(labels))
    assert 200 + 51 < len(fitted["features"]) <= 300 + 51
    fitted = ood.fit_knn(np.eye(4)[:3], np.arange(3), np.ones(3))
    assert SCORES["knn"].score(None, torch.eye(4), fitted).isfinite().all()


@pytest.mark.parametrize("name", SCORES)
def test_every_score_is_higher_in_distribution(name):
    features, labels, counts = sample(300)
    fitted = fit_scores(features, labels, counts).get(name)
    logits = torch.tensor([[9.0, 0, 0], [0.1, 0, 0]])
    # Far from all training chips, in a direction in which they hardly vary.
    near = features[0]
    far = features.mean(0) + 1000 * np.linalg.svd(features - features.mean(0))[2][-1]
    confidence = SCORES[name].score(logits, torch.from_numpy(np.stack([near, far])).float(), fitted)
    assert confidence.shape == (2,) and confidence[0] > confidence[1]


@pytest.mark.parametrize("name", [n if n == DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in SCORES])
def test_every_score_is_exported_and_takes_any_number_of_chips(name):
    features, labels, counts = sample(300)
    fitted = fit_scores(features, labels, counts).get(name, {})

    class Scoring(torch.nn.Module):
        def forward(self, logits, points, fitted):
            return SCORES[name].score(logits, points, fitted)

    points = torch.from_numpy(features).float()
    logits, chips = points[:, :3].contiguous(), torch.export.Dim("chips", min=1)
    shapes = ({0: chips}, {0: chips}, dict.fromkeys(fitted))
    example = (logits[:2], points[:2], fitted)
    program = torch.export.export(Scoring(), example, dynamic_shapes=shapes).module()
    for count in (1, 7):
        batch = (logits[:count], points[:count], fitted)
        torch.testing.assert_close(program(*batch), SCORES[name].score(*batch))


def test_absent_classes_never_win():
    random = np.random.default_rng(1)
    labels = np.repeat([0, 2], 100)
    features = random.normal(size=(200, 4)) + labels[:, None]
    fitted = fit_scores(features, labels, np.bincount(labels, minlength=3))
    at_zero = torch.zeros(1, 4)  # where the mean of the absent class would be
    densities = log_densities(at_zero, fitted["gaussian_energy"])
    assert (densities[:, 1] == -torch.inf).all() and densities[:, [0, 2]].isfinite().all()
    without = fit_scores(features, labels // 2, np.array([100, 100]))
    for name in ("gaussian_energy", "relative_mahalanobis"):
        scores = [SCORES[name].score(None, at_zero, fit[name]) for fit in (fitted, without)]
        torch.testing.assert_close(*scores)


def test_features_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="the same features"):
        fit_scores(np.ones((9, 4)), np.arange(9) % 3, np.full(3, 3))


def test_fits_hold_location_and_spread_of_their_score(tmp_path):
    features, labels, counts = sample(200)
    fitted = fit_scores(features.astype(np.float32), labels, counts, background=0.5)
    assert set(fitted) == {name for name, score in SCORES.items() if score.fit}
    for name, fit in fitted.items():
        confidence = SCORES[name].score(None, torch.from_numpy(features).float(), fit).numpy()
        assert fit["location"].item() == pytest.approx(confidence.mean(), rel=1e-5)
        assert fit["spread"].item() == pytest.approx(confidence.std(), rel=1e-5)
    # Scores with one fit share its tensors, in a file too.
    torch.save(fitted, tmp_path / "fitted.pt")
    loaded = torch.load(tmp_path / "fitted.pt", weights_only=True)
    one, two = (loaded[name]["white"].data_ptr() for name in ("gaussian_energy", "relative_mahalanobis"))
    assert one == two and loaded["gaussian_energy"]["background"] == 0.5


def test_scores_do_not_lose_digits_far_from_the_origin():
    features, labels, counts = sample(300)
    near, far = (fit_scores(features + shift, labels, counts) for shift in (0, 1e4))
    for name in ("gaussian_energy", "relative_mahalanobis"):
        scores = [
            SCORES[name].score(None, torch.from_numpy(features + shift), fit[name])
            for shift, fit in ((0, near), (1e4, far))
        ]
        torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-6)


def test_cluster_mean():
    values, clusters = np.array([1.0, 3.0, 10.0]), np.array([0, 0, 1])
    np.testing.assert_allclose(cluster_mean(values, clusters), [2, 2, 10])
    np.testing.assert_allclose(cluster_mean(values[:, None] * [1, 2], clusters)[:, 1], [4, 4, 20])


@pytest.mark.parametrize("fit, score, message", [
    (lambda *_: np.zeros(3), lambda *_: torch.zeros(8), "does not return a dictionary of tensors"),
    (lambda *_: {"mean": np.zeros(3)}, lambda *_: torch.zeros(8), "does not return a dictionary of tensors"),
    (lambda *_: {}, lambda *_: torch.zeros(()), r"gives \[\] for \[8\] chips"),
])  # fmt: skip
def test_a_score_that_breaks_the_rules_is_named_when_it_is_fitted(monkeypatch, fit, score, message):
    monkeypatch.setattr(ood, "SCORES", {"mine": ood.Score(fit, score)})
    with pytest.raises(DataError, match=f"'mine'.*{message}"):
        ood.fit_scores(torch.randn(8, 3), np.arange(8) % 2, [4, 4])
