import math

from data.augment import Augmentation, Share, jitter, normalise, resize, rotate, speckle, to_input, turn
from data.batches import Batch

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def test_all_eight_views_each_chip_its_own():
    chip = torch.arange(25, dtype=torch.uint8).view(5, 5)
    turned = turn(chip.expand(8, 5, 5), torch.arange(8))
    assert turned.dtype == torch.uint8
    for view in range(8):
        base = np.fliplr(chip.numpy()) if view >= 4 else chip.numpy()
        np.testing.assert_array_equal(turned[view], np.rot90(base, view % 4))
    assert len({t.numpy().tobytes() for t in turned}) == 8


def test_same_geometry_on_both_sides_of_a_pair():
    # A bright corner marks the pose on chips of either size.
    eo, sar = torch.zeros(8, 32, 32), torch.zeros(8, 56, 56)
    eo[:, :4, :8], sar[:, :7, :14] = 1.0, 1.0
    views = torch.tensor([3, 1, 4, 0, 7, 2, 6, 5])
    small, large = turn(eo, views), turn(sar, views)
    shrunk = torch.nn.functional.adaptive_avg_pool2d(large[:, None], 8)[:, 0]
    torch.testing.assert_close(shrunk, torch.nn.functional.adaptive_avg_pool2d(small[:, None], 8)[:, 0])


@pytest.mark.parametrize("size", [32, 56, 64])
def test_to_input_resizes_and_normalises(size):
    chips = torch.randint(0, 256, (6, 56, 56), dtype=torch.uint8)
    images = to_input(chips, size, 0.4, 0.12)
    assert images.shape == (6, 1, size, size) and images.dtype == torch.float32
    if size == 56:
        torch.testing.assert_close(images[:, 0], (chips / 255 - 0.4) / 0.12)
    flat = to_input(torch.full((1, 56, 56), 102, dtype=torch.uint8), size, 0.4, 0.12)
    torch.testing.assert_close(flat, torch.zeros_like(flat), atol=1e-5, rtol=0)


def test_jitter_is_affine_and_each_chip_has_its_own():
    torch.manual_seed(0)
    images = torch.randn(64, 1, 8, 8)
    changed = jitter(images, 0.3)
    shift = changed.mean((1, 2, 3)) - images.mean((1, 2, 3))
    contrast = changed.std((1, 2, 3)) / images.std((1, 2, 3))
    assert contrast.min() >= 0.7 - 1e-5 and contrast.max() <= 1.3 + 1e-5
    assert contrast.unique().numel() == 64 and shift.std() > 0.1
    assert torch.equal(jitter(images, 0.0), images)


def test_speckle_is_multiplicative():
    torch.manual_seed(0)
    mean, std = 0.4, 0.12
    chips = torch.tensor([0, 60, 120, 240], dtype=torch.uint8)[:, None, None].expand(4, 100, 100)
    grey = speckle(to_input(chips, 100, mean, std), 0.1, mean, std) * std + mean
    torch.testing.assert_close(grey.mean((1, 2, 3)), chips[:, 0, 0] / 255, atol=0.002, rtol=0)
    torch.testing.assert_close(grey.std((1, 2, 3)), 0.1 * chips[:, 0, 0] / 255, atol=0.001, rtol=0)


def test_grey_levels_may_change_before_the_resize():
    """Jitter commutes with it, so it is done on the chip's own pixels."""
    chips = torch.randint(0, 256, (6, 56, 56), dtype=torch.uint8)
    torch.manual_seed(0)
    before = resize(jitter(normalise(chips, 0.4, 0.12), 0.3), 64)
    torch.manual_seed(0)
    torch.testing.assert_close(before, jitter(to_input(chips, 64, 0.4, 0.12), 0.3), atol=1e-4, rtol=1e-4)
    plain = torch.nn.functional.interpolate(normalise(chips, 0.4, 0.12), size=(64, 64), mode="bilinear")
    torch.testing.assert_close(to_input(chips, 64, 0.4, 0.12), plain, atol=1e-5, rtol=1e-5)


def test_shares_of_a_batch_are_augmented_as_the_whole_batch():
    images = torch.randn(10, 1, 8, 8)

    def augmented(rows, share):
        torch.manual_seed(3)
        return rotate(speckle(jitter(images[rows], 0.2, share), 0.1, 0.4, 0.12, share), 30, share)

    batch = augmented(slice(None), None)
    for rows in (slice(0, 5), slice(5, 10), slice(0, 3), slice(3, 10), slice(3, 4)):
        assert torch.equal(augmented(rows, Share(rows, 10)), batch[rows])


def test_steps_take_the_sizes_in_turn_and_each_strength_changes_the_chips():
    chips = torch.randint(0, 256, (4, 16, 16), dtype=torch.uint8)
    views, share = torch.tensor([1, 7, 0, 4]), Share(slice(0, 4), 4)

    def augmented(step, jitter=0.0, speckle=0.0, rotation=0.0):
        batch = Batch(step, np.arange(4), views.numpy(), chips, views, None, share)
        return Augmentation((0.4, 0.12), jitter, speckle, rotation, [16, 12, 20])(batch)

    for step, size in enumerate((16, 12, 20, 16, 12)):
        torch.testing.assert_close(augmented(step), to_input(turn(chips, views), size, 0.4, 0.12))
    for name in ("jitter", "speckle", "rotation"):
        changed = (augmented(0, **{name: 0.3}) - augmented(0)).abs()
        assert (changed.amax((1, 2, 3)) > 0.01).all(), name


def test_rotation_turns_each_chip_about_its_centre_by_its_own_angle():
    torch.manual_seed(0)
    at = torch.arange(41) - 20.0
    y, x = torch.meshgrid(at, at, indexing="ij")
    blob = torch.exp(-((x - 12) ** 2 + y**2) / 8)  # right of the centre
    images = blob.expand(200, 1, 41, 41)
    rotated = rotate(images, 25.0)
    mass = rotated.sum((1, 2, 3))
    centre_x, centre_y = (rotated[:, 0] * x).sum((1, 2)) / mass, (rotated[:, 0] * y).sum((1, 2)) / mass
    torch.testing.assert_close(torch.hypot(centre_x, centre_y), torch.full((200,), 12.0), atol=0.05, rtol=0)
    angles = torch.rad2deg(torch.atan2(centre_y, centre_x))
    assert 20 < angles.max() < 25.1 and -25.1 < angles.min() < -20 and abs(angles.mean()) < 3
    torch.testing.assert_close(rotate(torch.ones(3, 1, 9, 9), 180.0), torch.ones(3, 1, 9, 9))
    assert rotate(images, 0.0) is images


def test_rotation_is_as_exact_under_autocast_as_torchs_affine_grid_without():
    images = torch.rand(4, 1, 128, 128)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        turned = rotate(images, 20)
    torch.manual_seed(3)
    angle = (torch.rand(4) * 2 - 1) * math.radians(20)
    matrices = torch.zeros(4, 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = angle.cos()
    matrices[:, 1, 0], matrices[:, 0, 1] = angle.sin(), -angle.sin()
    grid = F.affine_grid(matrices, images.shape, align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=0)
