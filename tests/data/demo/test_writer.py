"""The demo set: layout, references, numbers and groups like the real ones, the same on any number of processes."""

import csv
from collections import Counter
from pathlib import Path

from data.demo import ensure_demo, write_demo, writer
from data.demo.scenes import FRAMES, MIXED, VALIDATION, plan_groups, plan_survey
from data.demo.writer import TEST_GROUPS, TEST_SCALE, TRAIN_COUNTS
from data.labelled import find_test
from data.layouts import OFFICIAL_CLASSES, find_pairs
from tests.conftest import real_chips

import numpy as np
import pytest
from PIL import Image

SMALL = {"sedan": 20, "bus": 4}
GAP = 100  # a larger gap between numbers separates groups


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo set with two classes and few chips."""
    root = tmp_path_factory.mktemp("simulate") / "demo"
    write_demo(root, train_counts=SMALL, val_scale=0.02, test_scale=0.02)
    return root


@pytest.fixture(scope="module")
def survey():
    return plan_survey(np.random.default_rng([0, 1]), TRAIN_COUNTS)


def _read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def _rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _numbers(plan):
    return np.array([number for group in plan for number in group.numbers])


def _groups(numbers):
    """Sizes of the groups into which sorted numbers fall."""
    return np.diff([0, *(np.flatnonzero(np.diff(numbers) > GAP) + 1), len(numbers)])


def _files(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.*")) if path.is_file()}


def test_training_counts_have_a_long_tail_of_chips_and_of_individuals(survey):
    counts = list(TRAIN_COUNTS.values())
    assert tuple(TRAIN_COUNTS) == OFFICIAL_CLASSES
    assert counts == sorted(counts, reverse=True) and counts[0] >= 100 * counts[-1]
    assert Counter({v.kind: 0 for v in survey}).keys() == TRAIN_COUNTS.keys()
    for kind, count in TRAIN_COUNTS.items():
        assert sum(len(v.numbers) for v in survey if v.kind == kind) == count
    parked = Counter(v.kind for v in survey if not v.moving)
    assert parked["sedan"] > 40 and all(2 <= parked[kind] <= 3 for kind in OFFICIAL_CLASSES[-4:])
    assert 0 < sum(len(v.numbers) for v in survey if v.moving) < 0.05 * sum(counts)


def test_numbers_run_through_the_objects_of_one_frame_after_the_other(survey):
    frame = {number: f for v in survey for number, f in zip(v.numbers, v.frames, strict=True)}
    assert sorted(frame) == list(range(sum(TRAIN_COUNTS.values())))
    in_order = [frame[number] for number in sorted(frame)]
    assert in_order == sorted(in_order) and in_order[-1] < FRAMES
    # An individual comes once a frame, and again after about as many numbers as a frame has objects.
    for visits in survey:
        assert len(set(visits.frames)) == len(visits.frames)
    rare = np.concatenate([np.diff(v.numbers) for v in survey if v.kind in OFFICIAL_CLASSES[-4:]])
    assert np.median(rare) == pytest.approx(len(frame) / FRAMES, rel=0.5)


def test_the_validation_set_has_the_kinds_and_groups_of_the_real_one():
    plan = plan_groups(np.random.default_rng([0, 2]), OFFICIAL_CLASSES)
    rows = _rows(real_chips("mavic_tables") / "validation_reference_2026.csv")
    ours = Counter(group.kind for group in plan for _ in group.numbers)
    assert ours == Counter(row["class"] for row in rows)
    assert {kind for kind in ours if kind not in OFFICIAL_CLASSES} == {
        row["class"] for row in rows if row["OOD_flag"] == "1"
    }
    assert Counter(group.kind for group in plan) == {kind: groups for kind, (_, groups) in VALIDATION.items()}
    real = np.sort([int(row["image_id"].removeprefix("Gotcha")) for row in rows])
    assert len(_groups(_numbers(plan))) == len(_groups(real)) == 342


@pytest.mark.parametrize("seed, chips, groups, known", [
    (2, 1.0, 1.0, (1_417, 342, 126, 46)), (3, TEST_SCALE, TEST_GROUPS * TEST_SCALE, (4_000, 1_082, 467, 135)),
])  # fmt: skip
def test_sizes_and_gaps_are_like_those_of_the_real_numbers(seed, chips, groups, known):
    """known: chips, groups, groups of one chip and largest group of the real validation and test numbers."""
    plan = plan_groups(np.random.default_rng([0, seed]), OFFICIAL_CLASSES, chips, groups)
    numbers = _numbers(plan)
    sizes, gaps = _groups(numbers), np.diff(numbers)
    assert gaps.min() >= 1
    assert (len(numbers), len(sizes)) == pytest.approx(known[:2], rel=0.03)
    assert (sizes == 1).sum() == pytest.approx(known[2], rel=0.4)
    assert np.median(sizes) == 2 and 5 <= np.percentile(sizes, 90) <= 11
    assert known[3] / 2 < sizes.max() <= 1.1 * known[3]
    assert len(plan) - len(sizes) == len(plan) // MIXED
    within, between = gaps[gaps <= GAP], gaps[gaps > GAP]
    assert np.abs(np.percentile(within, (5, 25, 50, 75)) - (1, 2, 5, 14)).max() <= 2
    assert np.percentile(within, 95) == pytest.approx(51, rel=0.2)
    assert np.percentile(between, (5, 25, 50)) == pytest.approx((113, 170, 451), rel=0.25)
    assert np.log(np.percentile(between, (75, 95))) == pytest.approx(np.log((8_287, 106_739)), abs=0.7)


def test_training_chips_come_in_pairs_and_entities_names_the_individual_of_each(demo):
    pairs = find_pairs(demo)
    assert dict(zip(pairs.classes, pairs.counts, strict=True)) == SMALL
    assert _read(pairs.eo[0]).shape == (32, 32) and _read(pairs.sar[0]).shape == (56, 56)
    assert _read(pairs.eo[0]).dtype == _read(pairs.sar[0]).dtype == np.uint8
    rows = _rows(demo / "entities.csv")
    assert list(rows[0]) == ["chip", "entity"]
    entity = {row["chip"]: row["entity"] for row in rows}
    assert entity.keys() == {Path(path).stem for path in pairs.eo} and len(rows) == len(entity)
    names = [entity[Path(path).stem] for path in pairs.eo]
    of_class = [set(np.array(names)[pairs.labels == label]) for label in range(2)]
    assert [len(names) for names in of_class] == [3, 3] and not of_class[0] & of_class[1]


@pytest.mark.parametrize("reference", ["val/validation_reference.csv", "test/test_reference.csv"])
def test_a_reference_names_every_chip_once_with_its_kind_and_flags_the_unknown(demo, reference):
    rows = _rows(demo / reference)
    chips = {path.stem for path in (demo / reference).parent.glob("*.png")}
    assert len(rows) == len(chips) and {row["image_id"] for row in rows} == chips
    assert list(rows[0]) == ["image_id", "class", "OOD_flag"]
    assert {row["class"] for row in rows if row["OOD_flag"] == "0"} == set(SMALL)
    unknown = {row["class"] for row in rows if row["OOD_flag"] == "1"}
    assert unknown == {kind for kind in VALIDATION if kind not in OFFICIAL_CLASSES}


def test_empty_chips_are_as_frequent_as_in_the_real_set(monkeypatch):
    from data.demo import scenes

    monkeypatch.setattr(scenes, "sar_chip", lambda *_: np.full((56, 56), 9, np.uint8))
    site_of = scenes.new_site(np.random.default_rng(0), [], 0.0)
    monkeypatch.setattr(scenes, "new_site", lambda *_: site_of)
    group = scenes.Group("sedan", list(range(8_000)))
    empty = [not chip.any() for chip in scenes.group_chips(np.random.default_rng(0), group)]
    assert np.mean(empty) == pytest.approx(2 / 826, rel=0.5)


@pytest.mark.slow
def test_the_files_are_the_same_on_any_number_of_processes_and_others_for_another_seed(demo, tmp_path):
    write_demo(tmp_path / "one", 0, SMALL, 0.02, 0.02, workers=1)
    write_demo(tmp_path / "three", 0, SMALL, 0.02, 0.02, workers=3)
    write_demo(tmp_path / "other", 1, SMALL, 0.02, 0.02, workers=1)
    assert _files(tmp_path / "one") == _files(tmp_path / "three") == _files(demo)
    first, other = _files(tmp_path / "one"), _files(tmp_path / "other")
    assert not {data for path, data in first.items() if path.suffix == ".png"} & set(other.values())


@pytest.mark.slow
def test_the_default_set_is_complete_and_holds_empty_chips(tmp_path):
    root = tmp_path / "demo"
    write_demo(root)
    pairs = find_pairs(root)
    assert dict(zip(pairs.classes, pairs.counts, strict=True)) == TRAIN_COUNTS
    assert any(not _read(path).any() for path in pairs.sar) and all(_read(path).any() for path in pairs.eo)
    test = list(find_test(root).glob("*.png"))
    assert any(not _read(path).any() for path in test) and 3_900 < len(test) < 4_050
    assert len(list(root.rglob("*.png"))) == pytest.approx(13_400, rel=0.01)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError, match="delete it"):
        write_demo(tmp_path, train_counts=SMALL)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch, workers):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "group_chips", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_demo(tmp_path / "demo", train_counts=SMALL, val_scale=0.02, test_scale=0.02, workers=workers)
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
