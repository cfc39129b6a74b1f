from data.batches import Batches
from data.sampler import WeightedStream
from data.store import ChipStore

import numpy as np
import pytest
import torch

CPU = torch.device("cpu")
LABELS = np.repeat([0, 1, 2], [20, 8, 2])


def batches(tmp_path, memory="device", epochs=4):
    chips = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "chips.npy", chips)
    store = ChipStore(np.load(tmp_path / "chips.npy", mmap_mode="c"), CPU, memory)
    return Batches(WeightedStream(LABELS, 7, 0.5, seed=3), LABELS, CPU, epochs, store, list(range(30)))


def test_batches_are_the_same_wherever_the_chips_are_kept(tmp_path):
    near, far = batches(tmp_path), batches(tmp_path, "disk")
    for first, end in ((0, 5), (2, 3), (3, 3), (7, 12)):  # in a row, and with jumps as after a resumed run
        pairs = list(zip(near.between(first, end), far.between(first, end), strict=True))
        assert [one.step for one, _ in pairs] == list(range(first, end))
        for one, two in pairs:
            for name in ("chips", "views", "labels"):
                assert torch.equal(getattr(one, name), getattr(two, name))


def test_a_batch_is_what_was_drawn(tmp_path):
    these = batches(tmp_path)
    indices, views = these.draw(4)
    (batch,) = these.between(4, 5)
    np.testing.assert_array_equal(batch.indices, indices)
    np.testing.assert_array_equal(batch.host_views, views)
    np.testing.assert_array_equal(batch.views, views)
    np.testing.assert_array_equal(batch.labels, LABELS[indices])
    np.testing.assert_array_equal(batch.chips, np.load(tmp_path / "chips.npy")[indices])
    assert batch.chips.dtype == torch.uint8 and batch.share == (slice(0, 7), 7)
    assert these.names(4) == indices.tolist()


def test_draws_are_those_of_the_steps(tmp_path):
    these = batches(tmp_path, epochs=2)
    assert these.steps == 5  # 30 chips by 7
    steps = range(1, 10, 3)
    for (indices, views), step in zip(these.draws(1, 3), steps, strict=True):
        np.testing.assert_array_equal(indices, these.draw(step)[0])
        np.testing.assert_array_equal(views, these.draw(step)[1])


@pytest.mark.parametrize("memory", ["device", "disk"])
def test_an_error_in_a_step_ends_the_gathering(tmp_path, memory):
    with pytest.raises(RuntimeError, match="in the step"):
        for batch in batches(tmp_path, memory).between(0, 5):
            raise RuntimeError(f"in the step {batch.step}")
