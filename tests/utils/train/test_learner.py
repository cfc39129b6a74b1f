"""The learner's step against loops by hand, for the optimizers that timm knows."""

from data.augment import Share
from data.batches import Batch
from utils.run.settings import SettingError
from utils.train.learner import Learner, Optimization, warmup_cosine

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

CPU = torch.device("cpu")


class Sizes:
    """What the learner reads of the batches."""

    size, steps, total_steps = 8, 10, 20


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(step):
    random = np.random.default_rng(step)
    chips = torch.from_numpy(random.normal(size=(8, 6)).astype(np.float32))
    labels = torch.from_numpy(random.integers(0, 3, 8))
    return Batch(step, np.arange(8), np.zeros(8, int), chips, torch.zeros(8, dtype=int), labels, Share(slice(8), 8))


def learner(model, bad=(), **options):
    def loss_of(batch):
        logits = model(batch.chips)
        loss = F.cross_entropy(logits, batch.labels)
        return loss * (float("nan") if batch.step in bad else 1), logits, batch.labels

    return Learner(model, loss_of, Sizes, Optimization(0.01, 0.1, **options))


def trained(model, steps, bad=(), **options):
    ours = learner(model, bad, **options)
    ours.modules.train()
    for step in range(steps):
        ours.step(batch(step))
    return ours


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_steps_are_those_of_torchs_adamw():
    found, model = network(), network()
    trained(found, 12, clip=0.5, warmup_epochs=0.3)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * warmup_cosine(20, 3)(step)
        loss = F.cross_entropy(model(batch(step).chips), batch(step).labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for one, two in zip(found.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_each_step_and_seed_has_its_own_random_numbers_wherever_the_run_starts():
    drawn = []

    def loss_of(batch):
        drawn.append(torch.rand(()).item())
        logits = model(batch.chips)
        return logits.square().mean(), logits, batch.labels

    for seed, steps in ((0, (0, 1, 2)), (0, (2, 0)), (1, (0,))):
        model = network()
        ours = Learner(model, loss_of, Sizes, Optimization(0.01, 0.1, seed=seed))
        for step in steps:
            ours.step(batch(step))
    assert drawn[3:5] == [drawn[2], drawn[0]] and len({*drawn[:3], drawn[5]}) == 4


def test_the_schedule_rises_and_falls_and_a_short_run_is_not_all_warmup():
    factors = [warmup_cosine(10, 2)(step) for step in range(10)]
    assert factors[:2] == pytest.approx([1 / 3, 2 / 3]) and factors[2] == 1 and factors[-1] < 0.05
    assert all(a > b for a, b in zip(factors[2:], factors[3:], strict=False))
    ours = learner(network(), warmup_epochs=2)  # as long as the run
    rates = []
    for step in range(20):
        rates.append(ours.schedule.get_last_lr()[0])
        ours.step(batch(step))
    assert np.argmax(rates) <= 4 and rates[-1] < 0.001


OPTIMIZERS = ["adamw", "adam", "sgd", "momentum", "adagrad", "nadamw", "rmsprop", "lamb", "lion", "adan", "adafactor"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [0, 3])
def test_a_step_without_a_finite_loss_changes_nothing(name, bad):
    model = network()
    ours = learner(model, (bad,), optimizer=name, ema=0.9)
    ours.modules.train()
    for step in range(bad):
        ours.step(batch(step))
    before = [value.clone() for value in model.state_dict().values()]
    average = [value.clone() for value in ours.saved_model.state_dict().values()]
    ours.step(batch(bad))
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average, ours.saved_model.state_dict().values(), strict=True))
    for step in range(bad + 1, 8):
        ours.step(batch(step))
    figures = ours.meter.final()
    assert figures.bad_steps == 1 and figures.bad_in_a_row == 0 and np.isfinite(figures.loss)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learner_goes_on_from_its_state(name):
    once = trained(network(), 9, optimizer=name, ema=0.9)
    first = trained(network(), 4, optimizer=name, ema=0.9)
    second = learner(network(1), optimizer=name, ema=0.9)
    second.load_state_dict(first.state_dict())
    second.modules.train()
    for step in range(4, 9):
        second.step(batch(step))
    assert same(once.modules, second.modules) and same(once.saved_model, second.saved_model)


def test_the_average_forgets_the_first_weights():
    model = network()
    start = model[1].weight.detach().clone()
    ours = trained(model, 20, ema=0.999)
    moved = (model[1].weight - start).norm()
    assert (ours.saved_model[1].weight - start).norm() > 0.5 * moved
    assert not torch.equal(ours.saved_model[1].weight, model[1].weight)


def test_position_embeddings_biases_and_norms_are_not_decayed():
    from models.backbone import Classifier

    model = Classifier("test_vit", 3, 64)
    ours = Learner(model, None, Sizes, Optimization(0.01, 0.1))
    decayed = {id(p) for g in ours.optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "head.weight" in names and not {n for n in names if n.endswith(("bias", "pos_embed", "cls_token"))}
    assert {"backbone.pos_embed", "backbone.cls_token"} <= set(dict(model.named_parameters()))
    assert timm.create_model("test_vit").no_weight_decay()


def test_unknown_optimizers_are_refused_with_the_nearest_name():
    with pytest.raises(SettingError, match="no OPTIMIZER 'adamv'; near: .*adam"):
        learner(network(), optimizer="adamv")
    with pytest.raises(SettingError, match="adahessian needs second derivatives"):
        learner(network(), optimizer="adahessian")


def test_the_meter_counts_steps_without_a_finite_loss():
    ours = trained(network(), 10, bad=(7, 8, 9))
    figures = ours.meter.final()
    assert figures.bad_steps == figures.bad_in_a_row == 3
    good = trained(network(), 7).meter.final()
    assert figures.loss == pytest.approx(good.loss) and figures.accuracy == pytest.approx(good.accuracy)
    ours.meter.reset()
    assert ours.meter.final() == (0.0, 0.0, 0, 3)


@pytest.mark.parametrize("wrong", [lambda loss, *_: loss.mean(), lambda loss, *others: (loss, *others)])
def test_a_loss_that_is_no_number_is_refused_with_a_sentence(wrong):
    model = network()

    def loss_of(batch):
        logits = model(batch.chips)
        return wrong(F.cross_entropy(logits, batch.labels, reduction="none"), logits, batch.labels)

    with pytest.raises(SettingError, match="the loss has to be one number"):
        Learner(model, loss_of, Sizes, Optimization(0.01, 0.1)).step(batch(0))


def test_a_step_that_needs_too_much_memory_ends_with_a_sentence():
    def loss_of(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    ours = Learner(network(), loss_of, Sizes, Optimization(0.01, 0.1))
    with pytest.raises(SettingError, match="too small for a step of 8 chips; lower BATCH_SIZE, IMAGE_SIZE or CHIP"):
        ours.step(batch(0))
