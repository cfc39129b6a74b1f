from utils.report.metrics import scores

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 400)
PREDICTED = np.where(RANDOM.random(400) < 0.7, LABELS, RANDOM.integers(0, 5, 400))
OOD = RANDOM.random(400) < 0.3
SCORE = RANDOM.normal(size=400) - OOD


def test_equals_scikit_learn():
    found = scores(PREDICTED, SCORE, LABELS, OOD)
    assert found["accuracy"] == pytest.approx(accuracy_score(LABELS[~OOD], PREDICTED[~OOD]))
    recall = recall_score(LABELS[~OOD], PREDICTED[~OOD], labels=range(4), average="macro")
    assert found["mean per-class accuracy"] == pytest.approx(recall)
    assert found["AUROC"] == pytest.approx(roc_auc_score(~OOD, SCORE)) and found["AUROC"] > 0.6
    assert found["total"] == pytest.approx(0.75 * found["accuracy"] + 0.25 * found["AUROC"])


def test_fpr_at_95_tpr_by_hand():
    known, unknown = np.arange(1.0, 101), np.array([0.5, 3.5, 6.5, 50.5])
    ood = np.repeat([False, True], [100, 4])
    # 95 of 100 known chips score 6 or more; of the unknown 6.5 and 50.5 do.
    found = scores(np.zeros(104), np.concatenate([known, unknown]), np.zeros(104), ood)
    assert found["FPR at 95 % TPR"] == 0.5


def test_undefined_without_ood_or_with_nothing_else():
    found = scores(PREDICTED, SCORE, LABELS, np.zeros(400, bool))
    assert np.isnan(found["AUROC"]) and np.isnan(found["total"]) and found["accuracy"] > 0.5
    found = scores(PREDICTED, SCORE, LABELS, np.ones(400, bool))
    assert all(np.isnan(v) for v in found.values())
