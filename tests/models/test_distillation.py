from models.distillation import (
    FEATURE_LOSSES,
    contrastive_loss,
    distillation_loss,
    feature_mse,
    match_prior,
    relation_loss,
    sliced_wasserstein,
)
from utils.run.rules import FEATURE_LOSS

import pytest
import torch
import torch.nn.functional as F

G = torch.Generator().manual_seed(1)
STUDENT, TEACHER = torch.randn(2, 16, 7, generator=G, dtype=torch.float64)


def test_zero_for_equal_logits():
    assert distillation_loss(TEACHER, TEACHER, 3.0).abs() < 1e-12
    assert distillation_loss(TEACHER + 5.0, TEACHER, 3.0).abs() < 1e-12  # same distribution


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_equals_torch_and_formula(temperature):
    p, q = (TEACHER / temperature).softmax(1), (STUDENT / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, temperature), by_hand)
    by_torch = temperature**2 * F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, temperature), by_torch)


def test_gradient_keeps_its_size_with_temperature():
    # At high T the gradient tends to (student - teacher) / classes, centred: independent of T.
    norms = []
    for temperature in (50.0, 100.0):
        student = STUDENT.clone().requires_grad_()
        distillation_loss(student, TEACHER, temperature).backward()
        norms.append(student.grad.norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=0.05, atol=0)


@pytest.mark.parametrize("loss", FEATURE_LOSSES.values())
def test_no_gradient_into_the_teacher(loss):
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    loss(student, teacher, 0.5).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", FEATURE_LOSSES.values())
def test_autocast_and_half_precision_inputs_do_not_round_the_loss(loss):
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    torch.manual_seed(0)  # of the directions of the Wasserstein distance
    wanted = loss(student.float(), teacher.float(), 0.1)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher, 0.1), wanted)


def test_relations_are_those_of_each_pair_with_the_others():
    student, teacher = STUDENT[:3], TEACHER[:3]
    wanted = 0.0
    for i in range(3):
        others = [j for j in range(3) if j != i]
        q, p = (torch.stack([F.cosine_similarity(f[i], f[j], dim=0) for j in others]).div(0.2).softmax(0)
                for f in (student, teacher))  # fmt: skip
        wanted += (p * (p / q).log()).sum() / 3
    torch.testing.assert_close(relation_loss(student, teacher, 0.2), wanted)
    turn = torch.linalg.qr(torch.randn(7, 7, generator=G, dtype=torch.float64))[0]
    assert relation_loss(3 * TEACHER @ turn, TEACHER).abs() < 1e-12  # the same similarities in other axes


def test_contrast_names_the_own_photograph_of_each_chip_and_the_own_chip_of_each_photograph():
    similar = torch.stack([F.cosine_similarity(s[None], TEACHER[:4]) for s in STUDENT[:4]]) / 0.3
    wanted = -(similar.log_softmax(1).diagonal() + similar.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(contrastive_loss(STUDENT[:4], TEACHER[:4], 0.3), wanted)
    assert contrastive_loss(TEACHER, TEACHER, 0.01) < 1e-6 < contrastive_loss(TEACHER.flip(0), TEACHER, 0.01)


def test_sliced_wasserstein_compares_the_batch_and_not_its_pairs():
    """Against the exact distance of one feature, where every direction is +1 or -1; and in no order of the pairs."""
    student, teacher = STUDENT[:, :1], TEACHER[:, :1]
    wanted = (student.sort(dim=0).values - teacher.sort(dim=0).values).square().mean()
    torch.testing.assert_close(sliced_wasserstein(student, teacher), wanted)
    assert sliced_wasserstein(TEACHER.flip(0), TEACHER) == 0 < sliced_wasserstein(STUDENT, TEACHER)


def test_mse_and_the_names_of_the_losses():
    torch.testing.assert_close(feature_mse(STUDENT, TEACHER), (STUDENT - TEACHER).square().mean())
    assert tuple(FEATURE_LOSSES) == FEATURE_LOSS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    student = torch.tensor([[1e4, -1e4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = distillation_loss(student, torch.tensor([[-1e4, 1e4], [1e4, 0.0]], dtype=dtype), 2.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_match_prior_turns_bayes_posteriors_of_one_draw_into_those_of_the_other():
    likelihood = torch.rand(6, 4, generator=G, dtype=torch.float64)
    counts = torch.tensor([1000.0, 100.0, 20.0, 5.0], dtype=torch.float64)
    teacher = (likelihood * counts ** (1 - 0.5)).log()  # drawn with BALANCE=0.5
    student = likelihood * counts ** (1 - 0.9)
    matched = match_prior(teacher, counts.tolist(), 0.5, counts.tolist(), 0.9).softmax(1)
    torch.testing.assert_close(matched, student / student.sum(1, keepdim=True))
    assert torch.equal(match_prior(teacher, counts, 0.7, counts, 0.7), teacher)
    few = torch.tensor([9.0, 3.0, 8.0, 1.0], dtype=torch.float64)  # the student has other chips
    matched = match_prior(teacher, counts, 0.5, few, 0.9).softmax(1)
    of_few = likelihood * few ** (1 - 0.9)
    torch.testing.assert_close(matched, of_few / of_few.sum(1, keepdim=True))
    alpha = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    weighted = teacher + torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64).log()
    matched = match_prior(weighted, counts, 0.5, counts, 0.9, tuple(alpha.tolist())).softmax(1)
    torch.testing.assert_close(matched, student / student.sum(1, keepdim=True))
