import hashlib
from collections import Counter

from data.sampler import BalancedStream, WeightedStream, _ClassMembers, _shuffled
from data.split import few_of_each, stratified_split

import numpy as np
import pytest
from scipy.stats import chisquare

LABELS = np.repeat([0, 1, 2, 4], [500, 120, 30, 3])  # class 3 has no chips
SHUFFLED = np.random.default_rng(5).permutation(LABELS)
ALONE = np.arange(len(LABELS))  # every chip is an entity of its own
# Entities of 1, 2, 3, ... chips; the last of a class has what is left.
SIZES = {0: [*range(1, 31), 35], 1: [*range(1, 15), 15], 2: [1, 2, 27], 4: [3]}
ENTITIES = np.empty(len(LABELS), np.int64)
for _label, _sizes in SIZES.items():
    ENTITIES[np.flatnonzero(SHUFFLED == _label)] = 100 * _label + np.random.default_rng(_label).permutation(
        np.repeat(np.arange(len(_sizes)), _sizes)
    )


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_weighted_stream_draws_by_count_to_the_minus_balance(balance):
    stream = WeightedStream(SHUFFLED, 200, balance, seed=1)
    drawn = np.concatenate([stream.batch(step)[0] for step in range(200)])
    weight = np.bincount(SHUFFLED)[SHUFFLED] ** -balance
    expected = len(drawn) * weight / weight.sum()
    assert chisquare(np.bincount(drawn, minlength=len(SHUFFLED)), expected).pvalue > 1e-3


def test_all_views_equally_often():
    stream = WeightedStream(SHUFFLED, 200, 1.0, seed=2)
    views = np.concatenate([stream.batch(step)[1] for step in range(100)])
    assert chisquare(np.bincount(views, minlength=8)).pvalue > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda s: WeightedStream(SHUFFLED, 7, 0.5, s),
        lambda s: WeightedStream(SHUFFLED, 7, 0.5, s, ENTITIES, 0.5),
        lambda s: BalancedStream(SHUFFLED, 7, s),
        lambda s: BalancedStream(SHUFFLED, 7, s, ENTITIES, 0.5),
        lambda s: BalancedStream(SHUFFLED, 7, s, ENTITIES, 1.0),
    ],
)
def test_a_batch_depends_on_seed_and_step_alone(make):
    one, two = make(3), make(3)
    ahead = [one.batch(step) for step in range(40)]
    for step in (39, 0, 17, 3):
        np.testing.assert_array_equal(two.batch(step), ahead[step])
    assert not np.array_equal(make(4).batch(0), ahead[0])
    assert not np.array_equal(ahead[1], ahead[0])


@pytest.mark.parametrize("batch_size", [3, 4, 10, 64, 1000])
def test_balanced_batches(batch_size):
    stream = BalancedStream(SHUFFLED, batch_size, seed=0)
    drawn = []
    for step in range(30):
        indices, views = stream.batch(step)
        assert indices.shape == views.shape == (batch_size,) and views.min() >= 0 and views.max() < 8
        counts = np.bincount(SHUFFLED[indices], minlength=5)[[0, 1, 2, 4]]
        assert counts.max() - counts.min() <= 1
        drawn += indices.tolist()
    # Within a class every chip comes once before any comes twice.
    for label in (0, 1, 2, 4):
        chips = set(np.flatnonzero(SHUFFLED == label).tolist())
        counts = Counter(index for index in drawn if index in chips)
        assert max(counts.values()) - min(counts[i] for i in chips) <= 1


@pytest.mark.parametrize("balance", [0.3, 1.0])
@pytest.mark.parametrize("kind", [WeightedStream, BalancedStream])
def test_entities_are_drawn_by_count_to_the_minus_balance(kind, balance):
    options = (1.0, 1) if kind is WeightedStream else (1,)  # the classes equally often
    stream = kind(SHUFFLED, 200, *options, ENTITIES, balance)
    drawn = np.concatenate([stream.batch(step)[0] for step in range(200)])
    of_entity = np.bincount(ENTITIES)[ENTITIES]
    weight = of_entity**-balance
    weight /= np.bincount(SHUFFLED, weight)[SHUFFLED]  # in all 1 for each class
    expected = len(drawn) * weight / weight.sum()
    counts = np.bincount(drawn, minlength=len(SHUFFLED))
    if kind is BalancedStream and balance == 1:  # exact, so that it is nearer than chance would be
        np.testing.assert_allclose(np.bincount(ENTITIES, counts), np.bincount(ENTITIES, expected), atol=1)
    else:
        assert chisquare(counts, expected).pvalue > 1e-3


