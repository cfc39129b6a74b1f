"""Which pairs a stage trains on, with which labels, and which it holds out."""

from collections import Counter

from data.errors import DataError
from data.layouts import Pairs
from data.split import choose_labelled, choose_training, few_of_each, split_pairs, stratified_split
from tests.data.test_sampler import ALONE, ENTITIES, SHUFFLED

import numpy as np
import pytest

ANT_AND_BEE = np.repeat([0, 1], 7)  # labels of 14 pairs
SIX_OBJECTS = [0, 0, 0, 1, 1, 2, 0, 3, 3, 3, 4, 4, 5, 3]


def pairs_of(labels):
    names = [str(index) for index in range(len(labels))]
    return Pairs(names, names, labels, ("ant", "bee"), (0, 1))


def test_few_of_each_class():
    chosen = few_of_each(SHUFFLED, 50)
    assert Counter(SHUFFLED[chosen].tolist()) == {0: 50, 1: 40, 2: 30, 4: 3}
    assert (np.diff(chosen) > 0).all()


def test_split_is_stratified_stable_and_disjoint():
    train, held = stratified_split(SHUFFLED, ALONE, 0.1)
    assert sorted([*train, *held]) == list(range(len(SHUFFLED)))
    assert Counter(SHUFFLED[held].tolist()) == {0: 50, 1: 12, 2: 3, 4: 1}
    np.testing.assert_array_equal(held, stratified_split(SHUFFLED, ALONE, 0.1)[1])
    assert len(stratified_split(SHUFFLED, ALONE, 0.0)[1]) == 0
    assert len(stratified_split(np.array([0, 0, 1]), np.arange(3), 0.5)[1]) == 1  # never a class's last chip


def test_excluded_chips_are_in_neither_side_and_do_not_move_the_split():
    pairs, share = pairs_of(SHUFFLED), 0.3
    all_of_them = choose_training(pairs, ALONE, 0.1, labelled_share=share)
    train, held = all_of_them.indices, all_of_them.held_out
    excluded = np.array([train[0], train[5]]), held[:2]
    less = choose_training(pairs, ALONE, 0.1, *excluded, labelled_share=share)
    assert less.indices.tolist() == sorted({*train} - {*excluded[0]})
    assert less.held_out.tolist() == sorted({*held} - {*excluded[1]})
    assert less.labels.tolist() == all_of_them.labels[np.isin(train, less.indices)].tolist()
    with pytest.raises(DataError, match="no pair is left"):
        choose_training(pairs, ALONE, 0.1, np.arange(len(SHUFFLED)))


def test_an_entity_is_held_out_as_a_whole():
    train, held = stratified_split(SHUFFLED, ENTITIES, 0.1)
    assert sorted([*train, *held]) == list(range(len(SHUFFLED)))
    assert not set(ENTITIES[train]) & set(ENTITIES[held])
    # As near to the share as the entities allow; of the 30 chips of class 2, 27 are one entity, 3 are wanted.
    assert Counter(SHUFFLED[held].tolist()) == {0: 50, 1: 12, 2: 3}
    np.testing.assert_array_equal(held, stratified_split(SHUFFLED, ENTITIES, 0.1)[1])


@pytest.mark.parametrize("sizes, fraction, held_out", [
    ([5], 0.5, 0),  # the only one
    ([5, 5], 0.1, 5),  # the nearest is more than wanted
    ([5, 5], 0.9, 5),  # never the last one
    ([40, 4, 3], 0.5, 7),  # never more than half of the class
    ([40, 4, 3], 0.02, 3),
    ([10, 10, 10, 70], 0.14, 10),
    ([10, 10, 10, 70], 0.16, 20),
    ([5, 5], 0.0, 0),
])  # fmt: skip
def test_the_share_held_out_is_as_near_as_whole_entities_allow(sizes, fraction, held_out):
    entities = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    _, held = stratified_split(np.zeros(len(entities), np.int64), entities, fraction)
    assert len(held) == held_out


def test_the_labelled_share_keeps_every_class_and_grows_with_the_share():
    labels = np.repeat([0, 1, 2, 4], [1000, 55, 4, 1])
    tenth, quarter = choose_labelled(labels, 0.1), choose_labelled(labels, 0.25)
    assert np.bincount(labels[tenth]).tolist() == [100, 6, 1, 0, 1]
    assert np.bincount(labels[quarter]).tolist() == [250, 14, 1, 0, 1]
    assert (quarter | ~tenth).all() and (tenth == choose_labelled(labels, 0.1)).all()
    assert choose_labelled(labels, 1.0).all() and not choose_labelled(labels, 0.0).any()


def test_a_class_of_one_entity_is_named_and_trains(capsys):
    entities = np.array([0] * 7 + SIX_OBJECTS[7:])
    train, held_out = split_pairs(pairs_of(ANT_AND_BEE), entities, 0.3)
    assert "cannot be validated on pairs: ant\n" in capsys.readouterr().out
    assert set(range(7)) <= set(train) and len(held_out) and not set(entities[train]) & set(entities[held_out])
    split_pairs(pairs_of(ANT_AND_BEE), np.arange(14), 0.3)
    assert not capsys.readouterr().out


def test_without_a_class_of_two_entities_single_pairs_are_held_out(capsys):
    train, held_out = split_pairs(pairs_of(ANT_AND_BEE), ANT_AND_BEE, 0.3)
    assert "pairs are held out chip by chip" in capsys.readouterr().out
    assert np.bincount(ANT_AND_BEE[held_out]).tolist() == [2, 2] and len(train) == 10


def test_training_pairs_are_the_split_with_labels_and_entities_beside_them():
    entities, bad = np.array(SIX_OBJECTS, np.int32), np.array([2, 15])
    pairs = pairs_of(ANT_AND_BEE)
    train = choose_training(pairs, entities, 0.3, bad, labelled_share=0.5, further=[-1] * 3)
    split = split_pairs(pairs, entities, 0.3)
    with_label = np.setdiff1d(split[0][choose_labelled(ANT_AND_BEE[split[0]], 0.5)], bad)
    split = [np.setdiff1d(indices, bad) for indices in split]
    assert train.indices.tolist() == [*split[0], 14, 16] and train.held_out.tolist() == split[1].tolist()
    assert train.indices[train.has_label].tolist() == with_label.tolist()
    assert train.labels[train.has_label].tolist() == ANT_AND_BEE[with_label].tolist()
    assert train.entities.tolist() == [*entities[split[0]], 6, 8]
    unpaired = choose_training(pairs, entities, 0.3, bad, further=np.array([1, 0, 1]))
    assert unpaired.labels.tolist() == [*ANT_AND_BEE[split[0]], 1, 1] and unpaired.has_label.all()
    labelled = train.labelled()
    assert labelled.indices.tolist() == with_label.tolist() and labelled.has_label.all()
    assert labelled.entities.tolist() == entities[with_label].tolist()


def test_an_entity_that_the_teacher_sees_in_two_classes_is_two():
    train = choose_training(pairs_of(ANT_AND_BEE), np.array(SIX_OBJECTS), 0.0, labelled_share=0.0, further=[-1])
    seen = np.array([0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0])
    filled = train.with_labels(seen)
    assert filled.has_label.all() and filled.labels.tolist() == seen.tolist()
    assert filled.entities.tolist() == [0, 1, 0, 2, 2, 3, 0, 4, 4, 4, 5, 5, 6, 4, 7]
    assert not train.has_label.any()  # the original is as it was
