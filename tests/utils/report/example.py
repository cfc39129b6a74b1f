"""A made-up prediction for the tests of the report."""

from data.labelled import Labelled
from utils.report.prediction import Prediction

import numpy as np

CLASSES = ("car", "bus", "van", "ship")


def make_prediction(count=30, classes=CLASSES, ood="some", truth=True, groups=8, **fields):
    """Random prediction that is correct for most chips and wrong for the first one.

    Args:
        count: number of chips; with more than 30, the map of features takes t-SNE, which is slow.
        ood: which chips are out of distribution: "some" (about a quarter), "none" or "all".
        truth: False for a prediction without a reference.
        groups: number of clusters, which are the groups.
        fields: of Prediction, instead of the random ones.
    """
    random = np.random.default_rng(0)
    labels = random.integers(len(classes), size=count)
    is_ood = random.random(count) < {"none": 0, "some": 0.25, "all": 1}[ood]
    is_ood[0] = ood == "all"
    logits = random.normal(size=(count, len(classes))) + 1.5 * np.eye(len(classes))[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    before_vote = probabilities.argmax(1)
    after_vote = np.where(random.random(count) < 0.2, labels, before_vote)
    after_vote[0] = (labels[0] + 1) % len(classes)
    confidence = random.normal(size=count) - is_ood
    chips = random.integers(256, size=(count, 16, 16)).astype(np.uint8)
    made = {
        "classes": list(classes),
        "settings": {"SEED": 0, "DATA_ROOT": "data/<a & b>"},
        "steps": {
            "one view": (before_vote, random.normal(size=count)),
            "+ vote": (after_vote, confidence),
        },
        "probabilities": probabilities,
        "clusters": np.arange(count) % groups,
        "groups": np.arange(count) % groups,
        "features": random.normal(size=(count, 6)),
        "chips": chips.__getitem__,
        "seconds": 0.002,
        "counts": list(range(1, len(classes) + 1)),
        "nearest": np.argsort(-logits, 1),
        "truth": Labelled([], np.where(is_ood, -1, labels), is_ood) if truth else None,
    }
    return Prediction(**made | fields)
