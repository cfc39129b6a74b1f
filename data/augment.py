"""Augmentation and network input of whole batches: flips, quarter turns, grey levels, rotation, size.

All functions run on the device of their tensors, and none of them waits for the device.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

VIEWS = 8  # four quarter turns, each with and without a flip


class Share(NamedTuple):
    """The rows that one rank has of a batch of all ranks.

    rows: of this rank; total: number of rows of all ranks. Each rank draws the random numbers of all
    rows and uses those of its own, so that the ranks together augment as one process does.
    """

    rows: slice
    total: int


@dataclass(frozen=True)
class Augmentation:
    """Network inputs of training batches: flip, quarter turns, speckle, jitter, rotation, and one of the sizes a step.

    grey: (mean, std) of the sensor's grey level, 0..1.
    jitter, speckle: strengths, as in the functions of these names; rotation: largest angle of `rotate`.
    sizes: sides of the input, px, which the steps take in turn.
    """

    grey: tuple
    jitter: float
    speckle: float
    rotation: float
    sizes: list

    def __call__(self, batch):
        """float32 [B, 1, S, S] of a `data.batches.Batch`."""
        images = normalise(turn(batch.chips, batch.views), *self.grey)
        images = speckle(images, self.speckle, *self.grey, batch.share)
        images = jitter(images, self.jitter, batch.share)
        images = rotate(images, self.rotation, batch.share)
        if first_row := batch.share.rows.start:  # from here on the ranks' random numbers differ, such as dropout's
            torch.manual_seed(torch.initial_seed() + first_row)
        return resize(images, self.sizes[batch.step % len(self.sizes)])


def turn(chips, views):
    """Flip and rotate each chip of a batch by its own view, with one gather.

    Args:
        chips: [N, S, S], any dtype.
        views: [N] int64, 0..7: (view mod 4) quarter turns counter-clockwise; for view >= 4 after a
            horizontal flip.

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
    """Network input without augmentation: `normalise`, then `resize`."""
    return resize(normalise(chips, mean, std), size)


def normalise(chips, mean, std):
    """Grey levels with zero mean and unit standard deviation.

    Args:
        chips: uint8 [N, S, S].
        mean, std: mean and standard deviation of the sensor's grey level, in 0..1.

    Returns:
        float32 [N, 1, S, S].
    """
    return chips[:, None].to(torch.float32).mul_(1 / (255 * std)).sub_(mean / std)


def resize(images, size):
    """Images [N, 1, S, S], resized to size x size pixels: bilinear, with antialiasing.

    Resize last: the other augmentations then work on the pixels of the chip, which are fewer.
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def jitter(images, strength, share=None):
    """Random contrast and brightness of each chip: x (1 + s u) + s v, with u and v uniform in -1..1.

    Args:
        images: [N, 1, S, S] normalised.
        strength: s, in units of the grey level's standard deviation; 0 changes nothing.
        share: `Share` that the images are of a batch of all ranks; None = they are the whole batch.
    """
    if not strength:
        return images
    rows, total = share or Share(slice(None), len(images))
    u, v = (torch.rand(2, total, 1, 1, 1, device=images.device)[:, rows] * 2 - 1).mul(strength)
    return torch.addcmul(v, images, 1 + u)


def speckle(images, strength, mean, std, share=None):
    """Multiplicative speckle on the grey level g: g (1 + s n), with n ~ N(0, 1) for each pixel.

    Args:
        images: [N, 1, S, S] normalised with mean and std (of the grey level, 0..1).
        strength: s, relative to the grey level; 0 changes nothing.
        share: as in `jitter`.
    """
    if not strength:
        return images
    rows, total = share or Share(slice(None), len(images))
    noise = torch.randn(total, *images.shape[1:], device=images.device, dtype=images.dtype)[rows]
    return images + (images + mean / std) * noise.mul(strength)


def rotate(images, most, share=None):
    """Each chip rotated about its centre by an angle of its own, uniform in -most..most.

    Corners that come from outside the chip show its mirror image.

    Args:
        images: [N, 1, S, S].
        most: degrees; 0 changes nothing.
        share: as in `jitter`.
    """
    if not most:
        return images
    rows, total = share or Share(slice(None), len(images))
    angle = (torch.rand(total, device=images.device)[rows] * 2 - 1) * math.radians(most)
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    # Not F.affine_grid: it multiplies matrices, which under autocast gives positions in bf16.
    centres = (torch.arange(images.shape[-1], device=images.device) * 2 + 1) / images.shape[-1] - 1
    x, y = centres[None, None, :], centres[None, :, None]
    grid = torch.stack((cos * x - sin * y, sin * x + cos * y), -1)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
