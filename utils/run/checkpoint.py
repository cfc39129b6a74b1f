"""Checkpoints: plain dictionaries that torch.load reads with weights_only=True."""

import io
import math
import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

from data.errors import named, reason
from models.backbone import Classifier
from utils.run.files import atomic_file
from utils.run.settings import CheckpointError

import torch

FORMAT = 3  # 2 lacks entities, labelled_share and validation, 1 chip_side, grey_range, views and ood as well


def _is_text(x):
    return type(x) is str


def _is_count(x):
    return type(x) is int and x >= 0


def _is_positive(x):
    return type(x) in (int, float) and 0 < x < math.inf


def _is_range(x):
    """Two finite numbers, the first below the second."""
    are_numbers = type(x) in (tuple, list) and len(x) == 2 and {type(v) for v in x} <= {int, float}
    return are_numbers and -math.inf < x[0] < x[1] < math.inf


def _each(fits):
    return lambda x: type(x) in (tuple, list) and len(x) > 0 and all(map(fits, x))


def _are_tensors(x):
    """A dictionary of plain tensors by name."""
    return isinstance(x, dict) and all(_is_text(name) and _is_plain(value) for name, value in x.items())


def _is_plain(x):
    return torch.is_tensor(x) and x.layout == torch.strided and x.is_cpu and not x.is_quantized


def _is_view(x):
    return type(x) in (tuple, list) and len(x) == 2 and _is_count(x[0]) and x[0] < 8 and _is_positive(x[1])


def _is_reading(x):
    """Side and grey range of EO chips, or nothing."""
    return type(x) in (tuple, list) and (len(x) == 0 or len(x) == 2 and _is_count(x[0]) and _is_range(x[1]))


def _is_validation(x):
    if not _are_tensors(x) or x.keys() not in (set(), {"features", "labels"}, {"features", "labels", "counts"}):
        return False
    return "counts" not in x or bool((x["counts"] >= 0).all())


# What rebuilds the classifier and predicts with it, and whether a value is valid.
KEYS = {
    "format": _is_count,
    "stage": _is_text,
    "sensor": _is_text,
    "settings": lambda x: isinstance(x, dict),
    "backbone": _is_text,
    "image_size": _is_count,
    "chip_side": _is_count,
    "grey_range": _is_range,
    "classes": lambda x: _each(_is_text)(x) and len(set(x)) == len(x),
    "class_ids": _each(_is_count),
    "counts": _each(_is_count),
    "scales": _each(_is_positive),
    "views": _each(_is_view),
    "grey": lambda x: _each(_is_positive)(x) and len(x) == 2,
    "data_root": _is_text,
    "entities": _is_text,
    "eo_reading": _is_reading,
    "labelled_share": lambda x: type(x) in (int, float) and 0 <= x <= 1,
    "held_out": lambda x: x is None or type(x) is list and all(map(_is_text, x)),
    "val_fraction": lambda x: _is_positive(x) and x < 1,
    "model": _are_tensors,
    "ood": lambda x: isinstance(x, dict) and all(_is_text(k) and _are_tensors(v) for k, v in x.items()),
    "validation": _is_validation,
}
# What a run needs to go on.
RUN_KEYS = {
    "learner": lambda x: isinstance(x, dict),
    "history": lambda x: type(x) is list,
    "best": lambda x: type(x) in (int, float),
    "step": _is_count,
    "steps": _is_count,
    "batch": _is_count,
    "saved_at": _is_positive,
}


