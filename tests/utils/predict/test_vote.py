from utils.predict.vote import (
    FEW,
    HOW,
    estimate_belief,
    fit_temperature,
    measure_belief,
    mixture_vote,
    shift_to_shares,
    vote,
)

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

WINNERS = [how for how in HOW if how != "mixture"]


def test_unknown_votes_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="soft.*hard"):
        vote(np.ones((1, 2)), [0], "median")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("chips", [0, 1, 2])
def test_few_chips(how, chips):
    result = vote(np.eye(4)[:chips], np.arange(chips), how)
    assert result.labels.tolist() == list(range(chips))
    assert result.share.shape == (chips,)


def test_hard_vote_by_hand():
    logits = np.array([[3, 0, 0], [3, 0, 0], [0, 9, 0], [0, 0, 1], [0, 5, 0.0]])
    assert vote(logits, [7, 7, 7, 3, 3], "hard").labels.tolist() == [0, 0, 0, 1, 1]  # 2 : 1, then a tie by sums
    assert vote(logits, [0, 0, 0, 0, 0], "hard").labels.tolist() == [1] * 5  # 2 : 2 : 1, by sums
    assert vote(logits, [0, 1, 2, 3, 4], "hard").labels.tolist() == [0, 0, 1, 2, 1]  # alone


def test_soft_vote_sums_probabilities():
    p = np.array([[0.51, 0.49, 0], [0.51, 0.49, 0], [0.02, 0.98, 0]]) + 1e-12
    assert vote(np.log(p), [0, 0, 0], "hard").labels.tolist() == [0, 0, 0]
    assert vote(np.log(p), [0, 0, 0], "soft").labels.tolist() == [1, 1, 1]
    assert vote(np.log(p) + 1000, [0, 0, 0], "soft").labels.tolist() == [1, 1, 1]  # no overflow


def test_product_vote_multiplies_probabilities():
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.05, 0.95]])  # 0.018 : 0.152
    assert vote(np.log(p[:2]), [0, 0], "product").labels.tolist() == [0, 0]
    assert vote(np.log(p) + 1000, [0, 0, 0], "product").labels.tolist() == [1, 1, 1]
    share = 0.152 ** (1 / 3) / (0.152 ** (1 / 3) + 0.018 ** (1 / 3))
    assert vote(np.log(p), [0, 0, 0], "product", share - 0.01).labels.tolist() == [1, 1, 1]
    assert vote(np.log(p), [0, 0, 0], "product", share + 0.01).labels.tolist() == [0, 0, 1]


def test_soft_vote_never_gives_a_label_that_no_chip_has():
    p = np.array([[0.55, 0.45, 1e-9], [1e-9, 0.45, 0.55]])  # label 1 has the highest sum
    assert set(vote(np.log(p), [0, 0], "soft").labels) <= {0, 2}


@pytest.mark.parametrize("how", WINNERS)
def test_a_vote_of_one_winner_never_invents_a_label(how):
    rng = np.random.default_rng(0)
    logits, clusters = rng.normal(size=(300, 10)), rng.integers(0, 80, 300)
    voted = vote(logits, clusters, how)
    assert voted.belief == 1 and (voted.share == 1).all()
    for cluster in np.unique(clusters):
        inside = clusters == cluster
        assert len(set(voted.labels[inside])) == 1
        assert voted.labels[inside][0] in logits[inside].argmax(1)


def test_a_narrow_winner_changes_nothing():
    logits = np.log(np.array([[0.6, 0.4], [0.6, 0.4], [0.3, 0.7]]))
    assert vote(logits, [0, 0, 0], "hard", 0.66).labels.tolist() == [0, 0, 0]  # 2 of 3
    assert vote(logits, [0, 0, 0], "hard", 0.67).labels.tolist() == [0, 0, 1]
    assert vote(logits, [0, 0, 0], "soft", 0.49).labels.tolist() == [0, 0, 0]  # 1.5 of 3
    assert vote(logits, [0, 0, 0], "soft", 0.51).labels.tolist() == [0, 0, 1]


def simulated(rng, classes, spread=1.5):
    """Calibrated logits [N, C] of chips of the given classes, int [N]."""
    centres = np.eye(classes.max() + 1)[classes]
    observed = centres + rng.normal(0, 1 / spread, centres.shape)
    return spread**2 * observed  # the log likelihood of each class, but for what all classes share


def posterior_by_enumeration(p, belief):
    """Posterior [N, C] of the labels of the chips of one cluster, summed over all its classes and labels.

    A class of the cluster has the weight of one chip: the geometric mean of the chips' likelihoods.
    """
    chips, classes = p.shape
    posterior = np.zeros_like(p)
    for cluster_class in range(classes):
        of_class = np.zeros_like(p)
        for labels in np.ndindex(*[classes] * chips):
            weight = 1.0
            for chip, label in enumerate(labels):
                weight *= (belief * (label == cluster_class) + (1 - belief) / classes) * p[chip, label]
            for chip, label in enumerate(labels):
                of_class[chip, label] += weight
        likelihood = of_class[0].sum()
        posterior += of_class / likelihood * likelihood ** (1 / chips)
    return posterior / posterior.sum(1, keepdims=True)


def test_mixture_vote_agrees_with_the_sum_over_all_cases():
    rng = np.random.default_rng(0)
    for belief in (0.0, 0.3, 0.8, 1.0):
        for _ in range(20):
            logits = rng.normal(0, 2, (4, 3))
            posterior = posterior_by_enumeration(np.exp(log_softmax(logits, 1)), belief)
            assert mixture_vote(logits, np.zeros(4, int), belief).labels.tolist() == posterior.argmax(1).tolist()


