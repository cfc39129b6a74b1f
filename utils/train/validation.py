"""Validation after each epoch: on labelled chips of the stage's sensor if the data set has them, else on pairs."""

from data.errors import DataError
from data.layouts import find_validation
from data.store import open_store, place_stores, unreadable
from utils.predict.tta import predict
from utils.report.metrics import class_mean_accuracy

import numpy as np
import torch


class Validation:
    """Scores a model on labelled chips.

    Args:
        store: ChipStore of N chips; labels: int64 [N] array.
        image_size, grey: of the network's input, as in `utils.predict.tta.predict`.

    Raises:
        DataError: there are no chips.
    """

    def __init__(self, store, labels, image_size, grey):
        if not len(labels):
            raise DataError(
                "no class has chips of two entities, so none is left to validate on; add chips of other objects, or "
                "list in ENTITIES which chips show the same one"
            )
        self.store, self.labels, self.image_size, self.grey = store, labels, image_size, grey
        self.frozen_features = None

    def __call__(self, model):
        """{"accuracy", "mean per-class accuracy"} of a model in eval mode."""
        if self.frozen_features is None:
            logits, features = predict(model, self.store, self.image_size, self.grey)
            self.frozen_features = features if model.frozen else None  # the same in every epoch
        else:
            with torch.no_grad():
                logits = model.head(self.frozen_features)
        predicted = logits.argmax(1).cpu().numpy()
        return {
            "accuracy": float((predicted == self.labels).mean()),
            "mean per-class accuracy": class_mean_accuracy(predicted, self.labels),
        }


def labelled_chips(root, contents, budget, store_dir, skip_bad):
    """The labelled SAR chips of a data set whose class is known, to validate on.

    Args:
        root: folder of the data set.
        contents: of a SAR checkpoint; "classes", "class_ids", "chip_side" and "grey_range" say how they are read.
        budget: `data.store.MemoryBudget` of the device where the chips are needed.
        store_dir, skip_bad: of `data.store.open_store`.

    Returns:
        (ChipStore, labels), or None if the data set has no such chips.
    """
    labelled = find_validation(root, contents["classes"], contents["class_ids"])
    if labelled is None or labelled.ood.all():
        return None
    chips = open_store(labelled.paths, store_dir, skip_bad, contents["chip_side"], contents["grey_range"])
    (store,) = place_stores(budget, chips)
    known = np.setdiff1d(np.flatnonzero(~labelled.ood), unreadable(chips))
    return store.subset(known), labelled.labels[known]
