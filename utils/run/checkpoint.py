"""Checkpoints: plain dictionaries that torch.load reads with weights_only=True."""

import hashlib
import io
import math
import os
from pathlib import Path
from pickle import UnpicklingError

from data.errors import named, reason
from models.backbone import Classifier
from utils.run.files import whole_file
from utils.run.settings import CheckpointError

import torch

FORMAT = 1


def _text(x):
    return type(x) is str


def _whole(x):
    return type(x) is int and x >= 0


def _positive(x):
    return type(x) in (int, float) and 0 < x < math.inf


def _several(fits):
    return lambda x: type(x) in (tuple, list) and len(x) > 0 and all(map(fits, x))


def _tensors(x):
    """A dictionary of plain tensors by name."""
    return isinstance(x, dict) and all(_text(name) and _plain(value) for name, value in x.items())


def _plain(x):
    return torch.is_tensor(x) and x.layout == torch.strided and x.is_cpu and not x.is_quantized


# What rebuilds the classifier and says what it was made for, and whether a value is such.
KEYS = {
    "format": _whole,
    "stage": _text,
    "sensor": _text,
    "settings": lambda x: isinstance(x, dict),
    "backbone": _text,
    "image_size": _whole,
    "classes": lambda x: _several(_text)(x) and len(set(x)) == len(x),
    "class_ids": _several(_whole),
    "counts": _several(_whole),
    "scales": _several(_positive),
    "grey": lambda x: _several(_positive)(x) and len(x) == 2,
    "data_root": _text,
    "val_fraction": lambda x: _positive(x) and x < 1,
    "model": _tensors,
}
# And what a run needs to go on.
RUN = {
    "learner": lambda x: isinstance(x, dict),
    "history": lambda x: type(x) is list,
    "best": lambda x: type(x) in (int, float),
    "step": _whole,
    "steps": _whole,
    "batch": _whole,
}


def save_checkpoint(path, checkpoint, keep=False):
    """Write a checkpoint in one piece: to a temporary file first, which then takes its name.

    keep: leave the file that was there as NAME.previous.pt.
    """
    whole, written = {"format": FORMAT, **checkpoint}, io.BytesIO()
    whole.pop("checksum", None)  # of the checkpoint that this one is made from
    torch.save(whole | {"checksum": checksum(whole)}, written)  # which says less of a full disk than a file
    previous = Path(path).with_suffix(".previous.pt") if keep else None
    with whole_file(path, "wb", keep=previous) as file:
        file.write(written.getbuffer())


def load_checkpoint(path, script, sensor=None, stages=("pretrain", "sar_feature", "finetune"), whole=False):
    """Read the checkpoint of an earlier stage, its "checksum" with it; nothing in it is executed.

    Args:
        path: file written by save_checkpoint.
        script: the script that makes it, named where the file is missing.
        sensor: "EO" or "SAR" where only one will do.
        stages: the stages that will do.
        whole: with what a run needs to go on, which a later stage does not.

    Raises:
        CheckpointError: the file is missing, unreadable, of another stage, sensor or version, or
            what it holds is not what `save_checkpoint` was given.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"there is no checkpoint {path}; run first: python {script}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written = checkpoint.pop("checksum", None) if isinstance(checkpoint, dict) else None
        found = checksum(checkpoint)
    except Exception as error:  # a damaged file fails in many ways
        # torch would go on to say how to run what is in the file.
        code = "damaged, or with code in it, which is not run"
        why = code if isinstance(error, UnpicklingError) else reason(error)
        raise CheckpointError(
            f"{path} is no readable checkpoint ({why}); make it anew: python {script}"
        ) from error
    if not isinstance(checkpoint, dict) or not _whole(checkpoint.get("format")):
        raise CheckpointError(f"{path} is not a checkpoint of this project; make one: python {script}")
    if checkpoint["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by a newer version; update this project")
    if written not in (None, found):
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; make it anew: python {script}")
    wrong = _wrong(checkpoint, KEYS)
    wrong = wrong or [x for x in ("class_ids", "counts") if len(checkpoint[x]) != len(checkpoint["classes"])]
    if not wrong and not _fits(checkpoint.get("gaussians"), checkpoint["model"].get("head.weight")):
        wrong = ["gaussians"]
    if not wrong and whole:
        wrong = _wrong(checkpoint["run"], RUN) if isinstance(checkpoint.get("run"), dict) else ["run"]
    if wrong:
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: {named(wrong)} missing or wrong; "
            f"make one: python {script}"
        )
    if not _finite(checkpoint["model"]):
        raise CheckpointError(
            f"the weights in {path} are not finite, so its training came to nothing; run again with "
            f"a lower LEARNING_RATE: python {checkpoint['stage']}.py"
        )
    if checkpoint["stage"] not in stages or sensor not in (None, checkpoint["sensor"]):
        raise CheckpointError(
            f"{path} is the {checkpoint['sensor']} checkpoint of {checkpoint['stage']}.py; "
            f"needed is one of {script}"
        )
    if not whole:
        checkpoint.pop("run", None)
    return checkpoint | {"checksum": found}


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


def build_model(checkpoint, path="the checkpoint"):
    """The classifier of a checkpoint, with its weights, in eval mode.

    Args:
        checkpoint: of load_checkpoint; path: its file, named where something is wrong.

    Raises:
        CheckpointError: the weights are those of another network.
    """
    model = Classifier(checkpoint["backbone"], len(checkpoint["classes"]), checkpoint["image_size"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        wrong = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"the weights in {path} are not those of a {checkpoint['backbone']} with "
            f"{len(checkpoint['classes'])} classes ({wrong}); run again: python {checkpoint['stage']}.py"
        ) from error
    return model.eval()


def _wrong(found, keys):
    return [key for key, fits in keys.items() if key not in found or not fits(found[key])]


def _finite(tensors):
    return all(value.isfinite().all() for value in tensors.values())


def _fits(gaussians, head):
    """Whether the Gaussians of a checkpoint, if it has any, are those of the features of its head."""
    if gaussians is None or head is None or head.ndim != 2:
        return gaussians is None
    classes, width = head.shape
    shapes = {"mean": (classes, width), "precision": (width, width), "log_prior": (classes,), "log_det": ()}
    return (
        _tensors(gaussians)
        and {name: tuple(value.shape) for name, value in gaussians.items()} == shapes
        and all(value.dtype == torch.float64 for value in gaussians.values())
        and not torch.linalg.cholesky_ex(gaussians["precision"]).info
    )
