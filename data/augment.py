"""Views of whole batches on the device: flips and rotations, size, normalisation, grey levels.

Device and dtype come from the tensors; nothing here waits for the device.
"""

import functools

import torch
import torch.nn.functional as F

VIEWS = 8  # the flips and quarter turns of a square


def turn(chips, views):
    """Flip and rotate every chip of a batch by its own view, by one gather.

    Args:
        chips: [N, S, S], any dtype.
        views: [N] int64, 0..7: view mod 4 quarter turns counter-clockwise, after a horizontal
            flip where view >= 4.

    Returns:
        [N, S, S], same dtype.
    """
    n, side, _ = chips.shape
    return chips.flatten(1).gather(1, _positions(side, chips.device)[views]).view(n, side, side)


@functools.cache
def _positions(side, device):
    """[8, S*S] int64: for each view, the source pixel of each pixel."""
    grid = torch.arange(side * side, device=device).view(side, side)
    turned = [torch.rot90(g, k) for g in (grid, grid.flip(1)) for k in range(4)]
    return torch.stack(turned).flatten(1)


def to_input(chips, size, mean, std):
    """Network input from grey levels, without augmentation: `normalise`, then `resize`."""
    return resize(normalise(chips, mean, std), size)


def normalise(chips, mean, std):
    """Grey levels at zero mean and unit spread.

    Args:
        chips: uint8 [N, S, S].
        mean, std: of the sensor's grey level, 0..1.

    Returns:
        float32 [N, 1, S, S].
    """
    return chips[:, None].to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std)


def resize(images, size):
    """Images [N, 1, S, S] at the network's size, px: bilinear, smoothed where they get smaller.

    It comes last: what is done to the grey levels before it costs the chip's pixels, not the input's.
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def jitter(images, strength, rows=None):
    """Random contrast and brightness, each chip its own: x (1 + s u) + s v, u and v in -1..1.

    Args:
        images: [N, 1, S, S] normalised.
        strength: s, in units of the grey level's standard deviation; 0 leaves all as it is.
        rows: (slice, B) where they are these rows of a batch of B, drawn as for the whole.
    """
    if not strength:
        return images
    rows, whole = rows or (slice(None), len(images))
    u, v = (torch.rand(2, whole, 1, 1, 1, device=images.device)[:, rows] * 2 - 1).mul(strength)
    return torch.addcmul(v, images, 1 + u)


def speckle(images, strength, mean, std, rows=None):
    """Multiplicative speckle on the grey level: g (1 + s n), n ~ N(0, 1) for every pixel.

    Args:
        images: [N, 1, S, S] normalised with mean and std (of the grey level, 0..1).
        strength: s, relative to the grey level; 0 leaves all as it is.
        rows: as in `jitter`.
    """
    if not strength:
        return images
    rows, whole = rows or (slice(None), len(images))
    noise = torch.randn(whole, *images.shape[1:], device=images.device, dtype=images.dtype)[rows]
    return images + (images + mean / std) * noise.mul(strength)
