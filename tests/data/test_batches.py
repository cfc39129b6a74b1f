from data.batches import Feed
from data.sampler import WeightedStream
from data.store import ChipStore

import numpy as np
import torch

CPU = torch.device("cpu")
LABELS = np.repeat([0, 1, 2], [40, 15, 5])
MEMBERS = np.arange(0, 60, 2)


def feed(tmp_path, place):
    stores = []
    for side, seed in ((8, 0), (5, 1)):
        chips = np.random.default_rng(seed).integers(0, 256, (60, side, side), dtype=np.uint8)
        np.save(tmp_path / f"{side}.npy", chips)
        stores.append(ChipStore(np.load(tmp_path / f"{side}.npy", mmap_mode="c"), CPU, place))
    return Feed(WeightedStream(LABELS[MEMBERS], 7, 0.5, seed=3), MEMBERS, LABELS, CPU, *stores)


def test_batches_are_the_same_wherever_the_chips_are_kept(tmp_path):
    near, far = feed(tmp_path, "device"), feed(tmp_path, "disk")
    for step in (0, 1, 2, 5, 6, 3, 3):  # in a row, and with jumps as after a resumed run
        for one, two in zip(near(step), far(step), strict=True):
            assert one.dtype == two.dtype and torch.equal(one, two)


def test_a_batch_is_what_was_drawn(tmp_path):
    it = feed(tmp_path, "device")
    chosen, views = it.draw(4)
    seen, labels, large, small = it(4)
    assert set(chosen) <= set(MEMBERS)
    np.testing.assert_array_equal(seen, views)
    np.testing.assert_array_equal(labels, LABELS[chosen])
    np.testing.assert_array_equal(large, np.load(tmp_path / "8.npy")[chosen])
    np.testing.assert_array_equal(small, np.load(tmp_path / "5.npy")[chosen])
