from data.store import ChipStore
from models.backbone import Classifier
from utils.predict.tta import predict, replace_views, tta_views, view_features

import numpy as np
import pytest
import torch
import torch.nn.functional as F

GREY = (0.4, 0.12)
CHIPS = np.random.default_rng(0).integers(0, 256, (7, 56, 56), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Classifier("test_resnet", 5, 56).eval()


def store(chips=CHIPS):
    return ChipStore(np.ascontiguousarray(chips), torch.device("cpu"))


def test_views_are_the_product():
    assert len(tta_views((0, 90, 180, 270), (0.9, 1.0, 1.1))) == 24
    assert tta_views((0,), (1.0,)) == ((0, 1.0), (4, 1.0))
    assert tta_views((0, 360, -270), (1.0, 1.0)) == ((0, 1.0), (1, 1.0), (4, 1.0), (5, 1.0))
    for wrong in (((45,), (1.0,)), ((), (1.0,)), ((0,), ()), ((0,), (0.0,))):
        with pytest.raises(ValueError, match="ROTATIONS|SCALES"):
            tta_views(*wrong)


def test_views_are_replaced_by_rotations_or_scales():
    views = ((0, 1.0), (2, 1.0), (0, 1.25), (2, 1.25))
    assert replace_views(views) == views
    assert replace_views(views, scales=("0.5", "1")) == ((0, 0.5), (2, 0.5), (0, 1.0), (2, 1.0))
    assert replace_views(views, rotations=(90,)) == ((1, 1.0), (5, 1.0), (1, 1.25), (5, 1.25))
    assert replace_views(views, ("0", "90"), (1.0,)) == tta_views((0, 90), (1.0,))
    for wrong in (("45",), ("left",), ("nan",)):
        with pytest.raises(ValueError, match="ROTATIONS"):
            replace_views(views, rotations=wrong)
    for wrong in (("0",), ("-1",), ("large",), ("inf",)):
        with pytest.raises(ValueError, match="SCALES"):
            replace_views(views, scales=wrong)


def test_equals_a_naive_loop_over_views(model):
    logits, features = predict(model, store(), 56, GREY, tta_views((0, 90, 180, 270), (0.75, 1.0)), 3)
    for i, chip in enumerate(CHIPS):
        rows = []
        for scale in (42, 56):
            for flip in (False, True):
                for k in range(4):
                    turned = np.rot90(np.fliplr(chip) if flip else chip, k).copy()
                    image = torch.from_numpy(turned).float()[None, None]
                    if scale != 56:
                        image = F.interpolate(image, size=(scale, scale), mode="bilinear", antialias=True)
                    with torch.no_grad():
                        rows.append(model.features((image / 255 - GREY[0]) / GREY[1])[0])
        mean = torch.stack(rows).mean(0)
        torch.testing.assert_close(features[i], mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[i], model.head(mean).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("view", range(1, 8))
def test_prediction_does_not_change_when_the_chip_is_flipped_or_turned(model, view):
    turned = np.rot90(CHIPS[:, :, ::-1] if view >= 4 else CHIPS, view % 4, (1, 2))
    views = tta_views((0, 90, 180, 270), (0.875, 1.0))
    for one, two in zip(
        predict(model, store(), 56, GREY, views), predict(model, store(turned), 56, GREY, views), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_a_batch_too_large_for_the_memory_is_halved(model, monkeypatch):
    wanted, sizes = predict(model, store(), 56, GREY, tta_views((0, 90), (0.875, 1.0))), []
    features = model.features

    def small_memory(images):
        sizes.append(len(images))
        if len(images) > 10:
            raise torch.OutOfMemoryError("no memory left")
        return features(images)

    monkeypatch.setattr(model, "features", small_memory)
    results = predict(model, store(), 56, GREY, tta_views((0, 90), (0.875, 1.0)), batch_size=64)
    torch.testing.assert_close(results, wanted, atol=1e-4, rtol=1e-4)
    assert sizes[0] == 28 and max(sizes[-8:]) <= 10


def test_one_input_too_large_for_the_memory_ends_it(model, monkeypatch):
    def no_memory(images):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(model, "features", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        predict(model, store(), 56, GREY)


@pytest.mark.parametrize("view", [0, 3, 6])
def test_view_features_are_those_of_the_view(model, view):
    chosen = np.array([5, 0, 5])
    features = view_features(model, store(), 49, GREY, chosen, np.full(3, view))
    wanted = predict(model, store(CHIPS[chosen]), 56, GREY, ((view, 0.875),))[1]
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)
