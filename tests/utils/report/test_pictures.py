import os
import subprocess
import sys

from tests.utils.report.example import make_prediction
from utils.report import pictures

import numpy as np
import pytest
import sklearn.metrics

RANDOM = np.random.default_rng(0)


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_confusion_equals_scikit_learn():
    prediction = make_prediction()
    known = prediction.in_distribution
    expected = sklearn.metrics.confusion_matrix(
        prediction.truth.labels[known], prediction.labels[known], labels=range(4)
    )
    assert np.array_equal(prediction.confusion, expected) and 0 < expected.trace() < expected.sum()
    axis = pictures.confusion(prediction).axes[0]
    shares = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(axis.images[0].get_array(), shares)
    assert [label.get_text() for label in axis.get_yticklabels()] == prediction.classes


def test_recall_equals_scikit_learn():
    prediction = make_prediction()
    known = prediction.in_distribution
    expected = sklearn.metrics.recall_score(
        prediction.truth.labels[known], prediction.labels[known], labels=range(4), average=None
    )
    left, right = pictures.recall(prediction).axes
    # The classes have 1, 2, 3 and 4 training chips; the most frequent stands first.
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], expected[::-1])
    assert [bar.get_width() for bar in right.patches] == [4, 3, 2, 1]
    assert [label.get_text() for label in left.get_yticklabels()] == prediction.classes[::-1]
    chips = np.bincount(prediction.truth.labels[known])[::-1]
    assert texts(left) == [f"{count} chips" for count in chips]


def test_confidence_threshold_passes_95_percent():
    prediction = make_prediction(400)
    axis = pictures.confidence(prediction).axes[0]
    threshold = axis.lines[0].get_xdata()[0]
    passed = prediction.confidence[prediction.in_distribution] >= threshold
    assert passed.mean() == pytest.approx(0.95, abs=0.01)


def test_confidence_of_equal_values_and_far_outliers():
    labels, values = np.zeros(30, int), RANDOM.normal(size=30)
    pictures.confidence(make_prediction(steps={"one": (labels, np.zeros(30))}))
    values[0] = -1e6
    axis = pictures.confidence(make_prediction(steps={"one": (labels, values)})).axes[0]
    assert axis.get_xlim()[0] > -100


def test_mistakes_are_wrong_known_chips_with_the_highest_probability_first():
    prediction = make_prediction(200)
    figure = pictures.mistakes(prediction)
    known = prediction.in_distribution
    wrong = np.flatnonzero(known & (prediction.labels != prediction.truth.labels))
    probability = prediction.probabilities[wrong, prediction.labels[wrong]]
    order = wrong[np.argsort(-probability)][:12]
    assert len(order) == 12
    for axis, chip in zip(figure.axes, order, strict=True):
        assert np.array_equal(axis.images[0].get_array(), prediction.chips(chip))
        true, predicted, nearest = axis.get_title().splitlines()
        assert true == f"true: {prediction.classes[prediction.truth.labels[chip]]}"
        assert predicted == f"predicted: {prediction.classes[prediction.labels[chip]]}"
        assert nearest.startswith(f"nearest: {prediction.classes[prediction.nearest[chip, 0]]}, ")


def test_clusters_show_chips_votes_and_truth_of_the_largest():
    groups = np.repeat([0, 1, 2], [5, 25, 10])
    prediction = make_prediction(40, clusters=groups)
    figure = pictures.clusters(prediction)
    strips, notes = figure.axes[::2], figure.axes[1::2]
    assert [texts(axis)[0].split(" chips")[0] for axis in notes] == ["25", "10", "5"]
    votes = np.bincount(prediction.labels_before_vote[groups == 1], minlength=4)
    winner = prediction.classes[votes.argmax()]
    assert texts(notes[0])[0].startswith(f"25 chips: {votes.max()} {winner}, ")
    ood = prediction.truth.ood[groups == 1].sum()
    assert ood and texts(notes[0])[0].endswith(f", {ood} out of distribution")
    strip = strips[0].images[0].get_array()
    assert np.array_equal(strip[:, :16], prediction.chips(5))
    assert np.array_equal(strip[:, 18:34], prediction.chips(8))  # every third of 25


