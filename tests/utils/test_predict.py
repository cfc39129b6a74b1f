from data.store import ChipStore
from models.backbone import Classifier
from utils.predict import predict, tta_views

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


def test_each_keeps_the_views_apart(model):
    views = tta_views((0, 90), (1.0,))
    apart, features = predict(model, store(), 56, GREY, views, each=True, batch_size=4)
    assert apart.shape == (4, 7, 5) and features.shape == (4, 7, model.width)
    torch.testing.assert_close(apart.mean(0), predict(model, store(), 56, GREY, views)[0])
