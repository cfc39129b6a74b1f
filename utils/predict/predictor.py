"""Prediction from Python: `Predictor.load("runs/finetune/best.pt")(image)`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.decode import EIGHT_BITS, decode, grey_levels
from data.errors import DataError
from data.labelled import find_chips
from data.store import ChipStore
from utils.predict.members import choose_score, load_members, set_views
from utils.predict.pipeline import PipelineSettings, run_pipeline
from utils.run.device import choose_device

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Predictions:
    """Predictions of N chips; one chip gives N = 1.

    labels: N class names.
    probabilities: float32 [N, C], in the order of `classes`.
    confidence: [N], higher = more in distribution.
    classes: C class names.
    names: N paths as given; positions "0", "1", ... for images from memory.
    """

    labels: list
    probabilities: np.ndarray
    confidence: np.ndarray
    classes: tuple
    names: list

    def __len__(self):
        return len(self.labels)


class Predictor:
    """Predicts SAR chips, each by itself, as results.py does with CLUSTER_BY=none.

    Chip side, grey range, grey levels, views and OOD scores come from the checkpoint. Make one with `load`.
    """

    def __init__(self, members, device, batch_size, ood_score):
        self.members, self.device, self.batch_size = members, device, batch_size
        self.settings = PipelineSettings(
            choose_score(ood_score, members), cluster_by="none", cluster_score="none"
        )

    @classmethod
    def load(cls, checkpoints, device="auto", batch_size=256, ood_score="", tta=True):
        """A Predictor of one checkpoint, or of an ensemble.

        Args:
            checkpoints: path of a checkpoint, list of paths, or paths in a string with commas.
            device: "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1".
            batch_size: inputs in one forward pass.
            ood_score: name in `utils.predict.ood.SCORES`; "" = "gaussian_energy" if all checkpoints
                hold its fit, else "energy".
            tta: False predicts from each chip as it is, which is faster by the number of views.

        Raises:
            CheckpointError, SettingError: what is wrong, and what to do.
        """
        device = choose_device(device)
        return cls(set_views(load_members(checkpoints, device), tta=tta), device, batch_size, ood_score)

    def __call__(self, images):
        """`Predictions` of images.

        Args:
            images: an image: a path, a PIL image, or a uint8 array of grey levels [H, W] or colours
                [H, W, 3]; or several images: a list of these, a folder, or an array [N, H, W] or
                [N, H, W, 3]. An array with three axes, the last of 3 entries, is one colour image; three equal
                planes [3, H, W], a grey chip with channels first, and [H, W, 1], [H, W, 2] and [H, W, 4] are refused.
                If the checkpoint was trained on files with more than 8 bits, an array of grey levels may
                have any real type; it is read through the checkpoint's GREY_RANGE, as files are.

        Raises:
            DataError: no images, or some that cannot be read.
        """
        images, names = _listed(images)
        stores = {}
        for reading in {member.reading for member in self.members}:
            chips = np.stack([_chip(*image, *reading) for image in zip(images, names, strict=True)])
            stores[reading] = ChipStore(chips, self.device)
        outputs = [member.output(stores, self.batch_size) for member in self.members]
        result = run_pipeline(outputs, names, self.settings)
        classes = tuple(self.members[0].checkpoint["classes"])
        labels = [classes[label] for label in result.labels]
        return Predictions(labels, result.probabilities, result.confidence, classes, names)


def _listed(images):
    """N images (paths, PIL images or arrays), and their N names."""
    if isinstance(images, (str, os.PathLike)):
        images = find_chips(images) if Path(images).is_dir() else [images]
    elif isinstance(images, Image.Image):
        images = [images]
    elif isinstance(images, np.ndarray):
        is_colour = images.ndim > 2 and images.shape[-1] == 3
        if images.ndim == 3 and len(images) == 3 and not is_colour and (images == images[0]).all():
            raise DataError(
                f"the array {list(images.shape)} looks like one chip with channels first, for its three planes are "
                "equal; give one of them, [H, W], or three equal chips as a list"
            )
        if images.ndim == 3 and images.shape[-1] in (1, 2, 4):
            raise DataError(
                f"the array {list(images.shape)} looks like one chip with channels last; give uint8 [H, W] or [H, W, 3]"
            )
        images = images if images.ndim == 3 + is_colour else images[None]
    images = list(images) if isinstance(images, Iterable) else [images]
    if not images:
        raise DataError("there are no images to predict")
    for i, image in enumerate(images):
        if not isinstance(image, (str, os.PathLike, Image.Image, np.ndarray)):
            kind = type(image).__name__
            raise DataError(f"image {i} is of the type {kind}; give a path, a PIL image or a NumPy array")
    are_paths = [isinstance(image, (str, os.PathLike)) for image in images]
    names = [str(images[i]) if is_path else str(i) for i, is_path in enumerate(are_paths)]
    return images, names


def _chip(image, name, side, grey_range):
    """uint8 [side, side] grey levels of an image."""
    if isinstance(image, np.ndarray):
        is_grey = image.ndim == 2 and (image.dtype == np.uint8 or grey_range != EIGHT_BITS)
        is_colour = image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8
        if not is_grey and not is_colour:
            raise DataError(
                f"image {name} is an array {image.dtype} {list(image.shape)}; give uint8 [H, W] or [H, W, 3]"
            )
        image = Image.fromarray(image) if is_colour else image
    is_wide = isinstance(image, Image.Image) and image.mode.startswith(("I", "F"))
    if is_wide and grey_range == EIGHT_BITS:
        raise DataError(
            f"image {name} has more than 8 bits (mode {image.mode}), the checkpoint's chips have 8; give an image of 8"
        )
    read = decode if isinstance(image, (str, os.PathLike)) else grey_levels
    try:
        return read(image, side, grey_range)
    except DataError as error:
        raise DataError(f"image {name} cannot be read ({error})") from error
