from models.backbone import Classifier
from utils.predict.ood import fit_scores
from utils.predict.tta import tta_views
from utils.run.checkpoint import save_checkpoint

import numpy as np
import pytest
import torch

CLASSES = ("sedan", "SUV", "van")


@pytest.fixture
def make_checkpoint(tmp_path):
    """A function that writes a checkpoint of an untrained network and returns its path.

    name: of the file; entries: other entries of the checkpoint.
    """

    def make(name="best.pt", seed=0, **entries):
        torch.manual_seed(seed)
        checkpoint = {
            "stage": "finetune", "sensor": "SAR", "settings": {}, "backbone": "test_resnet", "image_size": 40,
            "chip_side": 32, "classes": CLASSES, "class_ids": (0, 1, 3), "counts": (30, 20, 10),
            "scales": (1.0,), "views": tta_views((0, 90), (1.0, 1.25)), "grey_range": (0.0, 255.0), "grey": (0.4, 0.15),
            "data_root": "nowhere", "entities": "", "labelled_share": 1.0, "val_fraction": 0.1,
        } | entries  # fmt: skip
        model = Classifier(checkpoint["backbone"], len(checkpoint["classes"]), checkpoint["image_size"])
        random, labels = np.random.default_rng(seed), np.repeat([0, 1, 2], [30, 20, 10])
        features = random.normal(size=(60, model.width)).astype(np.float32) + labels[:, None]
        fitted = fit_scores(features, labels, np.array(checkpoint["counts"]))
        save_checkpoint(tmp_path / name, {"ood": fitted, "validation": {}, "model": model.state_dict()} | checkpoint)
        return tmp_path / name

    return make


@pytest.fixture
def chips():
    """Five chips, uint8 [5, 32, 32]."""
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32), np.uint8)
