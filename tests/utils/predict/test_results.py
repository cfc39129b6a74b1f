"""results.py on test chips that are labelled, named or coded in other ways than those of the challenge."""

import csv
import hashlib
import json
import shutil

from data.layouts import OFFICIAL_CLASSES
from tests.conftest import load, must, run_script, same
from utils.predict.clusters import cluster_chips
from utils.report.metrics import intervals

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def results(pipeline):
    """A function that runs results.py on a folder of chips; returns its output, scores and submission."""
    cwd, _ = pipeline

    def run(test_dir, *settings):
        printed = must(run_script("results.py", cwd, f"TEST_DIR={test_dir}", "OUT_DIR=other", "REPORT=False",
                                  "ROTATIONS=0", "SCALES=1", *settings))  # fmt: skip
        with open(cwd / "other/results.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return printed, json.loads((cwd / "other/metrics.json").read_text()), rows

    return run


@pytest.fixture
def reference(tiny_demo):
    """{name of a chip in val: (class, whether it is OOD)}."""
    with open(next((tiny_demo / "val").glob("*.csv")), newline="") as file:
        return {row["image_id"]: (row["class"], row["OOD_flag"] == "1") for row in csv.DictReader(file)}


def sorted_rows(rows):
    return sorted((row["image_id"], row["class_id"], row["score"]) for row in rows)


@pytest.mark.slow
def test_class_folders_and_official_numbers_give_the_scores_of_the_named_reference(
    results, reference, tiny_demo, tmp_path
):
    _, expected, rows = results(tiny_demo / "val")
    for name, (label, ood) in reference.items():
        folder = tmp_path / "folders" / ("unknown kind" if ood else label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_demo / "val" / f"{name}.png", folder)
    printed, scores, of_folders = results(tmp_path / "folders")
    assert scores == expected and sorted_rows(of_folders) == sorted_rows(rows)
    assert f"{sum(ood for _, ood in reference.values())} of {len(reference)} chips are out of" in printed

    shutil.copytree(tiny_demo / "val", tmp_path / "numbers", ignore=shutil.ignore_patterns("*.csv"))
    with open(tmp_path / "numbers/reference.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "class", "OOD_flag"])
        for name, (label, ood) in reference.items():
            writer.writerow([name, "" if ood else OFFICIAL_CLASSES.index(label), int(ood)])
    assert results(tmp_path / "numbers")[1] == expected


def test_intervals_count_chips_of_one_vehicle_as_dependent_also_without_a_vote(results, reference, tiny_demo):
    printed, _, rows = results(tiny_demo / "val", "CLUSTER_BY=none")
    names = [f"Gotcha{row['image_id']}" for row in rows]
    truth = (reference[name] for name in names)
    labels = np.array([-1 if ood else OFFICIAL_CLASSES.index(kind) for kind, ood in truth])
    answer = np.array([int(row["class_id"]) for row in rows]), np.array([float(row["score"]) for row in rows])
    groups = cluster_chips(np.zeros((len(names), 1)), names, "sequence")
    low, high = intervals(*answer, labels, labels < 0, groups)["accuracy"]
    assert groups.max() + 1 < len(names) and f"accuracy {low:.3f} to {high:.3f}" in printed


@pytest.mark.parametrize("name", [
    lambda i, number: hashlib.md5(str(number).encode()).hexdigest(),
    pytest.param(lambda i, number: f"run{i % 3}_{i // 3:04d}", marks=pytest.mark.slow),
])  # fmt: skip
def test_names_without_frame_numbers_give_each_chip_its_own_prediction(results, reference, tiny_demo, tmp_path, name):
    lines = ["image_id,class,OOD_flag"]
    for i, (old, (label, ood)) in enumerate(reference.items()):
        shutil.copy(tiny_demo / "val" / f"{old}.png", tmp_path / f"{(new := name(i, old))}.png")
        lines.append(f"{new},{label},{int(ood)}")
    (tmp_path / "reference.csv").write_text("\n".join(lines))
    printed, scores, _ = results(tmp_path, "CLUSTER_BY=both")
    assert "CLUSTER_BY=both is not used, each chip is predicted by itself" in printed
    assert scores == results(tiny_demo / "val", "CLUSTER_BY=none")[1]
    assert "CLUSTER_BY=auto: features;" in results(tmp_path)[0]


@pytest.mark.slow
def test_signed_16_bit_arrays_train_and_predict_as_the_8_bit_files_that_they_were_made_from(
    pipeline, results, tiny_demo, tmp_path
):
    cwd, _ = pipeline
    shutil.copytree(tiny_demo, tmp_path / "deep")
    for folder in ("train/SAR_Train", "val", "test"):
        for path in (tmp_path / "deep" / folder).rglob("*.png"):
            np.save(path.with_suffix(".npy"), np.array(Image.open(path)).astype(np.int16) * 100 - 10_000)
            path.unlink()
    root, black_and_white = f"DATA_ROOT={tmp_path}/deep", "GREY_RANGE=-10000,15500"
    must(run_script("sar_feature.py", cwd, "EPOCHS=2", root, black_and_white, "OUT_DIR=deep/sar_feature"))
    must(run_script("finetune.py", cwd, "EPOCHS=2", "STUDENT=deep/sar_feature/best.pt", "OUT_DIR=deep/finetune"))
    for stage in ("sar_feature", "finetune"):
        deep, flat = load(cwd / f"deep/{stage}/best.pt"), load(cwd / f"runs/{stage}/best.pt")
        assert deep["grey_range"] == (-10_000, 15_500) and flat["grey_range"] == (0, 255)
        assert same(deep["model"], flat["model"])
    expected = results(tiny_demo / "val")
    assert results(tmp_path / "deep/val", "CHECKPOINT=deep/finetune/best.pt")[1:] == expected[1:]
