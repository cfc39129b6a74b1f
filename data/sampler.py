"""Index streams: which chips make a batch. A class is drawn first, then one of its entities, then a chip of that.

An entity is one object that several chips show (`data.entities`). With balance_entities 0, entities play no part: a
class is drawn, then one of its chips.

A stream is a pure function of the step: `stream.batch(step)` always returns the same chips, so that a
run can resume at any step and each rank can take its share of a batch. `torch.multinomial` over all
chips is not used, because it is limited to 2^24 of them.
"""

from data.augment import VIEWS

import numpy as np

AHEAD = 16  # steps drawn together; NumPy needs about as long for one


class _Stream:
    """Batches as a pure function of the step.

    Args:
        labels: [N] integers, 0..C-1.
        batch_size: B, chips in a batch.
        seed: integer; another seed gives another stream.
        entities: [N] integers, 0..E-1, each in one class; needed if balance_entities is not 0.
        balance_entities: b, 0..1. An entity is drawn with probability proportional to its count of chips^(1 - b):
            1 = the entities of a class equally often, 0 = its chips.
    """

    def __init__(self, labels, batch_size, seed, entities=None, balance_entities=0.0):
        self.members = _ClassMembers(labels)
        self.entities = _Entities(self.members, entities, balance_entities) if balance_entities else None
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

    def __init__(self, labels, batch_size, balance, seed, entities=None, balance_entities=0.0):
        super().__init__(labels, batch_size, seed, entities, balance_entities)
        weight = np.where(self.members.counts > 0, self.members.counts, 1.0) ** (1.0 - balance)
        probability = np.where(self.members.counts > 0, weight, 0.0)
        probability /= probability.sum()
        self.edges = np.cumsum(probability)
        # Rounding must not let a number in 0..1 fall behind the last class that has chips.
        self.edges[probability.nonzero()[0][-1] :] = 1.0

    def _draw(self, random, start, shape):
        classes = np.searchsorted(self.edges, random.random(shape), side="right")
        if self.entities:
            return self.entities.draw(random, classes)
        positions = (random.random(shape) * self.members.counts[classes]).astype(np.int64)
        return self.members.at(classes, positions)


class BalancedStream(_Stream):
    """Each batch holds each class equally often, to within one chip. Within a class each chip comes
    once before any comes twice.

    The classes take turns in one endless sequence. The k-th turn of a class takes the k-th chip of an
    endless sequence of rounds, and each round holds all chips of the class in another random order.

    With balance_entities 1, a round of a class holds all its entities instead, and each entity goes through rounds of
    its own chips. With values between 0 and 1, entity and chip are drawn at random.

    Source: Kang et al., ICLR 2020, class-balanced sampling.
    """

    def __init__(self, labels, batch_size, seed, entities=None, balance_entities=0.0):
        super().__init__(labels, batch_size, seed, entities, balance_entities)
        self.in_turns = balance_entities == 1

    def _draw(self, random, start, shape):
        position = start + np.arange(shape[0] * shape[1]).reshape(shape)
        present = np.flatnonzero(self.members.counts)
        turn, which = np.divmod(random.permuted(position, axis=1).ravel(), len(present))
        classes = present[which]
        if not self.entities:
            chips, _ = self._in_rounds(turn, self.members.counts[classes], classes)
            return self.members.at(classes, chips).reshape(shape)
        if not self.in_turns:
            return self.entities.draw(random, classes).reshape(shape)
        first, counts = self.entities.of_class(classes)
        entity, turn = self._in_rounds(turn, counts, classes)
        entity += first
        start, counts = self.entities.chips_of(entity)
        chips, _ = self._in_rounds(turn, counts, len(self.members.counts) + entity)  # numbers that no class has
        return self.members.order[start + chips].astype(np.int64).reshape(shape)

    def _in_rounds(self, turn, count, of):
        """What the turns take of 0..count-1, and the number of the round, int64 [B] each.

        Each round holds all of 0..count-1, in an order that depends on the round and on `of`, int64 [B].
        """
        number, position = np.divmod(turn, count)  # of the round, and within it
        key = _mixed(_mixed(of.astype(np.uint64) + np.uint64(self.seed)) + number.astype(np.uint64))
        return _shuffled(position, count, key), number


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


class _Entities:
    """The chips of each class sorted by entity, and where each entity starts (12 bytes an entity, none a chip).

    It sorts `members.order` within each class, so that an entity is a range of it.

    Args:
        members: _ClassMembers of N chips.
        entities: [N] integers, each in one class.
        balance: balance_entities of the streams.
    """

    def __init__(self, members, entities, balance):
        starts, first = [], [0]
        for start, count in zip(members.start, members.counts, strict=True):
            chips = members.order[start : start + count]
            of_chip = entities[chips]
            order = np.argsort(of_chip, kind="stable")
            chips[:] = chips[order]
            of_chip = of_chip[order]
            begins = np.flatnonzero(np.diff(of_chip, prepend=of_chip[:1] - 1))
            starts.append((start + begins).astype(members.order.dtype))
            first.append(first[-1] + len(begins))
        self.order, self.first = members.order, np.array(first)  # [C + 1], of the entities of each class
        self.start = np.concatenate([*starts, np.array([len(members.order)], members.order.dtype)])  # [E + 1]
        # Up to the end of each entity; the sums of whole numbers, which balance 1 needs, are exact.
        self.weights = np.concatenate([[0.0], np.cumsum(np.diff(self.start) ** (1.0 - balance))])

    def of_class(self, classes):
        """The first entity of each class, and how many it has."""
        return self.first[classes], self.first[classes + 1] - self.first[classes]

    def chips_of(self, entities):
        """Where the chips of each entity start in `order`, and how many they are."""
        start = self.start[entities].astype(np.int64)
        return start, self.start[entities + 1] - start

    def draw(self, random, classes):
        """A chip at random, int64, for each class: of an entity drawn by its weight."""
        first, count = self.of_class(classes)
        low, high = self.weights[first], self.weights[first + count]
        drawn = low + random.random(classes.shape) * (high - low)
        # Rounding must not let a number reach the first entity of the next class.
        entities = np.minimum(np.searchsorted(self.weights, drawn, side="right") - 1, first + count - 1)
        start, count = self.chips_of(entities)
        return self.order[start + (random.random(classes.shape) * count).astype(np.int64)].astype(np.int64)
