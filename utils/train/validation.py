"""How a stage validates: on labelled chips of its sensor where the data has them, else on pairs."""

from data.errors import DataError
from data.store import open_store, place_stores, unreadable
from utils.predict.tta import predict
from utils.report.metrics import class_mean_accuracy

import numpy as np
import torch


def validation(checkpoint, store, labels, held_out, labelled, store_dir, skip_bad=False):
    """A function that scores a model: {"accuracy", "mean per-class accuracy"}.

    Args:
        checkpoint: with image_size and grey, as saved.
        store: ChipStore of the training pairs' chips of the stage's sensor.
        labels: [N] of the pairs; held_out: indices of those that are not trained on.
        labelled: `data.layouts.Labelled` chips, whose known ones are used instead; or None.
        store_dir, skip_bad: of `data.store.open_store`.
    """
    if labelled is not None and not labelled.ood.all():
        chips = open_store(labelled.paths, store_dir, skip_bad)
        (store,) = place_stores(store.device, 0.0, chips)
        held_out = np.setdiff1d(np.flatnonzero(~labelled.ood), unreadable(chips))
        labels = labelled.labels
    store, truth = store.subset(held_out), labels[held_out]
    if not len(truth):
        raise DataError("no class has two chips, so none is left to validate on; add chips")
    frozen_features = []  # of a frozen backbone: the same in every epoch

    def validate(model):
        if frozen_features:
            with torch.no_grad():
                logits = model.head(frozen_features[0])
        else:
            logits, features = predict(model, store, checkpoint["image_size"], checkpoint["grey"])
            frozen_features.extend([features] if model.frozen else [])
        guess = logits.argmax(1).cpu().numpy()
        return {
            "accuracy": float((guess == truth).mean()),
            "mean per-class accuracy": class_mean_accuracy(guess, truth),
        }

    return validate
