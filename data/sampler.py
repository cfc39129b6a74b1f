"""Which chips make a batch: index streams, drawn class first, then chip.

A stream is a pure function of the step: `stream.batch(step)` gives the same chips whenever it
is asked, so a run can start again at any step, and ranks can each take their part. No
`torch.multinomial` over all chips, which stops at 2^24 of them.
"""

from data.augment import VIEWS

import numpy as np
import torch


def on_device(batch, device):
    """The arrays of a batch as tensors on the device; for CUDA copied without waiting for it."""
    tensors = (torch.from_numpy(array) for array in batch)
    if torch.cuda.is_available():
        tensors = (tensor.pin_memory() for tensor in tensors)
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


class WeightedStream:
    """Chips drawn with replacement, with probability proportional to count(class)^-balance.

    Args:
        labels: [N] integers, 0..C-1.
        batch_size: B, chips a batch.
        balance: 1 = every class equally likely, 0 = every chip equally likely.
        seed: of the stream.
    """

    def __init__(self, labels, batch_size, balance, seed):
        self.members = _ClassMembers(labels)
        weight = np.where(self.members.counts > 0, self.members.counts, 1.0) ** (1.0 - balance)
        self.share = np.where(self.members.counts > 0, weight, 0.0)
        self.share /= self.share.sum()
        self.edges = np.cumsum(self.share)
        self.edges[self.share.nonzero()[0][-1] :] = 1.0  # rounding must not reach past the last
        self.batch_size, self.seed = batch_size, seed

    def batch(self, step):
        """Indices int64 [B] and views int64 [B], 0..7, of step 0, 1, 2, ..."""
        random = np.random.default_rng([self.seed, step])
        drawn = np.searchsorted(self.edges, random.random(self.batch_size), side="right")
        place = (random.random(self.batch_size) * self.members.counts[drawn]).astype(np.int64)
        return self.members.at(drawn, place), random.integers(VIEWS, size=self.batch_size)


class BalancedStream:
    """Every batch holds every class equally often, to within one chip; within a class every
    chip comes once before any comes twice.

    The classes take turns along one endless sequence; the k-th turn of a class takes the
    k-th chip of its endless row of shuffled rounds.

    Args: as WeightedStream. Source: Kang et al., ICLR 2020, class-balanced sampling.
    """

    def __init__(self, labels, batch_size, seed):
        self.members = _ClassMembers(labels)
        self.present = np.flatnonzero(self.members.counts)
        self.batch_size, self.seed = batch_size, seed
        self.rounds = {}

    def batch(self, step):
        """Indices int64 [B] and views int64 [B], 0..7, of step 0, 1, 2, ..."""
        position = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        drawn = self.present[position % len(self.present)]
        turn, place = np.divmod(position // len(self.present), self.members.counts[drawn])
        for label, lap in {(c, t) for c, t in zip(drawn.tolist(), turn.tolist(), strict=True)}:
            mine = (drawn == label) & (turn == lap)
            place[mine] = self._round(label, lap)[place[mine]]
        random = np.random.default_rng([self.seed, step])
        mixed = random.permutation(self.batch_size)
        return self.members.at(drawn, place)[mixed], random.integers(VIEWS, size=self.batch_size)

    def _round(self, label, lap):
        """The order of a class's chips in its lap-th round; the latest of each class is kept."""
        if self.rounds.get(label, (None,))[0] != lap:
            random = np.random.default_rng([self.seed, label, lap])
            order = np.arange(self.members.counts[label], dtype=np.int32)
            random.shuffle(order)
            self.rounds[label] = (lap, order)
        return self.rounds[label][1]


class _ClassMembers:
    """The chips of each class: counts [C], and the indices sorted by class (4 bytes a chip)."""

    def __init__(self, labels):
        labels = np.asarray(labels)
        self.counts = np.bincount(labels)
        self.start = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        kind = np.int32 if len(labels) < 2**31 else np.int64
        self.order = np.argsort(labels, kind="stable").astype(kind)

    def at(self, classes, places):
        """Indices of the places-th chip of each class."""
        return self.order[self.start[classes] + places].astype(np.int64)


def stratified_split(labels, fraction):
    """Training and validation indices, the same whenever labels and fraction are the same.

    Of every class round(fraction * count) chips are set aside, but at least one where the
    class has two, and never its last. The choice does not depend on the run's seed, so that
    all stages leave out the same chips.

    Returns:
        train, validation: int64 arrays, sorted.
    """
    random = np.random.default_rng(0)
    validation = []
    for label in np.unique(labels):
        chips = np.flatnonzero(labels == label)
        aside = min(max(round(fraction * len(chips)), 1 if fraction else 0), len(chips) - 1)
        validation.append(random.permutation(chips)[:aside])
    validation = np.sort(np.concatenate(validation)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels)), validation), validation
