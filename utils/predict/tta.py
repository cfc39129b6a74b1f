"""Prediction averaged over views of the chips (test-time augmentation)."""

from data.augment import to_input, turn
from data.store import to_device
from utils.run.ranks import gather_over_ranks, rank, share_of_rank
from utils.run.settings import SettingError

import torch
from tqdm import tqdm

IDENTITY = ((0, 1.0),)  # one view: the chip as it is


def tta_views(rotations, scales):
    """The views {identity, horizontal flip} x rotations x scales, each once.

    Args:
        rotations: degrees counter-clockwise, multiples of 90.
        scales: factors of the network's input size.

    Returns:
        tuple of (view 0..7 as in `data.augment.turn`, scale).

    Raises:
        SettingError: no rotations or no scales, an angle that is no multiple of 90, a scale that is not
            above 0 and finite.
    """
    if not rotations or not scales:
        raise SettingError("ROTATIONS and SCALES need at least one entry each, such as 0 and 1.0")
    if not all(angle % 90 == 0 for angle in rotations):
        raise SettingError(f"ROTATIONS is one or more multiples of 90 degrees, not {rotations}")
    if not all(0 < scale <= 1e9 for scale in scales):
        raise SettingError(f"SCALES is one number or more, each above 0, 1e9 at most, not {scales}")
    turns = sorted({int(angle // 90) % 4 for angle in rotations})
    return tuple((flip + k, s) for s in dict.fromkeys(scales) for flip in (0, 4) for k in turns)


def all_views(scales):
    """All flips and quarter turns at these scales, as `tta_views` gives them."""
    return tta_views((0, 90, 180, 270), scales)


def scales_of(views):
    """The scales of views, each once, in their order."""
    return tuple(dict.fromkeys(scale for _, scale in views))


def replace_views(views, rotations=(), scales=()):
    """`views` with other rotations or other scales.

    Args:
        views: tuple of (view, scale).
        rotations, scales: of `tta_views`, as numbers or as text; an empty one stays as in `views`.

    Raises:
        SettingError: of `tta_views`, or an entry is no number.
    """
    scales = _numbers("SCALES", scales) or scales_of(views)
    if not rotations:
        turns = dict.fromkeys(view for view, _ in views)
        tta_views((0,), scales)  # checks the scales
        return tuple((view, scale) for scale in dict.fromkeys(scales) for view in turns)
    return tta_views(_numbers("ROTATIONS", rotations), scales)


def _numbers(name, entries):
    try:
        return tuple(map(float, entries))
    except ValueError as error:
        raise SettingError(f"{name} is one number or more, not {entries}") from error


def scaled(size, scale):
    """Side of the network's input at a scale, px."""
    return max(1, round(size * scale))


@torch.no_grad()
def predict(model, store, image_size, grey, views=IDENTITY, batch_size=256, progress=""):
    """Logits and features of all chips, averaged over views.

    The views of one scale go through the network together. If a batch does not fit the device's
    memory, it and all later ones are halved. Ranks share the chips, and each returns all results.

    Args:
        model: Classifier on the device of the store; set its eval mode before.
        store: ChipStore of N chips.
        image_size: side of the input at scale 1, px.
        grey: (mean, std) of the sensor's grey level, 0..1.
        views: tuple of (view 0..7, scale), as of `tta_views`.
        batch_size: inputs in one forward pass.
        progress: name of the progress bar; "" = no bar.

    Returns:
        logits [N, C], features [N, D], float32 on the device.
    """
    device, count = store.device, len(store)
    store = store.subset(share_of_rank(count))
    by_scale = {scale: [view for view, other in views if other == scale] for _, scale in views}
    by_scale = {scale: torch.tensor(turns, device=device) for scale, turns in by_scale.items()}
    size = max(1, batch_size // max(map(len, by_scale.values())))
    logits, features, start, hidden = [], [], 0, not progress or rank() > 0 or None
    with tqdm(total=len(store) * len(views), desc=progress, unit=" views", disable=hidden) as bar:
        while start < len(store):
            chips = store[start : start + size]
            try:
                sums = [
                    _forward(model, chips, turns, scaled(image_size, scale), grey)
                    for scale, turns in by_scale.items()
                ]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            for batches, of_scales in zip((logits, features), zip(*sums, strict=True), strict=True):
                batches.append(sum(of_scales) / len(views))
            start += len(chips)
            bar.update(len(chips) * len(views))
    return tuple(gather_over_ranks(torch.cat(batches), count) for batches in (logits, features))


def _forward(model, chips, turns, size, grey):
    """Logits [B, C] and features [B, D] of chips [B, S, S], each summed over the views `turns`."""
    views = turns.repeat_interleave(len(chips))
    features = _features(model, chips.repeat(len(turns), 1, 1), views, size, grey)
    logits = model.head(features)
    return tuple(x.float().unflatten(0, (len(turns), -1)).sum(0) for x in (logits, features))


@torch.no_grad()
def view_features(model, store, size, grey, indices, views):
    """Features [B, D] of the chips `indices` in their `views` 0..7, int64 [B] arrays, at `size` px."""
    views = to_device(torch.from_numpy(views), store.device)
    return _features(model, store[indices], views, size, grey)


def _features(model, chips, views, size, grey):
    """Features [B, D] of chips, uint8 [B, S, S], each in its view 0..7, int64 [B], at `size` px."""
    images = to_input(turn(chips, views), size, *grey)
    with autocast(chips.device):
        return model.features(images.to(memory_format=torch.channels_last))


def autocast(device):
    """Autocast to bf16 on CUDA; elsewhere none, because float32 is as fast there."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
