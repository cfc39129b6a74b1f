"""What a run is made from, by content: data, checkpoint of the stage before, initial weights, source code.

A run that is started again is the same run only if all of these are the same. Paths do not count.
"""

import ast
import hashlib
from pathlib import Path

from data.store import store_digest

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data", "models", "utils")
WORDS = {"", "timm", "teacher"}  # values of WEIGHTS and INIT that are no files

# How each entry of `made_from` is named to the user.
NAMES = {
    "data": "the data (pixels, labels or class names)",
    "entities": "which pairs show the same entity (ENTITIES, or the EO chips)",
    "checkpoint": "the checkpoint of the stage before",
    "weights": "the initial weights (WEIGHTS or INIT)",
    "code": "the source code",
}


def made_from(script, pairs, chips, entities, labelled=None, weights="", source=None, further=()):
    """Digests of what a run is made from.

    Args:
        script: file of the script.
        pairs: `data.layouts.Pairs` that it trains on; chips: their stores, of `data.store.open_store`.
        entities: [N] ids of the pairs, of `data.entities.find_entities`.
        labelled: (ChipStore, labels) of the labelled chips that choose the best epoch; None without.
        weights: value of WEIGHTS or INIT.
        source: checkpoint of the stage before, or None.
        further: labels of chips that are no pairs, int64 array.

    Returns:
        {name: hex string, or word of `WORDS`}, names as in `NAMES`.
    """
    data = [pairs.labels.tobytes(), repr(pairs.classes), *map(store_digest, chips)]
    if labelled:
        store, labels = labelled
        data += [store_digest(store), labels.tobytes(), store.indices.tobytes()]
    if len(further):
        data.append(further.tobytes())
    digests = {"data": digest(*data), "entities": digest(entities), "code": source_digest(script)}
    digests["weights"] = weights if weights in WORDS else digest(Path(weights).read_bytes())
    if source is not None:
        digests["checkpoint"] = checkpoint_digest(source)
    return digests


def checkpoint_digest(checkpoint):
    """Digest of what a later stage takes from a checkpoint: weights, classes, and how a chip becomes an input."""
    parts = [repr([checkpoint[key] for key in ("backbone", "image_size", "classes", "grey", "val_fraction", "scales")])]
    for name, value in checkpoint["model"].items():
        parts += [f"{name}{value.dtype}{tuple(value.shape)}", value.contiguous().view(-1).view(torch.uint8).numpy()]
    return digest(*parts)


def source_digest(script):
    """Digest of a script and of all files of this project that it imports; comments and constants do not count."""
    todo, parts = [Path(script).resolve()], {}
    while todo:
        path = todo.pop()
        if path in parts or not path.is_file():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        todo += _imported(tree)
        parts[path] = _code(tree, is_script=path.parent == ROOT)
    return digest(*(parts[path] for path in sorted(parts)))


def digest(*parts):
    """Hex digest of strings, bytes and byte arrays."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = memoryview(part.encode() if isinstance(part, str) else part)
        result.update(content.nbytes.to_bytes(8, "little"))
        result.update(content)
    return result.hexdigest()


def _imported(tree):
    """Files of this project that a module imports at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = [ROOT.joinpath(*name.split(".")) for name in names if name.partition(".")[0] in PACKAGES]
    return [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]


def _code(tree, is_script):
    """The code of a module without comments, docstrings and, in a script, the constants."""
    if is_script:  # constants are compared as settings
        tree.body = [node for node in tree.body if not isinstance(node, ast.Assign)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)