def test_feature_map_rings_are_the_chips_out_of_distribution():
    prediction = make_prediction()
    axis = pictures.feature_map(prediction).axes[0]
    _, positions = pictures.map_positions(prediction.features)
    *points, rings = axis.collections
    assert len(points) == len(np.unique(prediction.labels))
    assert np.array_equal(rings.get_offsets(), positions[prediction.truth.ood])
    of_class_0 = positions[prediction.labels == 0]
    assert np.array_equal(points[0].get_offsets(), of_class_0)


@pytest.mark.parametrize("count", [1, 2, 30, 31])
def test_map_has_a_position_for_each_chip(count):
    chips, positions = pictures.map_positions(RANDOM.normal(size=(count, 3)).astype(np.float32))
    assert np.array_equal(chips, np.arange(count)) and positions.shape == (count, 2)
    assert np.isfinite(positions).all()


def test_map_of_chips_with_the_same_features():
    chips, positions = pictures.map_positions(np.ones((40, 16)))
    assert len(chips) == 40 and (positions == 1).all()


def test_map_of_many_chips_shows_a_sample(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_MAPPED", 20)
    features = RANDOM.normal(size=(50, 3))
    chips, positions = pictures.map_positions(features)
    assert chips.tolist() == list(range(0, 50, 3)) and np.array_equal(positions, features[chips, :2])


def test_roc_equals_scikit_learn():
    prediction = make_prediction(200)
    line = pictures.roc(prediction).axes[0].lines[1]
    area = sklearn.metrics.auc(line.get_xdata(), line.get_ydata())
    assert area == pytest.approx(prediction.scores["+ vote"]["AUROC"]) and area > 0.6


def test_reliability_shows_known_chips_by_bin():
    prediction = make_prediction(200)
    known = prediction.in_distribution
    probability = prediction.probabilities.max(1)[known]
    correct = (prediction.probabilities.argmax(1) == prediction.truth.labels)[known]
    bins = [(probability >= low / 10) & (probability < (low + 1) / 10) for low in range(10)]
    expected = [(probability[chips].mean(), correct[chips].mean()) for chips in bins if chips.any()]
    axis = pictures.reliability(prediction).axes[0]
    np.testing.assert_allclose(axis.lines[1].get_xydata(), expected)
    assert f"{pictures.calibration_error(probability, correct):.3f}" in axis.get_title()


def test_calibration_error():
    probability = np.array([0.95, 0.95, 0.95, 0.65, 0.61])
    correct = np.array([True, True, False, True, False])
    # Bin 0.9 to 1: |2/3 - 0.95| of 3 chips; bin 0.6 to 0.7: |1/2 - 0.63| of 2 chips.
    expected = (3 * abs(2 / 3 - 0.95) + 2 * abs(1 / 2 - 0.63)) / 5
    assert pictures.calibration_error(probability, correct) == pytest.approx(expected)
    assert pictures.calibration_error(np.ones(4), np.ones(4, bool)) == 0


def test_printable_names():
    assert pictures.printable(["a$b", "caf\udce9", "ü"]) == [r"a\$b", "caf?", "ü"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nonsense", "module://not_installed"])
def test_any_mplbackend(tmp_path, backend):
    """Curves and report need no backend; the one that the user asks for stays as it is."""
    program = f"""
from utils.report.curves import plot_history
plot_history({str(tmp_path / "curves.png")!r}, [{{"epoch": 1, "loss": 0.5, "accuracy": 0.5}}])
from pathlib import Path
from tests.utils.report.example import make_prediction
from utils.report.page import write_report
write_report(Path({str(tmp_path)!r}), make_prediction(truth=False))
import os, matplotlib
assert os.environ["MPLBACKEND"] == {backend!r}
print(dict.__getitem__(matplotlib.rcParams, "backend"))
"""
    environment = os.environ | {"MPLBACKEND": backend}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (backend in ended.stdout) == (backend != "nonsense")
    assert len(list(tmp_path.glob("*.png"))) == 4
