import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from utils.cluster import cluster_chips, vote

A, B, C = 0, 1, 2


def one_hot(labels, classes=3, height=4.0):
    return height * np.eye(classes)[labels]


def scenes(rng, vehicles, dimensions=64, distance=2.5, drift=1.0, frames=(8, 20), gap=300):
    """Features, names and true vehicle of scenes with `vehicles` vehicles each, frames interleaved.

    A vehicle's frames spread by an anisotropic Gaussian of total variance 1 and move along an arc,
    as they do when its pose drifts; two vehicles lie about sqrt(2) * `distance` apart.
    """
    spread = np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]
    spread *= np.arange(1, dimensions + 1) ** -0.25
    spread /= np.linalg.norm(spread)
    kinds = rng.normal(size=(8, dimensions)) * distance / np.sqrt(dimensions)
    features, names, truth, number = [], [], [], 1000
    for count in vehicles:
        lengths = rng.integers(*frames, count)
        numbers = number + rng.permutation(lengths.sum())
        turns = np.split(numbers, np.cumsum(lengths)[:-1])  # whose frame it is changes at random
        names += [f"Gotcha{n}.png" for turn in turns for n in np.sort(turn)]
        number += lengths.sum() + gap
        for kind, length in zip(rng.choice(8, count, replace=False), lengths, strict=True):
            phase = rng.uniform(0, 2 * np.pi) + np.sort(rng.uniform(0, np.pi, length))
            arc = np.stack([np.cos(phase), np.sin(phase)], 1) @ rng.normal(size=(2, dimensions))
            noise = rng.normal(size=(length, dimensions)) + drift * arc
            features.append(3 / np.sqrt(dimensions) + kinds[kind] + noise @ spread.T)
            truth += [max(truth, default=-1) + 1] * length
    return np.concatenate(features), np.array(names), np.array(truth)


@pytest.mark.parametrize("dimensions", [16, 64, 512])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scenes_of_one_two_and_three_vehicles_are_told_apart(dimensions, seed):
    rng = np.random.default_rng(seed)
    features, names, truth = scenes(rng, [1] * 18 + [2] * 10 + [3] * 2, dimensions)
    found = cluster_chips(features, names)
    assert adjusted_rand_score(truth, found) > 0.95


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scenes_of_one_vehicle_each_are_left_whole(seed):
    features, names, truth = scenes(np.random.default_rng(seed), [1] * 30)
    assert cluster_chips(features, names).max() + 1 <= 31


@pytest.mark.parametrize("vehicles", [1, 2, 3])
def test_a_single_scene_is_enough(vehicles):
    features, names, truth = scenes(np.random.default_rng(vehicles), [vehicles], distance=4)
    assert adjusted_rand_score(truth, cluster_chips(features, names)) == 1


def test_sequences_break_where_the_gap_exceeds_the_limit():
    names = ["Gotcha1.png", "Gotcha101.png", "Gotcha202.png", "Gotcha203.png", "Gotcha203.png"]
    found = cluster_chips(np.ones((5, 4)), names, "sequence", sequence_gap=100)
    assert found.tolist() == [0, 0, 1, 1, 1]
    assert found.dtype == np.int64
    assert cluster_chips(np.ones((5, 4)), names, "sequence", sequence_gap=0).max() == 3


def test_the_last_digits_of_the_file_name_count():
    names = ["run2/Gotcha1000.png", "9/SAR_2_1001.PNG", "SAR_1002", "part7/v2_900000_0999.jpeg",
             "Gotcha5000.png"]
    assert cluster_chips(np.ones((5, 2)), names, "sequence").tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("by", ["both", "sequence"])
def test_names_without_numbers_are_refused_by_name(by):
    names = ["Gotcha1.png", "folder3/chip.png", "other.png"]
    with pytest.raises(ValueError, match=r"folder3/chip\.png.*features"):
        cluster_chips(np.ones((3, 2)), names, by)
    assert len(cluster_chips(np.ones((3, 2)), names, "features")) == 3


def test_unknown_choices_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="features, sequence, both, none"):
        cluster_chips(np.ones((1, 2)), ["a1"], "scene")
    with pytest.raises(ValueError, match="hard.*soft"):
        vote(np.ones((1, 2)), [0], "median")
    with pytest.raises(ValueError, match="2 .* 1"):
        cluster_chips(np.ones((2, 2)), ["a1"])
