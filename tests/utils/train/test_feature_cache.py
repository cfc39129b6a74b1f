from pathlib import Path

from data.sampler import WeightedStream
from data.store import MemoryBudget
from utils.train.feature_cache import FrozenCache

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
STREAM = WeightedStream(np.repeat([0, 1], [30, 6]), 8, 0.5, seed=0)
STEPS = range(40)


class Network:
    """Answers with a number that names chip and view, and counts what it was asked."""

    def __init__(self):
        self.batches = []

    def __call__(self, indices, views):
        self.batches.append(list(zip(indices.tolist(), views.tolist(), strict=True)))
        return torch.from_numpy(np.stack([indices, views, indices * 8 + views], 1)).float()


def cache(network, dtype=None, memory_gb=0.0, folder="nowhere"):
    return FrozenCache(network, map(STREAM.batch, STEPS), 36, 8, MemoryBudget(CPU, memory_gb), folder, dtype)


@pytest.mark.parametrize("memory_gb", [0.0, 1e-7])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_answers_are_those_of_the_network_each_computed_once(tmp_path, dtype, memory_gb):
    network = Network()
    cached = cache(network, dtype, memory_gb, tmp_path / "new")
    assert not network.batches  # not before the first is needed
    for step in STEPS:
        features = cached(*STREAM.batch(step))
        assert features.dtype == (dtype or torch.float32)
        torch.testing.assert_close(features.float(), Network()(*STREAM.batch(step)))
    asked = [pair for batch in network.batches for pair in batch]
    drawn = {pair for step in STEPS for pair in zip(*(x.tolist() for x in STREAM.batch(step)), strict=True)}
    assert len(asked) == len(set(asked)) and set(asked) == drawn
    assert {len(batch) for batch in network.batches[:-1]} == {8}


def test_a_run_that_starts_later_computes_the_same_batches():
    whole, late = Network(), Network()
    first, second = cache(whole), cache(late)
    for step in STEPS:
        first(*STREAM.batch(step))
    for step in STEPS[36:]:
        second(*STREAM.batch(step))
    assert len(late.batches) < len(whole.batches)
    assert all(batch in whole.batches for batch in late.batches)


def test_outputs_beyond_the_budget_are_in_a_file_that_ends_with_the_cache(tmp_path):
    def mapped():
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]

    within, beyond = (cache(Network(), None, memory_gb, tmp_path) for memory_gb in (1e-4, 1e-7))
    for step in STEPS:
        assert torch.equal(within(*STREAM.batch(step)), beyond(*STREAM.batch(step)))
        assert len(mapped()) == 1 and not list(tmp_path.iterdir())
    assert 0 < within.budget.left["device"] < 1e-4 * 2**30 and beyond.budget.left["device"] == 1e-7 * 2**30
    del beyond
    assert not mapped()