def test_balanced_batches_take_entities_in_turns_and_their_chips_in_turns():
    stream = BalancedStream(SHUFFLED, 40, 3, ENTITIES, 1.0)
    drawn = np.concatenate([stream.batch(step)[0] for step in range(57)])
    per_class = np.bincount(SHUFFLED[drawn], minlength=5)
    assert per_class[[0, 1, 2, 4]].tolist() == [570] * 4
    counts = np.bincount(drawn, minlength=len(SHUFFLED))
    for label, sizes in SIZES.items():
        of_entity = np.bincount(ENTITIES, counts)[100 * label : 100 * label + len(sizes)]
        assert of_entity.max() - of_entity.min() <= 1 and of_entity.sum() == 570
    for entity in np.unique(ENTITIES):
        of_chip = counts[ENTITIES == entity]
        assert of_chip.max() - of_chip.min() <= 1
    # Each round has another order. A batch of four chips has one of each class.
    stream = BalancedStream(SHUFFLED, 4, 3, ENTITIES, 1.0)
    drawn = np.concatenate([stream.batch(step)[0] for step in range(4 * 15)])
    rounds = ENTITIES[drawn[SHUFFLED[drawn] == 1]].reshape(4, 15)
    assert len({row.tobytes() for row in rounds}) == 4
    assert (np.sort(rounds, 1) == 100 + np.arange(15)).all()


@pytest.mark.parametrize("make", [
    lambda *by_entity: WeightedStream(SHUFFLED, 37, 0.5, 1, *by_entity),
    lambda *by_entity: BalancedStream(SHUFFLED, 37, 1, *by_entity),
])  # fmt: skip
def test_without_balance_entities_play_no_part(make):
    for step in (0, 17, 300):
        np.testing.assert_array_equal(make().batch(step), make(ENTITIES, 0.0).batch(step))
        assert not np.array_equal(make().batch(step), make(ENTITIES, 0.1).batch(step))


@pytest.mark.parametrize("count", [1, 2, 3, 14, 100, 4097])
def test_every_order_is_a_permutation_and_each_round_has_its_own(count):
    orders = [
        _shuffled(np.arange(count), np.full(count, count), np.full(count, key, np.uint64)) for key in range(4)
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
    assert count < 14 or len({order.tobytes() for order in orders}) == 4


def test_orders_are_uniform_over_positions_and_pairs():
    keys = np.arange(20_000).astype(np.uint64)
    first, second = (_shuffled(np.full(20_000, p), np.full(20_000, 9), keys) for p in (3, 4))
    assert chisquare(np.bincount(first)).pvalue > 1e-3
    pairs = np.bincount(first * 9 + second, minlength=81).reshape(9, 9)
    assert pairs.trace() == 0 and chisquare(pairs[~np.eye(9, dtype=bool)]).pvalue > 1e-3


def test_members_sorted_in_chunks_are_those_sorted_at_once(monkeypatch):
    monkeypatch.setattr(_ClassMembers, "CHUNK", 100)
    members = _ClassMembers(SHUFFLED)
    np.testing.assert_array_equal(members.order, np.argsort(SHUFFLED, kind="stable"))


def test_draws_are_those_of_earlier_versions():
    """A run that resumes, and the figures in docs/, rest on the same draws."""
    digest = hashlib.sha256()
    for stream in (WeightedStream(SHUFFLED, 37, 0.5, 1), BalancedStream(SHUFFLED, 37, 1)):
        for step in (0, 17, 300):
            for array in stream.batch(step):
                digest.update(array.astype("<i8").tobytes())
    for array in (*stratified_split(SHUFFLED, ALONE, 0.1), few_of_each(SHUFFLED, 50)):
        digest.update(array.astype("<i8").tobytes())
    assert digest.hexdigest() == "85e2dd414c6e3a042c456b5fe6f947dd15e8cc1f69d109c51e3612a84a9fa307"
