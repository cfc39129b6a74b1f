"""Which chips make a batch: index streams, drawn class first, then chip.

A stream is a pure function of the step: `stream.batch(step)` gives the same chips whenever it
is asked, so a run can start again at any step, and ranks can each take their part. No
`torch.multinomial` over all chips, which stops at 2^24 of them.
"""

from data.augment import VIEWS
from data.errors import DataError

import numpy as np

AHEAD = 16  # steps drawn together, since numpy takes as long for one


class _Stream:
    """Batches as a pure function of the step.

    Args:
        labels: [N] integers, 0..C-1.
        batch_size: B, chips a batch.
        seed: of the stream.
    """

    def __init__(self, labels, batch_size, seed):
        self.members = _ClassMembers(labels)
        self.batch_size, self.seed = batch_size, seed
        self.drawn = (None, None, None)

    def batch(self, step):
        """Indices int64 [B] and views int64 [B], 0..7, of step 0, 1, 2, ..."""
        block, place = divmod(step, AHEAD)
        drawn = self.drawn
        if drawn[0] != block:
            random = np.random.default_rng([self.seed, block])
            chips = self._draw(random, block * AHEAD * self.batch_size, (AHEAD, self.batch_size))
            drawn = self.drawn = (block, chips, random.integers(VIEWS, size=chips.shape))
        return drawn[1][place], drawn[2][place]


class WeightedStream(_Stream):
    """Chips drawn with replacement, with probability proportional to count(class)^-balance.

    balance: 1 = every class equally likely, 0 = every chip equally likely.
    """

    def __init__(self, labels, batch_size, balance, seed):
        super().__init__(labels, batch_size, seed)
        weight = np.where(self.members.counts > 0, self.members.counts, 1.0) ** (1.0 - balance)
        share = np.where(self.members.counts > 0, weight, 0.0)
        share /= share.sum()
        self.edges = np.cumsum(share)
        self.edges[share.nonzero()[0][-1] :] = 1.0  # rounding must not reach past the last

    def _draw(self, random, start, shape):
        drawn = np.searchsorted(self.edges, random.random(shape), side="right")
        place = (random.random(shape) * self.members.counts[drawn]).astype(np.int64)
        return self.members.at(drawn, place)


class BalancedStream(_Stream):
    """Every batch holds every class equally often, to within one chip; within a class every
    chip comes once before any comes twice.

    The classes take turns along one endless sequence; the k-th turn of a class takes the
    k-th chip of its endless row of shuffled rounds.

    Source: Kang et al., ICLR 2020, class-balanced sampling.
    """

    def _draw(self, random, start, shape):
        position = start + np.arange(shape[0] * shape[1]).reshape(shape)
        present = np.flatnonzero(self.members.counts)
        turn, which = np.divmod(random.permuted(position, axis=1).ravel(), len(present))
        drawn = present[which]
        count = self.members.counts[drawn]
        lap, place = np.divmod(turn, count)
        key = _mixed(_mixed(drawn.astype(np.uint64) + np.uint64(self.seed)) + lap.astype(np.uint64))
        return self.members.at(drawn, _shuffled(place, count, key)).reshape(shape)


def _shuffled(place, count, key):
    """The place-th of 0..count-1 in the random order that `key` names; arrays, element by element.

    Nothing is stored or shuffled, whatever the count: a Feistel network over a grid that just
    holds `count` cells, walked on where it lands outside (Black and Rogaway, "Ciphers with
    arbitrary finite domains", CT-RSA 2002).
    """
    count, place = count.astype(np.uint64), place.astype(np.uint64)
    high = np.ceil(np.sqrt(count)).astype(np.uint64)
    wide = (count + high - np.uint64(1)) // high
    walking = np.arange(len(place))
    while len(walking):
        rows, columns, code = high[walking], wide[walking], key[walking]
        row, column = np.divmod(place[walking], columns)
        for _ in range(4):
            code = _mixed(code)
            row = (row + _mixed(column + code)) % rows
            column = (column + _mixed(row - code)) % columns
        place[walking] = row * columns + column
        walking = walking[place[walking] >= count[walking]]
    return place.astype(np.int64)


def _mixed(x):
    """A well-mixed uint64 of each uint64 (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _ClassMembers:
    """The chips of each class: counts [C], and the indices sorted by class (4 bytes a chip)."""

    CHUNK = 1 << 20  # chips sorted at a time, to need no more memory than the result

    def __init__(self, labels):
        labels = np.asarray(labels)
        self.counts = np.bincount(labels)
        self.start = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.order = np.empty(len(labels), np.int32 if len(labels) < 2**31 else np.int64)
        place = self.start.copy()
        for begin in range(0, len(labels), self.CHUNK):
            part = labels[begin : begin + self.CHUNK]
            sizes = np.bincount(part, minlength=len(self.counts))
            chips = np.split(np.argsort(part, kind="stable") + begin, np.cumsum(sizes)[:-1])
            for label in np.flatnonzero(sizes):
                self.order[place[label] : place[label] + sizes[label]] = chips[label]
            place += sizes

    def at(self, classes, places):
        """Indices of the places-th chip of each class."""
        return self.order[self.start[classes] + places].astype(np.int64)


def stratified_split(labels, fraction, *without):
    """Training and validation indices, the same whenever labels and fraction are the same.

    Of every class round(fraction * count) chips are set aside, but at least one where the
    class has two, and never its last. The choice does not depend on the run's seed, so that
    all stages leave out the same chips. Those at `without`, arrays of indices, are then in neither.

    Returns:
        train, validation: int64 arrays, sorted.

    Raises:
        DataError: none is left to train on.
    """
    random = np.random.default_rng(0)
    validation = []
    for label in np.unique(labels):
        chips = np.flatnonzero(labels == label)
        aside = min(max(round(fraction * len(chips)), 1 if fraction else 0), len(chips) - 1)
        validation.append(random.permutation(chips)[:aside])
    validation = np.sort(np.concatenate(validation)).astype(np.int64)
    parts = np.setdiff1d(np.arange(len(labels)), validation), validation
    without = np.concatenate([*without, []]).astype(np.int64)
    train, validation = (np.setdiff1d(part, without) for part in parts)
    if not len(train):
        raise DataError("no pair is left of which both files are readable images; add chips")
    return train, validation


def few_of_each(labels, most):
    """Indices, sorted, of at most about `most` chips of each class, evenly spread over its chips."""
    chips = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.sort(np.concatenate([mine[:: -(-len(mine) // most)] for mine in chips]))
