import subprocess
import sys

from utils.report.metrics import SCORES, class_mean_accuracy, intervals, resampled_scores, scores, undefined

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 400)
PREDICTED = np.where(RANDOM.random(400) < 0.7, LABELS, RANDOM.integers(0, 5, 400))
OOD = RANDOM.random(400) < 0.3
CONFIDENCE = RANDOM.normal(size=400) - OOD


def test_equals_scikit_learn():
    result = scores(PREDICTED, CONFIDENCE, LABELS, OOD)
    assert tuple(result) == SCORES
    assert result["accuracy"] == pytest.approx(accuracy_score(LABELS[~OOD], PREDICTED[~OOD]))
    recall = recall_score(LABELS[~OOD], PREDICTED[~OOD], labels=range(4), average="macro")
    assert result["mean per-class accuracy"] == pytest.approx(recall)
    assert result["AUROC"] == pytest.approx(roc_auc_score(~OOD, CONFIDENCE)) and result["AUROC"] > 0.6
    assert result["total"] == pytest.approx(0.75 * result["accuracy"] + 0.25 * result["AUROC"])


def test_fpr_at_95_tpr_by_hand():
    known, unknown = np.arange(1.0, 101), np.array([0.5, 3.5, 6.5, 50.5])
    ood = np.repeat([False, True], [100, 4])
    # 95 of 100 known chips score 6 or more; of the unknown 6.5 and 50.5 do.
    result = scores(np.zeros(104), np.concatenate([known, unknown]), np.zeros(104), ood)
    assert result["FPR at 95 % TPR"] == 0.5


def test_undefined_without_ood_or_with_nothing_else():
    result = scores(PREDICTED, CONFIDENCE, LABELS, np.zeros(400, bool))
    assert np.isnan(result["AUROC"]) and np.isnan(result["total"]) and result["accuracy"] > 0.5
    result = scores(PREDICTED, CONFIDENCE, LABELS, np.ones(400, bool))
    assert all(np.isnan(value) for value in result.values())
    assert "all scores are undefined" in undefined(np.ones(4, bool))
    assert "AUROC, FPR and total are undefined" in undefined(np.zeros(4, bool))
    assert undefined(np.array([True, False])) == ""


def test_class_mean_ignores_classes_that_do_not_occur():
    assert class_mean_accuracy(np.array([0, 0, 2, 1]), np.array([0, 0, 0, 1])) == pytest.approx((2 / 3 + 1) / 2)


def test_repeated_chips_count_as_often():
    repeated = np.random.default_rng(1).integers(0, 4, (5, 400))
    repeated[3, ~OOD] = 0
    repeated[4, OOD] = 0
    confidence = np.round(CONFIDENCE, 1)  # with ties
    samples = resampled_scores(PREDICTED, confidence, LABELS, OOD, repeated)
    for i, times in enumerate(repeated):
        expected = scores(*(np.repeat(x, times) for x in (PREDICTED, confidence, LABELS, OOD)))
        assert {name: values[i] for name, values in samples.items()} == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
def test_intervals_contain_the_score_and_are_wider_for_groups():
    """Copies of a chip in one group add no information: the interval stays as wide."""
    arrays = PREDICTED, CONFIDENCE, LABELS, OOD
    single = intervals(*arrays, np.arange(400), resamples=200)
    copied = intervals(*(np.repeat(x, 4) for x in arrays), np.repeat(np.arange(400), 4), resamples=200)
    for name, value in scores(*arrays).items():
        low, high = single[name]
        assert low < value < high
        assert copied[name] == pytest.approx(single[name])
    # 95 % of a normal distribution: 1.96 standard errors of a share.
    count, share = (~OOD).sum(), scores(*arrays)["accuracy"]
    expected = 2 * 1.96 * np.sqrt(share * (1 - share) / count)
    assert np.diff(single["accuracy"]) == pytest.approx(expected, rel=0.2)


def test_intervals_where_some_resamples_are_undefined():
    predicted = labels = np.zeros(4, int)
    ood = np.array([True, False, False, False])
    limits = intervals(predicted, np.arange(4.0), labels, ood, np.arange(4), resamples=100)
    assert limits["accuracy"] == (1, 1) and limits["AUROC"] == (1, 1)
    limits = intervals(predicted, np.arange(4.0), labels, np.ones(4, bool), np.arange(4), resamples=10)
    assert np.isnan(list(limits.values())).all()


@pytest.mark.slow
def test_scores_do_not_load_matplotlib():
    program = "import sys, utils.report.prediction; print({'matplotlib', 'sklearn.manifold'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


def test_one_group_gives_no_interval():
    predicted, labels, ood = np.array([0, 1, 1]), np.array([0, 1, -1]), np.array([False, False, True])
    limits = intervals(predicted, np.arange(3.0), labels, ood, np.zeros(3, int))
    assert set(limits) == set(SCORES) and np.isnan(list(limits.values())).all()
