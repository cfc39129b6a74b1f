from utils.predict.ood import cluster_mean, confidence, fit_gaussians, log_densities

import numpy as np
import pytest
import torch
from pytorch_ood.detector import EnergyBased
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_confidence_is_minus_the_energy_of_pytorch_ood(temperature):
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    energy = EnergyBased.score(logits, t=temperature)
    torch.testing.assert_close(confidence(logits, temperature), -energy)


def test_sure_chips_score_higher_than_flat_ones():
    found = confidence(torch.tensor([[9.0, 0.0, 0.0], [0.1, 0.0, 0.0]]))
    assert found[0] > found[1]


@pytest.mark.parametrize("background", [0, 0.75])
def test_gaussians_equal_scipy(background):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    features = random.normal(size=(300, 5)) @ random.normal(size=(5, 5)) + 3 * labels[:, None]
    gaussians = fit_gaussians(features, labels, np.bincount(labels, minlength=3))
    found = log_densities(torch.from_numpy(features), gaussians, background).numpy()
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    covariance = LedoitWolf(assume_centered=True).fit(features - means[labels]).covariance_
    everywhere = covariance + np.cov(means[labels].T, bias=True)
    of_all = multivariate_normal(features.mean(0), everywhere).logpdf(features)
    for c in range(3):
        wanted = multivariate_normal(means[c], covariance).logpdf(features) - background * of_all
        np.testing.assert_allclose(found[:, c], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("background", [0, 0.75])
def test_far_features_are_less_confident_and_absent_classes_never_win(background):
    random = np.random.default_rng(1)
    labels = np.repeat([0, 2], 100)
    features = random.normal(size=(200, 4)) + labels[:, None]
    gaussians = fit_gaussians(features, labels, np.bincount(labels, minlength=3))
    near, far = torch.zeros(1, 4), torch.full((1, 4), 30.0)
    found = log_densities(torch.cat([near, far]), gaussians, background)
    assert confidence(found)[0] > confidence(found)[1] + 100
    assert torch.isinf(found[:, 1]).all() and torch.isfinite(confidence(found)).all()


def test_cluster_mean():
    values, clusters = np.array([1.0, 3.0, 10.0]), np.array([0, 0, 1])
    np.testing.assert_allclose(cluster_mean(values, clusters), [2, 2, 10])
    np.testing.assert_allclose(cluster_mean(values[:, None] * [1, 2], clusters)[:, 1], [4, 4, 20])
