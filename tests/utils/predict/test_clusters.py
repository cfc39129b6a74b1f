import hashlib

from utils.predict.clusters import chip_numbers, choose_clustering, cluster_chips

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


@pytest.mark.parametrize("pattern", [
    "Gotcha{}.png", "SAR_{}.png", "{}.PNG", "HB{:05d}.006.png", "chip{}_000.png", "run2_{:04d}_v3.png", "a/9/x{}.tif",
    "2024-11-05 {:06d} (1).png", "0{}.jpeg", "{}{{}}.png",
])  # fmt: skip
def test_the_frame_number_is_the_run_of_digits_that_differs(pattern):
    numbers = np.random.default_rng(0).permutation(np.r_[3:40, 900:950, 100_000:100_020])
    names = [pattern.format(number) for number in numbers]
    np.testing.assert_array_equal(np.argsort(chip_numbers(names)), np.argsort(numbers))
    assert np.ptp(chip_numbers(names)) == np.ptp(numbers) and choose_clustering("both", names) == "both"


@settings(deadline=None, max_examples=100)
@given(
    numbers=st.lists(st.integers(0, 10**9), min_size=2, unique=True), width=st.integers(1, 12),
    words=st.lists(st.text("abcXYZ_-. ", min_size=1), min_size=3, max_size=3),
    fixed=st.lists(st.integers(0, 10**20), min_size=2, max_size=2),
)  # fmt: skip
def test_fixed_digits_before_and_behind_the_number_do_not_matter(numbers, width, words, fixed):
    names = [f"{words[0]}{fixed[0]}{words[1]}{n:0{width}d}{words[2]}{fixed[1]}.png" for n in numbers]
    np.testing.assert_array_equal(chip_numbers(names), numbers)
    order = np.random.default_rng(0).permutation(len(names))
    np.testing.assert_array_equal(chip_numbers([names[i] for i in order]), np.array(numbers)[order])


def test_of_several_runs_that_differ_the_one_with_most_values_counts_and_of_equal_ones_the_last():
    names = [f"HB{n:05d}.{n % 7:03d}.png" for n in range(1001, 1041)]
    assert chip_numbers(names).tolist() == list(range(1001, 1041))
    assert chip_numbers([f"{9 - n}_{n}.png" for n in range(5)]).tolist() == [0, 1, 2, 3, 4]
    assert chip_numbers(["Gotcha5.png", "Gotcha6 (1).png", "Gotcha7_v1.png"]).tolist() == [5, 6, 7]
    assert chip_numbers(["1.png", "9" * 40 + ".png"]).tolist() == [1, 10**18 - 1]


HASHES = [hashlib.md5(str(i).encode()).hexdigest() for i in range(200)]
NO_FRAME_NUMBERS = [
    ("the file names have no common pattern", [f"{name}.png" for name in HASHES]),
    ("the file names have no common pattern", [f"{name[:8]}.png" for name in HASHES]),
    ("80 of 80 chips have the same number as another one (run1_0.png, run2_0.png)",
     [f"run{run}_{n}.png" for n in range(40) for run in (1, 2)]),
    ("40 of 40 chips have the same number as another one", [f"chip_{n % 4}.png" for n in range(40)]),
    ("one sequence would hold 300 of 300 chips (SEQUENCE_GAP=100)", [f"chip{n}_000.png" for n in range(1001, 1301)]),
]  # fmt: skip


@pytest.mark.parametrize("names, chosen, why", [
    ([f"Gotcha{100 + i}.png" for i in range(9)], "both", "the numbers in the file names"),
    ([f"SAR_{100 + i}.png" for i in range(9)], "features", "named as in 2021/22"),
    (["a.png", *(f"Gotcha{100 + i}.png" for i in range(9))], "features", "hold no number"),
    ([f"scene{i % 2}_1.png" for i in range(9)], "features", "the same number"),
])  # fmt: skip
def test_auto_says_what_it_chose_and_why(names, chosen, why, capsys):
    assert choose_clustering("auto", names) == chosen
    printed = capsys.readouterr().out
    assert printed.startswith(f"CLUSTER_BY=auto: {chosen}; ") and why in printed


@pytest.mark.parametrize("by", ["both", "sequence"])
@pytest.mark.parametrize("reason, names", NO_FRAME_NUMBERS)
def test_without_frame_numbers_each_chip_is_alone_and_a_sentence_says_why(capsys, by, reason, names):
    assert choose_clustering(by, names) == "none"
    printed = capsys.readouterr().out
    assert printed.startswith(f"CLUSTER_BY={by} is not used, each chip is predicted by itself: {reason}")
    assert printed.count("\n") == 1
    for other in ("features", "none"):
        assert choose_clustering(other, names) == other
    assert not capsys.readouterr().out


def test_numbers_that_are_frame_numbers_are_used_in_silence(capsys):
    scenes_of_many = [f"Gotcha{start + i}.png" for start in range(0, 9000, 300) for i in range(20)]
    one_short_scene = [f"Gotcha{i}.png" for i in range(20)]
    one_number_twice = [*scenes_of_many, "SAR_7.png", "Gotcha0099.png"]
    for names in (scenes_of_many, one_short_scene, one_number_twice, ["Gotcha1.png"], []):
        assert choose_clustering("both", names) == "both"
    assert not capsys.readouterr().out
    assert choose_clustering("sequence", scenes_of_many, sequence_gap=281) == "none"


@pytest.mark.parametrize("by", ["both", "sequence"])
def test_names_without_numbers_are_refused_by_name(by):
    names = ["Gotcha1.png", "folder3/chip.png", "other.png"]
    for refused in (lambda: cluster_chips(np.ones((3, 2)), names, by), lambda: choose_clustering(by, names)):
        with pytest.raises(ValueError, match=r"folder3/chip\.png.*features"):
            refused()
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
