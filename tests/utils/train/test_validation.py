"""Which scales the views keep: the choice by hand, on networks whose errors are made."""

from data.layouts import Pairs
from data.split import TrainingPairs
from data.store import ChipStore
from models.backbone import Classifier
from utils.predict.tta import all_views, predict
from utils.train import validation
from utils.train.validation import Validation, unseen_pairs

import numpy as np
import pytest
import torch
import torch.nn.functional as F

SCALES = (0.875, 1.0, 1.125)
LABELS = np.repeat([0, 1], [300, 100])


@pytest.fixture
def chosen(monkeypatch):
    def choose(wrong):
        """The scales that are kept where a network is wrong on the first chips of each class: {scale: how many}."""

        def made(model, store, image_size, grey, views, progress=""):
            (scale,) = {scale for _, scale in views}
            assert len(views) == 8
            is_right = torch.from_numpy(np.concatenate([np.arange(300), np.arange(100)]) >= wrong[scale])
            logits = F.one_hot(torch.from_numpy(LABELS), 2).float()
            return torch.where(is_right[:, None], logits, 1 - logits), torch.full((400, 3), scale)

        monkeypatch.setattr(validation, "predict", made)
        store = ChipStore(np.zeros((400, 8, 8), np.uint8), torch.device("cpu"))
        validate = Validation(store, LABELS, 8, (0.5, 0.1), all_views(tuple(wrong)))
        validate.leave_out_scales(None)
        scales = tuple(dict.fromkeys(scale for _, scale in validate.views))
        assert validate.views == all_views(scales)
        torch.testing.assert_close(validate.features(None), torch.full((400, 3), sum(scales) / len(scales)))
        return scales

    return choose


def test_scales_that_clearly_cost_accuracy_are_left_out(chosen, capsys):
    assert chosen({0.875: 20, 1.0: 0, 1.125: 20}) == (1.0,)  # mean per-class accuracy 0.867 and 1
    assert "scale 1 alone: in validation its mean per-class accuracy is 0.133 above" in capsys.readouterr().out
    assert chosen({0.8: 20, 1.1: 0, 1.3: 20}) == (1.1,)  # the nearest to 1


def test_scales_stay_where_the_difference_may_be_chance(chosen):
    assert chosen({0.875: 1, 1.0: 0, 1.125: 1}) == SCALES  # one chip of each class: within two standard errors
    assert chosen({0.875: 0, 1.0: 20, 1.125: 0}) == SCALES
    assert chosen({0.875: 0, 1.0: 0, 1.125: 0}) == SCALES


def test_the_views_that_are_compared_are_those_of_all_scales():
    """On a real network: the mean over the scales' logits is the prediction over all views."""
    torch.manual_seed(0)
    model = Classifier("test_resnet", 2, 32).eval()
    store = ChipStore(np.random.default_rng(0).integers(0, 255, (6, 32, 32), np.uint8), torch.device("cpu"))
    apart = [predict(model, store, 32, (0.5, 0.2), all_views((scale,)))[0] for scale in SCALES]
    together = predict(model, store, 32, (0.5, 0.2), all_views(SCALES))[0]
    torch.testing.assert_close(sum(apart) / 3, together, atol=1e-5, rtol=1e-5)


def test_pairs_that_validate_after_they_trained_an_earlier_stage_are_counted(capsys):
    pairs = Pairs(list("abcd"), ["SAR/bus/a.png", "SAR/bus/b.png", "SAR/van/a.png", "SAR/van/d.png"],
                  np.array([0, 0, 1, 1]), ("bus", "van"), (7, 3))  # fmt: skip

    def unseen(held_out, *before, apart=None):
        held_out, nothing = np.array(held_out, int), np.array([], int)
        train = TrainingPairs(nothing, nothing, nothing, held_out, held_out if apart is None else np.array(apart))
        return unseen_pairs(pairs, train, *({"held_out": names} for names in before), *["best.pt"][: len(before)])

    first = unseen([0, 2])
    assert len(set(first)) == 2 and unseen([0, 2], first) == first
    assert unseen([], first) == []  # val/ validates
    assert len(unseen([1], None)) == 1  # an older checkpoint
    # A pair that this stage alone can read, as the stage before had it apart as well.
    assert unseen([0, 2], unseen([0], apart=[0, 2])) == first
    assert not capsys.readouterr().out
    assert unseen([0, 1, 3], first) == unseen([0])
    assert "2 of 3 pairs that validate were training pairs of best.pt" in capsys.readouterr().out
