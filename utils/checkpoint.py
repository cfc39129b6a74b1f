"""Checkpoints: plain dictionaries that torch.load reads with weights_only=True."""

import hashlib
import os
from pathlib import Path

from models.backbone import Classifier
from utils.settings import CheckpointError

import torch

FORMAT = 1
# What rebuilds the classifier and says what it was made for.
KEYS = ("format", "stage", "sensor", "settings", "backbone", "image_size", "classes", "class_ids")
KEYS += ("scales", "grey", "data_root", "val_fraction", "model")


def save_checkpoint(path, checkpoint, keep=False):
    """Write a checkpoint in one piece: to a temporary file first, which then takes its name.

    keep: leave the file that was there as NAME.previous.pt.
    """
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            whole = {"format": FORMAT, **checkpoint}
            torch.save(whole | {"checksum": checksum(whole)}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, Path(path).with_suffix(".previous.pt"))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path, script, sensor=None, stages=("pretrain", "sar_feature", "finetune"), whole=False):
    """Read the checkpoint of an earlier stage; nothing in it is executed.

    Args:
        path: file written by save_checkpoint.
        script: the script that makes it, named where the file is missing.
        sensor: "EO" or "SAR" where only one will do.
        stages: the stages that will do.
        whole: with what a run needs to go on, which a later stage does not.

    Raises:
        CheckpointError: the file is missing, unreadable, of another stage, sensor or version.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"there is no checkpoint {path}; run first: python {script}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is no readable checkpoint ({reason}); make it anew: python {script}"
        ) from error
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in KEYS):
        raise CheckpointError(f"{path} is not a checkpoint of this project; make one: python {script}")
    if checkpoint["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by a newer version; update this project")
    if checkpoint["stage"] not in stages or sensor not in (None, checkpoint["sensor"]):
        raise CheckpointError(
            f"{path} is a {checkpoint['sensor']} checkpoint of {checkpoint['stage']}.py; "
            f"needed is one of {script}"
        )
    written = checkpoint.pop("checksum", None)
    if written is not None and written != checksum(checkpoint):
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; make it anew: python {script}")
    if not whole:
        checkpoint.pop("run", None)
    return checkpoint


def checksum(value):
    """A hash of all that a checkpoint holds, tensors by their bytes."""
    found = hashlib.blake2b(digest_size=16)

    def add(part):
        if torch.is_tensor(part):
            found.update(f"{part.dtype}{tuple(part.shape)}".encode())
            found.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            for key, inner in part.items():
                found.update(repr(key).encode())
                add(inner)
        elif isinstance(part, (list, tuple)):
            for inner in part:
                add(inner)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


def build_model(checkpoint):
    """The classifier of a checkpoint, with its weights, in eval mode."""
    model = Classifier(
        checkpoint["backbone"], len(checkpoint["classes"]), checkpoint["image_size"]
    )
    model.load_state_dict(checkpoint["model"])
    return model.eval()
