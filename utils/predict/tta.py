"""Prediction over views of the test chips (test-time augmentation), one pass for all scripts."""

from data.augment import to_input, turn
from data.store import to_device
from utils.run.ranks import equal_share, gathered, rank
from utils.run.settings import SettingError

import torch
from tqdm import tqdm

IDENTITY = ((0, 1.0),)


def tta_views(rotations, scales):
    """{identity, horizontal flip} x rotations x scales, each once.

    Args:
        rotations: degrees counter-clockwise, multiples of 90.
        scales: factors of the network's input size.

    Returns:
        tuple of (view 0..7 as in `data.augment.turn`, scale).

    Raises:
        SettingError: none of either, an angle that is no multiple of 90, a scale <= 0.
    """
    if not rotations or not scales:
        raise SettingError("ROTATIONS and SCALES need at least one entry each, such as 0 and 1.0")
    if any(angle % 90 for angle in rotations):
        raise SettingError(f"ROTATIONS are multiples of 90 degrees, not {rotations}")
    if any(scale <= 0 for scale in scales):
        raise SettingError(f"SCALES are above 0, not {scales}")
    turns = sorted({int(angle // 90) % 4 for angle in rotations})
    return tuple((flip + k, s) for s in dict.fromkeys(scales) for flip in (0, 4) for k in turns)


def scaled(size, scale):
    """Side of the network's input at a scale, px."""
    return max(1, round(size * scale))


@torch.no_grad()
def predict(model, store, image_size, grey, views=IDENTITY, batch_size=256, progress=""):
    """Logits and features of all chips, averaged over views.

    The views of one scale go through the network together. Where the device's memory does not
    take a batch, this and all further ones are halved. Ranks share the chips and gather the answers.

    Args:
        model: Classifier, on the device of the store, as it is (set eval mode before).
        store: ChipStore of N chips.
        image_size: side of the input at scale 1, px.
        grey: (mean, std) of the sensor's grey level, 0..1.
        views: of tta_views.
        batch_size: inputs in one forward pass.
        progress: name for the progress bar; "" shows none.

    Returns:
        logits [N, C], features [N, D], float32 on the device.
    """
    device, count = store.device, len(store)
    store = store.subset(equal_share(count))
    by_scale = {scale: [view for view, other in views if other == scale] for _, scale in views}
    by_scale = {scale: torch.tensor(turns, device=device) for scale, turns in by_scale.items()}
    size = max(1, batch_size // max(map(len, by_scale.values())))
    logits, features, start, hidden = [], [], 0, not progress or rank() > 0
    with tqdm(total=len(store) * len(views), desc=progress, unit=" views", disable=hidden) as bar:
        while start < len(store):
            chips = store[start : start + size]
            try:
                found = [
                    _forward(model, chips, turns, scaled(image_size, scale), grey)
                    for scale, turns in by_scale.items()
                ]
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                continue
            for kept, parts in zip((logits, features), zip(*found, strict=True), strict=True):
                kept.append(sum(parts) / len(views))
            start += len(chips)
            bar.update(len(chips) * len(views))
    return tuple(gathered(torch.cat(parts), count) for parts in (logits, features))


def _forward(model, chips, turns, size, grey):
    """Logits [B, C] and features [B, D] of chips [B, S, S], each summed over the views `turns`."""
    views = turns.repeat_interleave(len(chips))
    features = _features(model, chips.repeat(len(turns), 1, 1), views, size, grey)
    with autocast(chips.device):
        logits = model.head(features)
    return tuple(x.float().unflatten(0, (len(turns), -1)).sum(0) for x in (logits, features))


@torch.no_grad()
def view_features(model, store, size, grey, chosen, views):
    """Features [B, D] of the chips `chosen` at their `views`, int64 [B] arrays, at `size` px."""
    views = to_device(torch.from_numpy(views), store.device)
    return _features(model, store[chosen], views, size, grey)


def _features(model, chips, views, size, grey):
    """Features [B, D] of chips, uint8 [B, S, S], each in its view, int64 [B], at `size` px."""
    images = to_input(turn(chips, views), size, *grey)
    with autocast(chips.device):
        return model.features(images.to(memory_format=torch.channels_last))


def autocast(device):
    """bf16 on CUDA; float32 elsewhere, where it is faster or the same."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
