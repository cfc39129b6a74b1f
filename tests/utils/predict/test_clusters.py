from utils.predict.clusters import cluster_chips

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score


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
        names += [f"Gotcha{n}.png" for of_vehicle in turns for n in np.sort(of_vehicle)]
        number += lengths.sum() + gap
        for kind, length in zip(rng.choice(8, count, replace=False), lengths, strict=True):
            phase = rng.uniform(0, 2 * np.pi) + np.sort(rng.uniform(0, np.pi, length))
            arc = np.stack([np.cos(phase), np.sin(phase)], 1) @ rng.normal(size=(2, dimensions))
            noise = rng.normal(size=(length, dimensions)) + drift * arc
            features.append(3 / np.sqrt(dimensions) + kinds[kind] + noise @ spread.T)
            truth += [max(truth, default=-1) + 1] * length
    return np.concatenate(features), np.array(names), np.array(truth)


@pytest.mark.parametrize("dimensions", [16, 64, 512])
@pytest.mark.parametrize("seed", [0, 1])
def test_scenes_of_one_two_and_three_vehicles_are_separated(dimensions, seed):
    rng = np.random.default_rng(seed)
    features, names, truth = scenes(rng, [1] * 18 + [2] * 10 + [3] * 2, dimensions)
    assert adjusted_rand_score(truth, cluster_chips(features, names)) > 0.95
    assert adjusted_rand_score(truth, cluster_chips(features, names, "sequence")) < 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scenes_of_one_vehicle_each_are_not_split(seed):
    features, names, truth = scenes(np.random.default_rng(seed), [1] * 30)
    assert cluster_chips(features, names).max() + 1 <= 31


@pytest.mark.parametrize("vehicles", [1, 2, 3])
def test_a_single_scene_is_enough(vehicles):
    features, names, truth = scenes(np.random.default_rng(vehicles), [vehicles], distance=4)
    assert adjusted_rand_score(truth, cluster_chips(features, names)) == 1


def test_sequences_break_where_the_gap_exceeds_the_limit():
    names = ["Gotcha1.png", "Gotcha101.png", "Gotcha202.png", "Gotcha203.png", "Gotcha203.png"]
    ids = cluster_chips(np.ones((5, 4)), names, "sequence", sequence_gap=100)
    assert ids.tolist() == [0, 0, 1, 1, 1]
    assert ids.dtype == np.int64
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
    with pytest.raises(ValueError, match="2 .* 1"):
        cluster_chips(np.ones((2, 2)), ["a1"])


@pytest.mark.parametrize("by", ["features", "sequence", "both", "none"])
def test_the_order_of_the_chips_does_not_matter(by):
    features, names, _ = scenes(np.random.default_rng(0), [1, 2, 2, 1])
    order = np.random.default_rng(1).permutation(len(names))
    ids = cluster_chips(features, names, by)
    shuffled = cluster_chips(features[order], names[order], by)
    assert adjusted_rand_score(ids[order], shuffled) == 1
    assert set(ids) == set(range(ids.max() + 1))


@pytest.mark.parametrize("by", ["features", "sequence", "both", "none"])
@pytest.mark.parametrize("chips", [0, 1, 2, 3])
def test_few_chips(by, chips):
    features = np.eye(4, dtype=np.float32)[:chips]
    ids = cluster_chips(features, [f"Gotcha{i}.png" for i in range(chips)], by, clusters=9)
    assert ids.shape == (chips,) and ids.dtype == np.int64
    assert set(ids) == set(range(ids.max(initial=-1) + 1))


def test_two_vehicles_one_after_the_other_are_split_and_equal_chips_are_not():
    names = [f"Gotcha{i}.png" for i in range(10)]
    assert cluster_chips(np.repeat(np.eye(2), 5, axis=0), names).tolist() in (
        [0] * 5 + [1] * 5, [1] * 5 + [0] * 5)
    assert cluster_chips(np.full((10, 2), 0.3), names).max() == 0
    assert cluster_chips(np.zeros((10, 2)), names).max() == 0


def test_the_length_of_the_features_does_not_matter():
    rng = np.random.default_rng(0)
    features, names, _ = scenes(rng, [1, 2, 1, 2])
    longer = features * rng.uniform(0.1, 10, (len(features), 1))
    assert (cluster_chips(features, names) == cluster_chips(longer, names)).all()


def test_features_gives_the_number_of_clusters_asked_for():
    features, names, _ = scenes(np.random.default_rng(0), [1, 2, 2, 1])
    assert cluster_chips(features, names, "features", clusters=6).max() == 5


def test_more_chips_than_ward_takes():
    features, names, truth = scenes(np.random.default_rng(0), [2], 16, 4, frames=(800, 900))
    assert adjusted_rand_score(truth, cluster_chips(features, names)) > 0.95
