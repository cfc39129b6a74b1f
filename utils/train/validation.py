"""Validation after each epoch: on labelled chips of the stage's sensor if the data set has them, else on pairs."""

from pathlib import Path

from data.errors import DataError
from data.labelled import find_validation
from data.split import few_of_each
from data.store import open_store, place_stores, unreadable
from utils.predict.tta import IDENTITY, all_views, predict, scales_of
from utils.report.metrics import class_mean_accuracy

import numpy as np
import torch


class Validation:
    """Scores a model on labelled chips.

    Args:
        store: ChipStore of N chips; labels: int64 [N] array.
        image_size, grey, views: of `utils.predict.tta.predict`; more views than one are for a frozen backbone, of
            which they are computed once.

    Raises:
        DataError: there are no chips.
    """

    def __init__(self, store, labels, image_size, grey, views=IDENTITY):
        if not len(labels):
            raise DataError("no class has two chips, so none is left to validate on; add chips")
        self.store, self.labels, self.image_size, self.grey = store, labels, image_size, grey
        self.views, self.frozen_features = views, None

    def features(self, model):
        """Features [N, D] of a frozen model, averaged over the views, on the device."""
        if self.frozen_features is None:
            inputs = self.store, self.image_size, self.grey, self.views
            self.frozen_features = predict(model, *inputs, progress="validation")[1]
        return self.frozen_features

    def leave_out_scales(self, model):
        """Leave all scales but the one nearest to 1 out of the views, if that is clearly better for a frozen model.

        Clearly: by more than two standard errors in mean per-class accuracy. Several scales show the network more, but
        resizing also removes detail that it goes by, such as speckle; which weighs more depends on the chips.
        """
        scales = scales_of(self.views)
        if len(scales) == 1:
            return
        inputs, labels = (self.store, self.image_size, self.grey), self.labels
        of_scale = {
            scale: predict(model, *inputs, all_views((scale,)), progress=f"scale {scale:g}") for scale in scales
        }
        logits, self.frozen_features = (sum(parts) / len(scales) for parts in zip(*of_scale.values(), strict=True))
        nearest = min(scales, key=lambda scale: abs(scale - 1))
        all_right, nearest_right = (x.argmax(1).cpu().numpy() == labels for x in (logits, of_scale[nearest][0]))
        weights = 1 / np.bincount(labels)[labels]  # the classes count equally
        gains = (nearest_right.astype(float) - all_right) * weights / weights.mean()
        if gains.mean() > 2 * gains.std() / len(gains) ** 0.5:
            print(
                f"the views have the scale {nearest:g} alone: in validation its mean per-class accuracy is "
                f"{gains.mean():.3f} above that of all {len(scales)} scales"
            )
            self.views, self.frozen_features = all_views((nearest,)), of_scale[nearest][1]

    def sample(self, model, most):
        """{"features": float16 [M, D], "labels": int64 [M]} of at most `most` chips of each class, frozen model."""
        chips = few_of_each(self.labels, most)
        return {"features": self.features(model)[chips].half().cpu(), "labels": torch.from_numpy(self.labels[chips])}

    def __call__(self, model):
        """{"accuracy", "mean per-class accuracy"} of a model in eval mode."""
        if model.frozen:
            with torch.no_grad():
                logits = model.head(self.features(model))
        else:
            logits = predict(model, self.store, self.image_size, self.grey, self.views)[0]
        predicted = logits.argmax(1).cpu().numpy()
        return {
            "accuracy": float((predicted == self.labels).mean()),
            "mean per-class accuracy": class_mean_accuracy(predicted, self.labels),
        }


def unseen_pairs(pairs, train, source=None, path=""):
    """Names, "class/stem", of the pairs that no stage so far trains on; prints how many others are to validate on.

    Args:
        pairs: `data.layouts.Pairs`; train: `data.split.TrainingPairs` of them.
        source: checkpoint of the stage before, whose "held_out" are its names (None in an older one); path: its file.
    """

    def names(indices):
        return {f"{pairs.classes[pairs.labels[i]]}/{Path(pairs.sar[i]).stem}" for i in indices}

    apart, before = names(train.apart), source and source["held_out"]
    unseen = apart if before is None else apart.intersection(before)
    if seen := len(names(train.held_out) - unseen):
        print(
            f"{seen} of {len(train.held_out)} pairs that validate were training pairs of {path} or of a stage before "
            "it, so the scores are too good: the pairs, their entities (ENTITIES) or val/ are others now"
        )
    return sorted(unseen)


def labelled_chips(root, pairs, reading, budget, store_dir, skip_bad):
    """The labelled SAR chips of a data set whose class is known, to validate on.

    Args:
        root: folder of the data set.
        pairs: `data.layouts.Pairs` of the same classes.
        reading: (side, grey range) of `data.store.open_store`.
        budget: `data.store.MemoryBudget` of the device where the chips are needed.
        store_dir, skip_bad: of `data.store.open_store`.

    Returns:
        (ChipStore, labels), or None if the data set has no such chips.
    """
    labelled = find_validation(root, pairs.classes, pairs.class_ids)
    if labelled is None or labelled.ood.all():
        return None
    chips = open_store(labelled.paths, store_dir, skip_bad, *reading)
    (store,) = place_stores(budget, chips)
    known = np.setdiff1d(np.flatnonzero(~labelled.ood), unreadable(chips))
    return store.subset(known), labelled.labels[known]