def save_checkpoint(path, checkpoint, keep_previous=False):
    """Write a checkpoint to a temporary file, which takes the name `path` when it is complete.

    keep_previous: rename an earlier file to NAME.previous.pt instead of replacing it.
    """
    buffer = io.BytesIO()
    torch.save({**checkpoint, "format": FORMAT}, buffer)  # torch's own file writer hides that a disk is full
    previous = Path(path).with_suffix(".previous.pt") if keep_previous else None
    with atomic_file(path, "wb", previous=previous) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path, script, sensor=None, stages=("pretrain", "sar_feature", "finetune"), with_run=False):
    """Read the checkpoint of an earlier stage; no code in it is executed.

    Args:
        path: file written by save_checkpoint.
        script: the script that makes it, named if the file is missing.
        sensor: "EO" or "SAR" if it must be one of them.
        stages: the stages that are accepted.
        with_run: True also returns what a run needs to go on ("run"), which a later stage does not.

    Raises:
        CheckpointError: the file is missing, damaged, of another stage, sensor or version, or its
            entries are not those of a checkpoint.
    """
    if not os.path.exists(path):
        raise CheckpointError(f"there is no checkpoint {path}; run first: python {script}")
    checkpoint = _read(path, script)
    if not isinstance(checkpoint, dict) or not _is_count(checkpoint.get("format")):
        raise CheckpointError(f"{path} is not a checkpoint of this project; make one: python {script}")
    if checkpoint["format"] != FORMAT:
        newer = checkpoint["format"] > FORMAT
        advice = "update this project" if newer else f"make it anew: python {script}"
        raise CheckpointError(f"{path} was written by {'a newer' if newer else 'an older'} version; {advice}")
    checkpoint = {"eo_reading": (), "held_out": None} | checkpoint  # older checkpoints have neither
    wrong = _wrong_keys(checkpoint, KEYS)
    if with_run and not wrong:
        wrong = _wrong_keys(checkpoint["run"], RUN_KEYS) if isinstance(checkpoint.get("run"), dict) else ["run"]
    if not wrong:
        of_classes = {key: checkpoint[key] for key in ("class_ids", "counts")}
        of_classes["validation"] = checkpoint["validation"].get("counts", checkpoint["classes"])
        wrong = [key for key, values in of_classes.items() if len(values) != len(checkpoint["classes"])]
    if wrong:
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: {named(wrong)} missing or wrong; "
            f"make one: python {script}"
        )
    if not _are_finite(checkpoint["model"]):
        raise CheckpointError(
            f"the weights in {path} are not finite, so its training failed; run again with "
            f"a lower LEARNING_RATE: python {checkpoint['stage']}.py"
        )
    if checkpoint["stage"] not in stages or sensor not in (None, checkpoint["sensor"]):
        raise CheckpointError(
            f"{path} is the {checkpoint['sensor']} checkpoint of {checkpoint['stage']}.py; "
            f"needed is one of {script}"
        )
    if not with_run:
        checkpoint.pop("run", None)
    return checkpoint


def _read(path, script):
    """The content of a checkpoint file, whose parts carry CRC-32 checksums."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not check them
            damaged = archive.testzip()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        # torch would go on to say how to run the code in the file.
        code = "damaged, or with code in it, which is not run"
        why = code if isinstance(error, (UnpicklingError, zipfile.BadZipFile)) else reason(error)
        raise CheckpointError(
            f"{path} is no readable checkpoint ({why}); make it anew: python {script}"
        ) from error
    if damaged:
        raise CheckpointError(f"{path} is damaged: a checksum is wrong; make it anew: python {script}")
    return checkpoint


def choose_data_root(data_root, checkpoint, path):
    """The data set's folder: DATA_ROOT, or if that is empty the one in the checkpoint.

    Raises:
        CheckpointError: the checkpoint's folder is not there.
    """
    root = data_root or checkpoint["data_root"]
    if not data_root and not os.path.isdir(root):
        raise CheckpointError(
            f"the data set's folder in the checkpoint {path}, DATA_ROOT {root}, is not a folder here "
            f"({os.path.abspath(root)}); set DATA_ROOT to where the data set lies now"
        )
    return root


def choose_entities(entities, checkpoint, path):
    """The CSV of entities: ENTITIES, or if that is empty the one in the checkpoint; "" if neither names one.

    Raises:
        CheckpointError: the checkpoint's file is not there.
    """
    listed = entities or checkpoint["entities"]
    if listed and not entities and not os.path.isfile(listed):
        raise CheckpointError(
            f"the list of entities in the checkpoint {path}, ENTITIES {listed}, is not a file here "
            f"({os.path.abspath(listed)}); set ENTITIES to where it lies now"
        )
    return listed


def build_model(checkpoint, path="the checkpoint"):
    """The classifier of a checkpoint, with its weights, in eval mode.

    Args:
        checkpoint: of load_checkpoint; path: its file, named in errors.

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


def _are_finite(tensors):
    return all(value.isfinite().all() for value in tensors.values())


def _wrong_keys(values, keys):
    """Names of the entries that are missing or invalid."""
    return [key for key, is_valid in keys.items() if key not in values or not is_valid(values[key])]
