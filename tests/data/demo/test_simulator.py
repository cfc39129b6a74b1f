"""The demo set: layout, references, numbering, repeatability, grey levels like the real ones."""

import csv
from collections import Counter
from pathlib import Path

from data.demo import ensure_demo, simulator, write_demo, writer
from data.demo import scenes as scenes_of
from data.demo.writer import TRAIN_COUNTS
from data.layouts import OFFICIAL_CLASSES

import numpy as np
import pytest
from PIL import Image

SMALL = {"sedan": 20, "bus": 4}
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo set with all classes and few chips."""
    root = tmp_path_factory.mktemp("simulate") / "demo"
    counts = {name: max(2, count // 40) for name, count in TRAIN_COUNTS.items()}
    write_demo(root, train_counts=counts, val_scenes=4, test_scenes=12)
    return root


@pytest.fixture(scope="module")
def sar_chips(demo):
    """The non-empty SAR chips of the demo set, grey levels in 0..1, float64 (N, 56, 56)."""
    return _grey_levels([*demo.glob("train/SAR_Train/*/*.png"), *demo.glob("test/*.png")])


@pytest.fixture(scope="module")
def real_chips(unicorn):
    return _grey_levels(unicorn.glob("*.png"))


def _read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def _grey_levels(paths):
    chips = [_read(path) for path in sorted(paths)]
    return np.stack([chip[:56, :56] / 255 for chip in chips if chip.any()])


def _autocorrelation(chips, lag, axis):
    """Correlation of pixels `lag` apart along an axis (1 = y, 2 = x), mean over chips (N, H, W)."""
    d = chips - chips.mean((1, 2), keepdims=True)
    ahead = np.take(d, range(lag, d.shape[axis]), axis)
    behind = np.take(d, range(d.shape[axis] - lag), axis)
    return ((ahead * behind).mean((1, 2)) / d.var((1, 2))).mean()


def _reference(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _gaps(folder):
    numbers = sorted(int(path.stem.removeprefix("Gotcha")) for path in folder.glob("*.png"))
    return np.diff(numbers)


def test_default_training_counts_have_a_long_tail_in_the_official_order():
    counts = list(TRAIN_COUNTS.values())
    assert tuple(TRAIN_COUNTS) == OFFICIAL_CLASSES
    assert counts == sorted(counts, reverse=True)
    assert counts[0] >= 100 * counts[-1]


def test_training_chips_come_in_pairs_of_eo_and_sar(demo):
    for name, count in TRAIN_COUNTS.items():
        eo = sorted((demo / "train/EO_Train" / name).glob("*.png"))
        sar = sorted((demo / "train/SAR_Train" / name).glob("*.png"))
        assert [path.name for path in eo] == [path.name for path in sar]
        assert len(eo) == max(2, count // 40)
        eo_chip, sar_chip = _read(eo[0]), _read(sar[0])
        assert eo_chip.shape == (32, 32) and eo_chip.dtype == np.uint8
        assert sar_chip.shape == (56, 56) and sar_chip.dtype == np.uint8


@pytest.mark.parametrize("reference", ["val/validation_reference.csv", "test/test_reference.csv"])
def test_reference_names_every_chip_once_and_flags_what_is_none_of_the_ten(demo, reference):
    rows = _reference(demo / reference)
    chips = {path.stem for path in (demo / reference).parent.glob("*.png")}
    assert len(rows) == len(chips) and {row["image_id"] for row in rows} == chips
    assert list(rows[0]) == ["image_id", "class", "OOD_flag"]
    assert all((row["class"] == "unknown") == (row["OOD_flag"] == "1") for row in rows)
    assert {row["class"] for row in rows} <= {*OFFICIAL_CLASSES, "unknown"}
    assert {row["OOD_flag"] for row in rows} == {"0", "1"}


def test_test_scenes_hold_every_class_and_a_fair_share_of_ood(demo):
    rows = _reference(demo / "test/test_reference.csv")
    assert {row["class"] for row in rows} == {*OFFICIAL_CLASSES, "unknown"}
    assert 0.1 < np.mean([row["OOD_flag"] == "1" for row in rows]) < 0.5


def test_scenes_are_dealt_evenly_from_classes_and_strangers():
    scenes = scenes_of.plan_scenes(np.random.default_rng(0), list(OFFICIAL_CLASSES), 200)
    counts = Counter(kind for scene in scenes for kind in scene)
    assert {len(scene) for scene in scenes} == {1, 2, 3}
    assert set(counts) == {*OFFICIAL_CLASSES, *simulator.STRANGERS}
    assert max(counts[name] for name in OFFICIAL_CLASSES) - min(counts[name] for name in OFFICIAL_CLASSES) <= 1
    assert sum(counts[name] for name in simulator.STRANGERS) == round(scenes_of.OOD_SHARE * counts.total())


@pytest.mark.parametrize("folder, scenes", [("val", 4), ("test", 12)])
def test_numbers_run_on_within_a_scene_and_jump_between_scenes(demo, folder, scenes):
    gaps = _gaps(demo / folder)
    within, between = gaps[gaps <= 5], gaps[gaps > 5]
    assert len(between) == scenes - 1
    assert between.min() >= 150 and between.max() <= 900
    assert 6 * scenes <= len(within) + scenes <= 24 * scenes


def test_some_scenes_follow_one_object_and_some_interleave_several(demo):
    rows = _reference(demo / "test/test_reference.csv")
    ends = np.flatnonzero(_gaps(demo / "test") > 5) + 1
    casts = [
        {row["class"] for row in rows[start:stop]}
        for start, stop in zip([0, *ends], [*ends, len(rows)], strict=True)
    ]
    assert {len(cast) for cast in casts} >= {1, 2}


def test_scenes_hold_only_the_trained_classes_and_ood_and_repeat_to_the_pixel(tmp_path):
    for name in ("one", "two"):
        write_demo(tmp_path / name, 3, SMALL, val_scenes=1, test_scenes=4)
    rows = _reference(tmp_path / "one/test/test_reference.csv")
    assert {row["class"] for row in rows} == {"sedan", "bus", "unknown"}
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    again = sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.*"))
    assert files == again and len(files) > 2 * 24
    for file in files:
        if file.suffix == ".png":
            assert np.array_equal(_read(tmp_path / "one" / file), _read(tmp_path / "two" / file))
        else:
            assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()


def test_another_seed_gives_other_chips(tmp_path):
    chips = []
    for seed in (0, 1):
        write_demo(tmp_path / str(seed), seed, {"sedan": 1}, val_scenes=1, test_scenes=1)
        chips.append(_read(tmp_path / str(seed) / "train/SAR_Train/sedan/000000.png"))
    assert not np.array_equal(*chips)


def test_grey_levels_match_the_published_figures(sar_chips):
    """FACTS: mean 0.406 to 0.418, standard deviation 0.125 to 0.128, seven percentiles."""
    assert sar_chips.mean() == pytest.approx(0.412, rel=TOLERANCE)
    assert sar_chips.std() == pytest.approx(0.1265, rel=TOLERANCE)
    percentiles = np.percentile(255 * sar_chips, (1, 5, 25, 50, 75, 95, 99))
    assert percentiles == pytest.approx((37, 54, 83, 104, 126, 170, 211), rel=TOLERANCE)


@pytest.mark.parametrize("axis, figures", [(2, (0.81, 0.57, 0.42, 0.35)), (1, (0.79, 0.53, 0.41, 0.36))])
def test_speckle_is_correlated_as_published(sar_chips, axis, figures):
    measured = [_autocorrelation(sar_chips, lag, axis) for lag in (1, 2, 3, 4)]
    assert measured == pytest.approx(figures, rel=TOLERANCE)


def test_grey_levels_match_the_real_chips(sar_chips, real_chips):
    assert sar_chips.mean() == pytest.approx(real_chips.mean(), rel=TOLERANCE)
    assert sar_chips.std() == pytest.approx(real_chips.std(), rel=TOLERANCE)
    spread, real_spread = (c.std((1, 2)).mean() for c in (sar_chips, real_chips))
    assert spread == pytest.approx(real_spread, rel=TOLERANCE)
    for axis in (1, 2):
        for lag in (1, 2, 3, 4):
            assert _autocorrelation(sar_chips, lag, axis) == pytest.approx(
                _autocorrelation(real_chips, lag, axis), rel=TOLERANCE
            )


def test_a_tall_block_is_laid_over_towards_the_radar_and_throws_its_shadow_away_from_it():
    block = [simulator.Block(0, 0, 6, 6, 3, simulator.CONCRETE)]
    looks = [simulator.sar_chip(np.random.default_rng(i), block, np.pi / 4) for i in range(20)]
    centre = np.mean(looks, 0)[:, 26:30].mean(1)
    ground = np.mean(looks, 0)[:, :4].mean()
    metre = 56 / simulator.CHIP_METRES
    near, far = 28 - 3 * metre, 28 + 3 * metre  # the block's sides
    assert centre[int(near - 2 * metre) : int(near)].mean() > 1.1 * ground
    assert centre[int(far + metre / 2) : int(far + 2.5 * metre)].mean() < 0.8 * ground


def test_a_side_flashes_when_it_faces_the_radar():
    def bright_pixels(heading):
        bus = simulator.at_pose(simulator.VEHICLES["bus"], 0, 0, heading)
        chips = [simulator.sar_chip(np.random.default_rng(i), bus, 0.7) for i in range(20)]
        return np.mean(np.array(chips) > 220)

    assert bright_pixels(0.0) > 2 * bright_pixels(0.6)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="delete it"):
        write_demo(tmp_path, train_counts=SMALL, val_scenes=1, test_scenes=1)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "simulate_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", train_counts=SMALL, val_scenes=1, test_scenes=1)
    assert list(tmp_path.iterdir()) == []


def test_ensure_demo_writes_the_default_root_once_and_no_other(tmp_path, monkeypatch):
    written = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(writer, "write_demo", written.append)
    ensure_demo("datasets/unicorn")
    assert written == []
    ensure_demo("./datasets/demo/")
    assert written == ["./datasets/demo/"]
    Path("datasets/demo").mkdir(parents=True)
    ensure_demo("datasets/demo")
    assert len(written) == 1
