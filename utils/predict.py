"""Prediction over views of the test chips (test-time augmentation), one pass for all scripts."""

from data.augment import to_input, turn
from utils.settings import SettingError

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
def predict(model, store, image_size, grey, views=IDENTITY, batch_size=256, each=False, progress=""):
    """Logits and features of all chips, averaged over views.

    Args:
        model: Classifier, on the device of the store, as it is (set eval mode before).
        store: ChipStore of N chips.
        image_size: side of the input at scale 1, px.
        grey: (mean, std) of the sensor's grey level, 0..1.
        views: of tta_views, V of them.
        batch_size: inputs in one forward pass.
        each: keep the views apart.
        progress: name for the progress bar; "" shows none.

    Returns:
        logits [N, C], features [N, D], float32 on the device; with `each` [V, N, C], [V, N, D].
    """
    device = next(model.parameters()).device
    logits, features = [], []
    with tqdm(total=len(store) * len(views), desc=progress, unit=" views", disable=not progress) as bar:
        for start in range(0, len(store), batch_size):
            chips = store[start : start + batch_size]
            rows = []
            for view, scale in views:
                turned = turn(chips, torch.full((len(chips),), view, device=device))
                images = to_input(turned, scaled(image_size, scale), *grey)
                with autocast(device):
                    found = model.features(images.to(memory_format=torch.channels_last))
                    rows.append((model.head(found).float(), found.float()))
                bar.update(len(chips))
            for kept, parts in zip((logits, features), zip(*rows, strict=True), strict=True):
                stacked = torch.stack(parts)
                kept.append(stacked if each else stacked.mean(0))
    dim = 1 if each else 0
    return torch.cat(logits, dim), torch.cat(features, dim)


def autocast(device):
    """bf16 on CUDA; float32 elsewhere, where it is faster or the same."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