def test_mixture_vote_with_full_belief_is_the_product_vote_and_without_is_none():
    rng = np.random.default_rng(1)
    logits, clusters = rng.normal(size=(300, 5)), np.unique(rng.integers(0, 80, 300), return_inverse=True)[1]
    voted = mixture_vote(logits, clusters, 1.0)
    total = np.zeros((80, 5))
    np.add.at(total, clusters, log_softmax(logits, 1))
    assert (voted.labels == total.argmax(1)[clusters]).all()
    np.testing.assert_allclose(voted.share, 1)
    voted = mixture_vote(logits, clusters, 0.0)
    assert (voted.labels == logits.argmax(1)).all() and (voted.share == 0).all()


def test_belief_is_high_for_true_clusters_and_low_for_shuffled_ones():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(200), 4)
    classes = rng.integers(0, 10, 200)[clusters]
    logits = simulated(rng, classes)
    assert estimate_belief(logits, clusters) > 0.9
    assert estimate_belief(logits, rng.permutation(clusters)) < 0.1


def test_belief_is_the_share_of_chips_that_show_their_cluster():
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(500), 5)
    stranger = rng.random(len(clusters)) < 0.4
    classes = np.where(stranger, rng.integers(0, 10, len(clusters)), rng.integers(0, 10, 500)[clusters])
    logits = simulated(rng, classes, 2.0)
    assert estimate_belief(logits, clusters) == pytest.approx(0.6, abs=0.06)


def test_one_frequent_class_is_no_sign_that_clusters_hold():
    rng = np.random.default_rng(4)
    classes = rng.choice(3, 2000, p=(0.8, 0.15, 0.05))
    logits = simulated(rng, classes, 2.0)
    assert estimate_belief(logits, np.repeat(np.arange(400), 5)) < 0.1


def test_mixture_vote_helps_where_clusters_hold_and_harms_nowhere():
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(300), 5)
    classes = rng.integers(0, 6, 300)[clusters]
    logits = simulated(rng, classes)
    without_vote = (logits.argmax(1) == classes).mean()
    assert (vote(logits, clusters).labels == classes).mean() > without_vote + 0.1
    assert (vote(logits, rng.permutation(clusters)).labels == classes).mean() > without_vote - 0.01


def test_temperature_calibrates():
    rng = np.random.default_rng(6)
    classes = rng.integers(0, 5, 20_000)
    logits = simulated(rng, classes)
    assert fit_temperature(logits, classes) == pytest.approx(1, abs=0.05)
    assert fit_temperature(logits * 3, classes) == pytest.approx(3, abs=0.15)


def test_temperature_is_1_where_no_chip_is_wrong_for_then_nothing_bounds_it():
    logits = simulated(np.random.default_rng(6), np.arange(40) % 5)
    assert fit_temperature(logits, logits.argmax(1)) == 1
    labels = logits.argmax(1)
    labels[0] = (labels[0] + 1) % 5
    assert 0.1 < fit_temperature(logits, labels) < 10


def test_belief_is_measured_on_labelled_chips():
    rng = np.random.default_rng(8)
    clusters = np.repeat(np.arange(200), 5)
    classes = rng.integers(0, 6, 200)[clusters]
    logits = simulated(rng, classes)
    assert measure_belief(logits, clusters, classes) > 0.9
    assert measure_belief(logits, rng.permutation(clusters), classes) < 0.1
    # All chips of a cluster look alike, right or wrong: they agree, and yet the cluster adds nothing.
    alike = np.repeat(simulated(rng, classes[::5]), 5, axis=0)
    assert estimate_belief(alike, clusters) > 0.9
    assert measure_belief(alike, clusters, classes) < 0.5


def test_single_chips_keep_their_labels():
    logits = np.random.default_rng(7).normal(size=(50, 4))
    voted = vote(logits, np.arange(50))
    assert voted.labels.tolist() == logits.argmax(1).tolist() and voted.belief == 0


def test_predictions_that_say_little_are_no_reason_to_believe_a_cluster():
    rng = np.random.default_rng(9)
    clusters = np.repeat(np.arange(150), 4)
    classes = rng.integers(0, 10, 150)[clusters]
    logits = simulated(rng, classes, 0.7)  # a fifth of the labels is right
    assert estimate_belief(logits, clusters) > 0.6
    assert [estimate_belief(logits, rng.permutation(clusters)) for _ in range(5)] == [0.0] * 5


SHIFTED = np.random.default_rng(0).normal(size=(4000, 4)) * 2 + [3, 0, 0, -2]


def test_the_mean_prediction_gets_the_shares_of_the_labelled_chips():
    counts = np.array([9, 19, 29, 39])
    shift = shift_to_shares(SHIFTED, counts) * (len(SHIFTED) + FEW * 4) / len(SHIFTED)
    np.testing.assert_allclose(softmax(SHIFTED + shift, 1).mean(0), [0.1, 0.2, 0.3, 0.4], rtol=0.002)
    assert abs(shift.mean()) < 1e-12


def test_classes_without_a_labelled_chip_stay_possible_and_few_chips_move_little():
    shift = shift_to_shares(SHIFTED, [1000, 1000, 1000, 0])
    assert np.isfinite(shift).all() and softmax(SHIFTED + shift, 1)[:, 3].mean() > 1e-4
    one, many = (abs(shift_to_shares(logits, [5, 5, 5, 5])).max() for logits in (SHIFTED[:1], SHIFTED))
    assert one < 0.1 * many
    sure = shift_to_shares(np.array([[1e4, 0, 0, 0]] * 50), [5, 5, 5, 5])
    assert np.isfinite(sure).all()
