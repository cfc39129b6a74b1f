from utils.predict.vote import HOW, vote

import numpy as np
import pytest


def test_unknown_votes_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="hard.*soft"):
        vote(np.ones((1, 2)), [0], "median")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chips", [0, 1, 2])
def test_few_chips(how, chips):
    assert vote(np.eye(4)[:chips], np.arange(chips), how).tolist() == list(range(chips))


def test_hard_vote_by_hand():
    logits = np.array([[3, 0, 0], [3, 0, 0], [0, 9, 0], [0, 0, 1], [0, 5, 0.0]])
    assert vote(logits, [7, 7, 7, 3, 3]).tolist() == [0, 0, 0, 1, 1]  # 2 : 1, then a tie by sums
    assert vote(logits, [0, 0, 0, 0, 0]).tolist() == [1] * 5  # 2 : 2 : 1, by sums
    assert vote(logits, [0, 1, 2, 3, 4]).tolist() == [0, 0, 1, 2, 1]  # alone


def test_soft_vote_sums_probabilities():
    p = np.array([[0.51, 0.49, 0], [0.51, 0.49, 0], [0.02, 0.98, 0]]) + 1e-12
    assert vote(np.log(p), [0, 0, 0], "hard").tolist() == [0, 0, 0]
    assert vote(np.log(p), [0, 0, 0], "soft").tolist() == [1, 1, 1]
    assert vote(np.log(p) + 1000, [0, 0, 0], "soft").tolist() == [1, 1, 1]  # no overflow


def test_product_vote_multiplies_probabilities():
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.05, 0.95]])  # 0.018 : 0.152
    assert vote(np.log(p[:2]), [0, 0], "product").tolist() == [0, 0]
    assert vote(np.log(p) + 1000, [0, 0, 0], "product").tolist() == [1, 1, 1]
    share = 0.152 ** (1 / 3) / (0.152 ** (1 / 3) + 0.018 ** (1 / 3))
    assert vote(np.log(p), [0, 0, 0], "product", share - 0.01).tolist() == [1, 1, 1]
    assert vote(np.log(p), [0, 0, 0], "product", share + 0.01).tolist() == [0, 0, 1]


def test_soft_vote_never_gives_a_label_that_no_chip_has():
    p = np.array([[0.55, 0.45, 1e-9], [1e-9, 0.45, 0.55]])  # label 1 has the highest sum
    assert set(vote(np.log(p), [0, 0], "soft")) <= {0, 2}


@pytest.mark.parametrize("how", HOW)
def test_a_vote_never_invents_a_label(how):
    rng = np.random.default_rng(0)
    logits, clusters = rng.normal(size=(300, 10)), rng.integers(0, 80, 300)
    voted = vote(logits, clusters, how)
    for cluster in np.unique(clusters):
        inside = clusters == cluster
        assert len(set(voted[inside])) == 1
        assert voted[inside][0] in logits[inside].argmax(1)


def test_a_narrow_winner_changes_nothing():
    logits = np.log(np.array([[0.6, 0.4], [0.6, 0.4], [0.3, 0.7]]))
    assert vote(logits, [0, 0, 0], "hard", 0.66).tolist() == [0, 0, 0]  # 2 of 3
    assert vote(logits, [0, 0, 0], "hard", 0.67).tolist() == [0, 0, 1]
    assert vote(logits, [0, 0, 0], "soft", 0.49).tolist() == [0, 0, 0]  # 1.5 of 3
    assert vote(logits, [0, 0, 0], "soft", 0.51).tolist() == [0, 0, 1]
