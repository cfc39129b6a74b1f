"""Which pairs a stage trains on, which of their labels it uses, and which pairs it holds out to validate on."""

from dataclasses import dataclass, replace

from data.errors import DataError, named

import numpy as np


@dataclass(frozen=True)
class TrainingPairs:
    """The pairs that a stage trains on, T of them.

    indices: int64 [T], of the pairs of the class folders and, after them, further chips.
    labels: int64 [T]; -1 = the class of this pair is not known.
    entities: [T] ids, each in one class.
    held_out: int64 indices of the pairs to validate on.
    apart: int64 indices of the pairs that are not trained on: those to validate on, also if they are excluded.
    """

    indices: np.ndarray
    labels: np.ndarray
    entities: np.ndarray
    held_out: np.ndarray
    apart: np.ndarray

    @property
    def has_label(self):
        """bool [T]"""
        return self.labels >= 0

    def labelled(self):
        """Those with labels alone."""
        chosen = self.has_label
        chosen = self.indices[chosen], self.labels[chosen], self.entities[chosen]
        return TrainingPairs(*chosen, self.held_out, self.apart)

    def with_labels(self, labels):
        """All of them; those without a label get these, int64, one for each. An entity is then one for each class."""
        filled = self.labels.copy()
        filled[~self.has_label] = labels
        of_both = self.entities * (filled.max() + 1) + filled
        return replace(self, labels=filled, entities=np.unique(of_both, return_inverse=True)[1])


def choose_training(pairs, entities, fraction, *excluded, labelled_share=1.0, further=()):
    """The `TrainingPairs` of a stage; the same arguments always give the same ones.

    Args:
        pairs: `data.layouts.Pairs`, N of them; entities: [N] ids, of `data.entities.find_entities`.
        fraction: of the pairs to hold out, of `split_pairs`; 0 = none.
        excluded: arrays of indices that are left out, such as unreadable chips.
        labelled_share: of the training pairs of each class whose labels are used, of `choose_labelled`.
        further: labels of further chips to train on, with the indices N, N + 1, ...; -1 = not known.

    Raises:
        DataError: no pair is left for training.
    """
    train, apart = split_pairs(pairs, entities, fraction)
    labels = np.where(choose_labelled(pairs.labels[train], labelled_share), pairs.labels[train], -1)
    # What is excluded goes last: a stage that excludes other chips still has the same split and labels.
    excluded = np.concatenate([*excluded, []])
    good = ~np.isin(train, excluded)
    train, labels, held_out = train[good], labels[good], apart[~np.isin(apart, excluded)]
    if not len(train):
        raise DataError("no pair is left of which both files are readable images; add chips")
    count = len(entities)
    added = np.setdiff1d(np.arange(count, count + len(further)), excluded).astype(np.int64)
    indices = np.concatenate((train, added))
    labels = np.concatenate((labels, np.asarray(further, np.int64)[added - count]))
    # Each of them is an entity of its own.
    entities = np.concatenate((entities[train], entities.max() + 1 + added - count))
    return TrainingPairs(indices, labels, entities, held_out, apart)


def split_pairs(pairs, entities, fraction):
    """`stratified_split` of the pairs; prints which classes cannot be validated on pairs.

    If no class shows two entities, single pairs are held out. With fraction 0 all pairs are for training.
    """
    if not fraction:
        return stratified_split(pairs.labels, entities, fraction)
    of_entity = pairs.labels[np.unique(entities, return_index=True)[1]]  # the class of each entity
    single = np.bincount(of_entity, minlength=len(pairs.classes)) == 1
    if single.all():
        print(
            "each class shows one entity, so pairs are held out chip by chip: validation on pairs sees the objects of "
            "training, and flatters"
        )
        entities = np.arange(len(entities))
    elif single.any():
        names = named(pairs.classes[label] for label in np.flatnonzero(single))
        print(f"classes of one entity keep it for training, so that they cannot be validated on pairs: {names}")
    return stratified_split(pairs.labels, entities, fraction)


def stratified_split(labels, entities, fraction):
    """Training and validation indices; the same labels, entities and fraction always give the same split.

    Each class gives about fraction * count of its chips to validation, as whole entities, but at least one entity if
    it has two (and fraction is not 0), and never its last one, nor one with more than half of the class's chips.
    The split does not depend on the seed of the run, so that all stages hold out the same chips.

    Args:
        labels: [N] integers.
        entities: [N] integers, each in one class (`data.entities`); np.arange(N) = every chip is one of its own.
        fraction: of the chips that is held out, 0..1.

    Returns:
        train, validation: int64 arrays, sorted.
    """
    random = np.random.default_rng(0)
    validation = []
    for label in np.unique(labels):
        chips = np.flatnonzero(labels == label)
        _, of_chip = np.unique(entities[chips], return_inverse=True)
        held_out = _held_out(np.bincount(of_chip), max(round(fraction * len(chips)), 1 if fraction else 0), random)
        validation.append(chips[np.isin(of_chip, held_out)])
    validation = np.sort(np.concatenate(validation)).astype(np.int64)
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def _held_out(sizes, wanted, random):
    """Which entities of a class to hold out, a list, so that they have about `wanted` chips.

    sizes: [E] chips of each entity; random: generator of the order in which they are tried.
    """
    order = random.permutation(len(sizes))
    order = order[2 * sizes[order] <= sizes.sum()]
    held_out, count = [], 0
    for entity in order:
        if count + sizes[entity] <= min(wanted, sizes.sum() - 1):
            held_out.append(entity)
            count += sizes[entity]
    # One more, if that comes nearer: with few large entities the first pass may have found none.
    rest = np.setdiff1d(order, held_out)
    if wanted and len(rest):
        nearest = rest[np.argmin(abs(count + sizes[rest] - wanted))]
        nearer = abs(count + sizes[nearest] - wanted) < abs(count - wanted)
        if (nearer or not count) and count + sizes[nearest] < sizes.sum():
            held_out.append(nearest)
    return held_out


def choose_labelled(labels, share):
    """Which training chips keep their labels, bool [N]: round(share * count) of each class, but at least one.

    `choose_training` then leaves out unreadable chips, also if a class has no other label.

    The same labels and share always give the same choice, and a larger share contains a smaller one.

    Args:
        labels: [N] integers; share: 0..1; 0 = none at all.
    """
    random, known = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chips = random.permutation(np.flatnonzero(labels == label))
        known[chips[: max(round(share * len(chips)), 1 if share else 0)]] = True
    return known


def few_of_each(labels, most):
    """Indices, int64, sorted, of at most `most` chips of each class, evenly spread over its chips.

    labels: [N] integers.
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.sort(np.concatenate([chips[:: -(-len(chips) // most)] for chips in classes]))
