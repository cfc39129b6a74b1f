import csv
import subprocess
import sys
from pathlib import Path

from data.labelled import find_chips
from tests.conftest import must, run_script
from utils.predict import Predictor

import numpy as np
import pytest
import torch
from PIL import Image


def test_equals_results_without_clusters(pipeline, tiny_demo):
    cwd, _ = pipeline
    must(run_script("results.py", cwd, "CLUSTER_BY=none", "REPORT=False", "OUT_DIR=no_clusters"))
    with open(cwd / "no_clusters/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    predictor = Predictor.load(cwd / "runs/finetune/best.pt", device="cpu")
    predictions = predictor(tiny_demo / "test")
    assert [f"Gotcha{row['image_id']}.png" for row in rows] == [Path(name).name for name in predictions.names]
    official = ("sedan", "SUV", "pickup_truck", "van", "box_truck", "motorcycle", "flatbed_truck", "bus")
    assert predictions.labels == [official[int(row["class_id"])] for row in rows]
    np.testing.assert_allclose(predictions.confidence, [float(row["score"]) for row in rows], atol=1e-4)
    few = predictor(find_chips(tiny_demo / "test")[3:5])
    np.testing.assert_allclose(few.confidence, predictions.confidence[3:5], atol=1e-4)


def same(one, two):
    assert one.labels == two.labels and len(one) == len(two)
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-5)
    np.testing.assert_allclose(one.confidence, two.confidence, rtol=1e-4)


def test_every_kind_of_image_gives_the_same(make_checkpoint, chips, tmp_path):
    predictor = Predictor.load(str(make_checkpoint()), device="cpu")
    expected = predictor(chips)
    assert len(expected) == 5 and expected.probabilities.shape == (5, 3)
    assert expected.classes == ("sedan", "SUV", "van") and expected.names == ["0", "1", "2", "3", "4"]
    np.testing.assert_allclose(expected.probabilities.sum(1), 1, rtol=1e-5)
    (tmp_path / "chips").mkdir()
    paths = [tmp_path / "chips" / f"{i}.png" for i in range(5)]
    images = [Image.fromarray(chip) for chip in chips]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    colours = np.stack([chips] * 3, -1)
    for several in (paths, list(map(str, paths)), tmp_path / "chips", images, list(chips), colours):
        same(predictor(several), expected)
    assert predictor(paths).names == list(map(str, paths))
    first = predictor(chips[:1])
    for one in (paths[0], str(paths[0]), images[0], images[0].convert("RGBA"), chips[0], colours[0]):
        same(predictor(one), first)
    assert len(predictor(chips[:3])) == 3 and len(predictor([chips[0]] * 3)) == 3
    larger = [image.resize((48, 40)) for image in images]
    larger[0].save(tmp_path / "larger.png")
    same(predictor(larger[0]), predictor(tmp_path / "larger.png"))


def test_batches_do_not_matter_and_views_can_be_left_out(make_checkpoint, chips):
    path = make_checkpoint()
    same(Predictor.load(path, batch_size=1)(chips), Predictor.load(path)(chips))
    without = make_checkpoint("without.pt", views=((0, 1.0),))
    same(Predictor.load(path, tta=False)(chips), Predictor.load(without)(chips))


def test_members_with_other_chip_sides_and_backbones_predict_together(make_checkpoint, chips):
    paths = [make_checkpoint(), make_checkpoint("b.pt", seed=1, chip_side=24, backbone="test_efficientnet")]
    one, two, both = (Predictor.load(path, ood_score="energy")(chips) for path in (*paths, paths))
    np.testing.assert_allclose(both.probabilities, (one.probabilities + two.probabilities) / 2, atol=1e-6)
    np.testing.assert_allclose(both.confidence, (one.confidence + two.confidence) / 2, atol=1e-5)


def test_chips_of_more_than_8_bits_are_read_through_the_checkpoint_s_range(make_checkpoint, chips, tmp_path):
    expected = Predictor.load(make_checkpoint("flat.pt"))(chips)
    predictor = Predictor.load(make_checkpoint("deep.pt", grey_range=(-20.0, 235.0)))
    deep = chips.astype(np.float32) - 20
    paths = [tmp_path / f"{i}.npy" for i in range(5)]
    for path, chip in zip(paths, deep, strict=True):
        np.save(path, chip)
    images = [Image.fromarray(chip) for chip in deep]
    for several in (deep, list(deep), paths, images, deep.astype(np.int16), deep.astype(float), chips):
        same(predictor(several), expected)
    both = Predictor.load([tmp_path / "flat.pt", tmp_path / "deep.pt"])
    with pytest.raises(ValueError, match=r"image 0 is an array float32 \[32, 32\]"):
        both(deep)
    same(both(chips), Predictor.load([tmp_path / "flat.pt"] * 2)(chips))


@pytest.mark.parametrize("images, message", [
    ([], "no images"),
    (np.zeros((4, 4)), r"float64 \[4, 4\]"),
    (np.zeros((1, 2, 3, 4), np.uint8), r"uint8 \[1, 2, 3, 4\]"),
    (np.stack([np.eye(32, dtype=np.uint8)] * 3), r"\[3, 32, 32\] looks like one chip with channels first"),
    ("nowhere.png", "image nowhere.png cannot be read"),
    (torch.zeros((2, 32, 32)), "image 0 is of the type Tensor; give a path"),
    (b"\x89PNG", "image 0 is of the type int"),
    (None, "image 0 is of the type NoneType"),
])  # fmt: skip
def test_what_is_no_image_is_refused(make_checkpoint, images, message):
    with pytest.raises(ValueError, match=message):
        Predictor.load(make_checkpoint())(images)


@pytest.mark.slow
def test_the_training_loop_imports_neither_matplotlib_nor_clustering():
    slow = {"matplotlib", "sklearn.manifold", "sklearn.cluster"}
    code = f"import sys, utils.train.loop; print({slow} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
