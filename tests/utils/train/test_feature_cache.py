from data.sampler import WeightedStream
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


def cache(network, dtype=None):
    return FrozenCache(network, map(STREAM.batch, STEPS), 36, 8, CPU, dtype)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_answers_are_those_of_the_network_each_computed_once(dtype):
    network = Network()
    kept = cache(network, dtype)
    assert not network.batches  # not before the first is needed
    for step in STEPS:
        found = kept(*STREAM.batch(step))
        assert found.dtype == (dtype or torch.float32)
        torch.testing.assert_close(found.float(), Network()(*STREAM.batch(step)))
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
