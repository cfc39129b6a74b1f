"""Index streams: which chips make a batch. A class is drawn first, then one of its chips.

A stream is a pure function of the step: `stream.batch(step)` always returns the same chips, so that a
run can resume at any step and each rank can take its share of a batch. `torch.multinomial` over all
chips is not used, because it is limited to 2^24 of them.
"""

from data.augment import VIEWS
from data.errors import DataError

import numpy as np

AHEAD = 16  # steps drawn together; NumPy needs about as long for one


class _Stream:
    """Batches as a pure function of the step.

    Args:
        labels: [N] integers, 0..C-1.
        batch_size: B, chips in a batch.
        seed: integer; another seed gives another stream.
    """

    def __init__(self, labels, batch_size, seed):
        self.members = _ClassMembers(labels)
        self.batch_size, self.seed = batch_size, seed
        self.ahead = (None, None, None)  # a block of AHEAD steps: its number, chips and views

    def batch(self, step):
        """Indices int64 [B] of chips, and their views int64 [B], 0..7, in step 0, 1, 2, ..."""
        block, position = divmod(step, AHEAD)
        number, chips, views = self.ahead
        if number != block:
            random = np.random.default_rng([self.seed, block])
            chips = self._draw(random, block * AHEAD * self.batch_size, (AHEAD, self.batch_size))
            views = random.integers(VIEWS, size=chips.shape)
            self.ahead = (block, chips, views)  # one assignment, since a thread may read it
        return chips[position], views[position]


class WeightedStream(_Stream):
    """Chips drawn with replacement, with probability proportional to count(class)^-balance.

    balance: 1 = every class equally likely, 0 = every chip equally likely.
    """

    def __init__(self, labels, batch_size, balance, seed):
        super().__init__(labels, batch_size, seed)
        weight = np.where(self.members.counts > 0, self.members.counts, 1.0) ** (1.0 - balance)
        probability = np.where(self.members.counts > 0, weight, 0.0)
        probability /= probability.sum()
        self.edges = np.cumsum(probability)
        # Rounding must not let a number in 0..1 fall behind the last class that has chips.
        self.edges[probability.nonzero()[0][-1] :] = 1.0

    def _draw(self, random, start, shape):
        classes = np.searchsorted(self.edges, random.random(shape), side="right")
        positions = (random.random(shape) * self.members.counts[classes]).astype(np.int64)
        return self.members.at(classes, positions)


class BalancedStream(_Stream):
    """Each batch holds each class equally often, to within one chip. Within a class each chip comes
    once before any comes twice.

    The classes take turns in one endless sequence. The k-th turn of a class takes the k-th chip of an
    endless sequence of rounds, and each round holds all chips of the class in another random order.

    Source: Kang et al., ICLR 2020, class-balanced sampling.
    """

    def _draw(self, random, start, shape):
        position = start + np.arange(shape[0] * shape[1]).reshape(shape)
        present = np.flatnonzero(self.members.counts)
        turn, which = np.divmod(random.permuted(position, axis=1).ravel(), len(present))
        classes = present[which]
        count = self.members.counts[classes]
        number, position = np.divmod(turn, count)  # of the round, and within it
        key = _mixed(_mixed(classes.astype(np.uint64) + np.uint64(self.seed)) + number.astype(np.uint64))
        return self.members.at(classes, _shuffled(position, count, key)).reshape(shape)


def _shuffled(position, count, key):
    """The number at `position` in the random order of 0..count-1 that `key` stands for; element by element.

    No order is stored, whatever the count: a Feistel network permutes the cells of the smallest grid with
    at least `count` cells, and is applied again to results outside 0..count-1 ("cycle walking", Black and
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).

    Args:
        position, count: int64 [N]; key: uint64 [N].
    """
    count, position = count.astype(np.uint64), position.astype(np.uint64)
    height = np.ceil(np.sqrt(count)).astype(np.uint64)
    width = (count + height - np.uint64(1)) // height
    outside = np.arange(len(position))
    while len(outside):
        rows, columns, code = height[outside], width[outside], key[outside]
        row, column = np.divmod(position[outside], columns)
        for _ in range(4):
            code = _mixed(code)
            row = (row + _mixed(column + code)) % rows
            column = (column + _mixed(row - code)) % columns
        position[outside] = row * columns + column
        outside = outside[position[outside] >= count[outside]]
    return position.astype(np.int64)


def _mixed(x):
    """A hash, uint64, of each uint64 (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _ClassMembers:
    """The chips of each class: counts [C], and the indices sorted by class (4 bytes a chip)."""

    CHUNK = 1 << 20  # chips sorted at a time, which bounds the memory

    def __init__(self, labels):
        labels = np.asarray(labels)
        self.counts = np.bincount(labels)
        self.start = np.concatenate([[0], np.cumsum(self.counts)[:-1]])
        self.order = np.empty(len(labels), np.int32 if len(labels) < 2**31 else np.int64)
        end = self.start.copy()  # of what is filled, for each class
        for begin in range(0, len(labels), self.CHUNK):
            chunk = labels[begin : begin + self.CHUNK]
            sizes = np.bincount(chunk, minlength=len(self.counts))
            chips = np.split(np.argsort(chunk, kind="stable") + begin, np.cumsum(sizes)[:-1])
            for label in np.flatnonzero(sizes):
                self.order[end[label] : end[label] + sizes[label]] = chips[label]
            end += sizes

    def at(self, classes, positions):
        """Indices, int64, of chips: for each class the chip at a position among the chips of that class."""
        return self.order[self.start[classes] + positions].astype(np.int64)


def stratified_split(labels, fraction, *excluded):
    """Training and validation indices; the same labels and fraction always give the same split.

    Each class gives round(fraction * count) of its chips to validation, but at least one if it has two
    (and fraction is not 0), and never its last one. The split does not depend on the seed of the run, so
    that all stages hold out the same chips.

    Args:
        labels: [N] integers.
        fraction: of the chips that is held out, 0..1.
        excluded: arrays of indices that are removed from both after the split, such as unreadable chips.

    Returns:
        train, validation: int64 arrays, sorted.

    Raises:
        DataError: no chip is left for training.
    """
    random = np.random.default_rng(0)
    validation = []
    for label in np.unique(labels):
        chips = np.flatnonzero(labels == label)
        held_out = min(max(round(fraction * len(chips)), 1 if fraction else 0), len(chips) - 1)
        validation.append(random.permutation(chips)[:held_out])
    validation = np.sort(np.concatenate(validation)).astype(np.int64)
    train = np.setdiff1d(np.arange(len(labels)), validation)
    excluded = np.concatenate([*excluded, []]).astype(np.int64)
    train, validation = np.setdiff1d(train, excluded), np.setdiff1d(validation, excluded)
    if not len(train):
        raise DataError("no pair is left of which both files are readable images; add chips")
    return train, validation


def few_of_each(labels, most):
    """Indices, int64, sorted, of at most `most` chips of each class, evenly spread over its chips.

    labels: [N] integers.
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([chips[:: -(-len(chips) // most)] for chips in classes]))
