from models.focal import focal_loss

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(32, 5, generator=g, dtype=torch.float64) * 3, torch.arange(32) % 5


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5, 0.1, 3.0]).double()])
def test_gamma_zero_is_cross_entropy(batch, weights):
    logits, labels = batch
    torch.testing.assert_close(
        focal_loss(logits, labels, 0.0, weights), F.cross_entropy(logits, labels, weights)
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_formula(batch, gamma):
    logits, labels = batch
    p = logits.softmax(1)[range(32), labels]
    torch.testing.assert_close(focal_loss(logits, labels, gamma), (-((1 - p) ** gamma) * p.log()).mean())


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gradient_by_finite_differences(batch, gamma):
    logits, labels = batch
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, labels, gamma), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_stay_finite(dtype, gamma, size):
    logits = torch.tensor([[size, -size], [-size, size], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 0, 1]), gamma)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_easy_chips_get_less_weight(batch):
    logits, labels = torch.tensor([[4.0, 0.0], [-4.0, 0.0]]), torch.tensor([0, 0])
    easy, hard = (focal_loss(x[None], y[None], 2.0) for x, y in zip(logits, labels, strict=True))
    easy0, hard0 = (focal_loss(x[None], y[None], 0.0) for x, y in zip(logits, labels, strict=True))
    assert easy / hard < 0.01 * easy0 / hard0


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5, 0.1, 3.0]).double()])
def test_chips_that_do_not_count_change_nothing(batch, weights):
    logits, labels = batch
    logits.requires_grad_()
    counted = torch.arange(32) % 3 == 0
    loss = focal_loss(logits, labels, 2.0, weights, counted=counted)
    torch.testing.assert_close(loss, focal_loss(logits[counted], labels[counted], 2.0, weights))
    loss.backward()
    assert (logits.grad[~counted] == 0).all() and (logits.grad[counted] != 0).any()
    assert focal_loss(logits, labels, 2.0, weights, counted=torch.zeros(32, dtype=torch.bool)) == 0
    # Two ranks with a common total give the mean over both.
    halves = slice(16), slice(16, 32)
    halves = [focal_loss(logits[i], labels[i], 2.0, None, counted.sum() / 2, counted[i]) for i in halves]
    torch.testing.assert_close(sum(halves) / 2, focal_loss(logits, labels, 2.0, counted=counted))
