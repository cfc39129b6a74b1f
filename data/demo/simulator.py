"""The simulator of both sensors: EO chips and SAR chips of the same ground.

Both sensors image the same `Site`, a list of blocks (see `data.demo.objects`) on textured ground:

    blocks -> height and albedo on a grid -> light, shadow, blur, noise             -> EO chip
    blocks -> scatterers -> layover, shadow -> speckle -> nearly logarithmic compression -> SAR chip

The radar circles: it looks along +y (down the rows) turned by `look`, at a depression angle of about 40
degrees. The sun shines along +x. Lengths are metres, angles radians, reflectivities decibels against grass.
"""

from typing import NamedTuple

from data.demo.objects import FOLIAGE, MATERIALS, OFF_CENTRE, at_pose, surroundings

import numpy as np

EO_PIXELS, SAR_PIXELS = 32, 56
CHIP_METRES = 15.0  # ground width of a chip, the same for both sensors
EO_MARGIN, SAR_MARGIN = 2, 4  # px simulated around a chip, then cut off
EO_OVERSAMPLING, SAR_OVERSAMPLING = 3, 2  # grid cells per pixel, along each axis
EO_BLUR = 0.6, 1.0  # px, standard deviation along y and x
TEXTURE, TEXTURE_CELLS = 0.05, (15.0, 26.0)  # of the albedo of the ground: deviation, size of patches along y and x
SHADE = 0.38  # light in a shadow, relative to the sun's
HAZE = 0.012  # light that the air scatters into the camera, relative to the ground's
EO_NOISE = 0.008  # of the grey level
EXPOSURE = 0.27  # standard deviation of the logarithm of the brightness over sites
REGISTRATION = 0.25  # px, standard deviation of the EO chip's shift against the SAR chip
SPECKLE_PIXELS = 1.22  # blur of the complex SAR image: the resolution of the radar
CLUTTER_PIXELS = 15.0, 7.0  # size (y, x) of the patches in which the ground's reflectivity varies
COMPRESSION = 0.185  # grey level = GREY_OF_GRASS * intensity ** COMPRESSION: close to a logarithm
GREY_OF_GRASS = 0.47
THERMAL_NOISE = 0.02  # intensity inside shadows, relative to grass
GAIN_BELS = 0.1  # standard deviation of the receiver's gain over chips


class Flight(NamedTuple):
    """How the radar sees the ground during a flight."""

    depression: float = 0.70  # radians below the horizon
    gain: float = 0.0  # bels, of the receiver
    clutter: float = 3.2  # dB, standard deviation of the ground's reflectivity


class Site(NamedTuple):
    """A piece of ground with an object in its centre: all that stays while the sensors pass over it."""

    blocks: list  # surroundings and object, in the chip
    ground: int  # material
    exposure: float  # EO brightness


def new_site(rng, vehicle, heading):
    """A new `Site` with a vehicle, blocks along its axis, at its centre."""
    width = max((block.width for block in vehicle), default=0.0)
    ground, around = surroundings(rng, width)
    blocks = at_pose([*around, *at_pose(vehicle, *rng.normal(0, OFF_CENTRE, 2), 0.0)], 0.0, 0.0, heading)
    return Site(blocks, ground, np.exp(rng.normal(0, EXPOSURE)))


def _rasterise(blocks, ground, cells, metres):
    """Draw blocks on a grid of cells x cells over metres x metres: height, material, tone."""
    centres = (np.arange(cells) + 0.5) * (metres / cells) - metres / 2
    top = np.zeros((cells, cells), np.intp)  # the uppermost block of each cell, 0 = the ground
    for number, block in enumerate(blocks, start=1):
        cos, sin = np.cos(block.heading), np.sin(block.heading)
        reach_x = (abs(cos) * block.length + abs(sin) * block.width) / 2
        reach_y = (abs(sin) * block.length + abs(cos) * block.width) / 2
        columns = slice(*np.searchsorted(centres, (block.x - reach_x, block.x + reach_x)))
        rows = slice(*np.searchsorted(centres, (block.y - reach_y, block.y + reach_y)))
        dx, dy = centres[None, columns] - block.x, centres[rows, None] - block.y
        u = (cos * dx + sin * dy) * (2 / block.length)
        v = (cos * dy - sin * dx) * (2 / block.width)
        inside = u**2 + v**2 < 1 if block.material == FOLIAGE else (abs(u) < 1) & (abs(v) < 1)
        top[rows, columns][inside] = number
    table = ((0.0, ground, 0.0), *((block.top, block.material, block.tone) for block in blocks))
    height, material, tone = (np.array(column)[top] for column in zip(*table, strict=True))
    return height, material, tone


def _low_pass(field, sigma):
    """Gaussian blur by `sigma` pixels (one number, or along y and along x), edges wrapped."""
    frequency = np.pi * np.fft.fftfreq(len(field))
    gain_y, gain_x = (np.exp(-2 * (s * frequency) ** 2) for s in np.broadcast_to(sigma, 2))
    return np.fft.ifft2(np.fft.fft2(field) * np.outer(gain_y, gain_x))


def _smooth_noise(rng, pixels, sigma):
    """A random field of unit variance with patches of about `sigma` pixels, float64."""
    field = _low_pass(rng.standard_normal((pixels, pixels)), sigma).real
    return field / field.std()


def eo_surface(rng, site):
    """Height, m, and albedo, 0..1, of a site on the EO grid, margin included: float64 (cells, cells) each.

    rng: numpy Generator, of the texture of the ground.
    """
    pixels = EO_PIXELS + 2 * EO_MARGIN
    metres = CHIP_METRES * pixels / EO_PIXELS
    height, material, tone = _rasterise(site.blocks, site.ground, pixels * EO_OVERSAMPLING, metres)
    albedo = np.array([m.albedo for m in MATERIALS])[material] + tone
    texture = _smooth_noise(rng, len(height), TEXTURE_CELLS)
    return height, albedo + TEXTURE * texture * (height == 0)


def eo_chip(rng, surface, brightness, sun):
    """The EO image of a site, from above.

    Args:
        rng: numpy Generator, of the shift and the noise.
        surface: `eo_surface` of the site.
        brightness: factor of the grey level.
        sun: metres that a ray of the sun falls per metre of ground.

    Returns:
        uint8 [32, 32].
    """
    height, albedo = surface
    # A cell is lit if no earlier cell is on a higher ray.
    ray = height + sun * CHIP_METRES / (EO_PIXELS * EO_OVERSAMPLING) * np.arange(len(height))
    light = albedo * np.where(ray >= np.maximum.accumulate(ray, axis=1), 1.0, SHADE)
    largest = EO_MARGIN * EO_OVERSAMPLING
    shift = np.clip(np.round(rng.normal(0, REGISTRATION * EO_OVERSAMPLING, 2)).astype(int), -largest, largest)
    top, left = largest + shift
    light = light[top : top + EO_PIXELS * EO_OVERSAMPLING, left : left + EO_PIXELS * EO_OVERSAMPLING]
    pixels = light.reshape(EO_PIXELS, EO_OVERSAMPLING, EO_PIXELS, EO_OVERSAMPLING).mean((1, 3))
    pixels = brightness * (_low_pass(pixels, EO_BLUR).real + HAZE)
    return _to_uint8(pixels + rng.normal(0, EO_NOISE, pixels.shape))


def _wall_scatterers(blocks, cell, along=16, up=6):
    """Sides that face the radar as points (x, y, z) with their power, each (points,).

    Every side has a slant return, spread over its height, and a strong return at its foot, where side
    and ground form a corner reflector. Only a side that faces the radar has the strong return.
    """
    tall = [block for block in blocks if block.top > 0.3]
    if not tall:
        return (np.empty(0),) * 4
    # Axes of all arrays: block, its 4 sides, steps along the side, steps up the side.
    x, y, length, width, top, material, heading, _ = (
        np.array(column)[:, None, None, None] for column in zip(*tall, strict=True)
    )
    _, _, wall_db, corner_db = np.moveaxis(np.array(MATERIALS)[material], -1, 0)
    turn = np.arange(4)[:, None, None]
    normal = heading + np.pi / 2 * turn
    depth, extent = np.where(turn % 2, (width, length), (length, width))
    reach = depth / 2 + cell  # one cell outside its own block, or the block would shadow it
    step = extent * ((np.arange(along) + 0.5) / along - 0.5)[:, None]
    climb = np.arange(up) / up  # the first point is the foot
    facing = np.maximum(-np.sin(normal), 0)
    area = extent * top * facing / along
    power = area * (10 ** (wall_db / 10) / up + 10 ** (corner_db / 10) * facing**12 * (climb == 0))
    points = np.broadcast_arrays(
        x + reach * np.cos(normal) - step * np.sin(normal),
        y + reach * np.sin(normal) + step * np.cos(normal),
        top * climb,
        power,
    )
    return tuple(array.ravel() for array in points)


def _backscatter(blocks, ground, depression, pixels, pixel):
    """Mean intensity in radar geometry, against grass: layover and shadow, (pixels, pixels)."""
    metres, cells, cell = pixels * pixel, pixels * SAR_OVERSAMPLING, pixel / SAR_OVERSAMPLING
    height, material, _ = _rasterise(blocks, ground, cells, metres)
    # z + y * tan(depression) is constant along a ray. A point lies in shadow if a point nearer to the
    # radar has a higher value.
    slope = np.tan(depression)
    centres = (np.arange(cells)[:, None] + 0.5) * cell - metres / 2
    ray = height + slope * centres
    horizon = np.maximum.accumulate(ray, axis=0) - slope * cell

    def image(y, z, column, power):
        # Layover: a high point is nearer to the radar than its foot, so it moves towards smaller y.
        row = np.clip(((y - z * slope + metres / 2) / pixel).astype(int), 0, pixels - 1)
        return np.bincount((row * pixels + column // SAR_OVERSAMPLING).ravel(), power.ravel(), pixels**2)

    power = (10 ** (np.array([m.top_db for m in MATERIALS]) / 10) * cell**2)[material] * (ray > horizon)
    intensity = image(centres, height, np.arange(cells), power)
    x, y, z, power = _wall_scatterers(blocks, cell)
    inside = (power > 0) & (abs(x) < metres / 2) & (abs(y) < metres / 2)
    x, y, z, power = x[inside], y[inside], z[inside], power[inside]
    row, column = (((along + metres / 2) / cell).astype(int) for along in (y, x))
    intensity += image(y, z, column, power * (z + slope * y > horizon[row, column]))
    return intensity.reshape(pixels, pixels) / pixel**2


def _rotate(image, angle, pixels):
    """The centre of a square image turned by `angle`, bilinear: (pixels, pixels)."""
    centred = np.arange(pixels) - (pixels - 1) / 2
    middle = (len(image) - 1) / 2
    x = np.cos(angle) * centred + np.sin(angle) * centred[:, None] + middle
    y = np.cos(angle) * centred[:, None] - np.sin(angle) * centred + middle
    column, row = x.astype(int), y.astype(int)
    x, y = x - column, y - row
    above = image[row, column] * (1 - x) + image[row, column + 1] * x
    below = image[row + 1, column] * (1 - x) + image[row + 1, column + 1] * x
    return above * (1 - y) + below * y


def sar_chip(rng, site, look, flight):
    """The SAR image of a site.

    The mean intensity is computed in radar geometry and turned back into the chip's frame. Clutter and
    speckle are added there, so that turning does not change their statistics.

    Args:
        rng: numpy Generator, of clutter, speckle and gain.
        site: Site.
        look: direction in which the radar looks, radians from +y.
        flight: Flight.

    Returns:
        uint8 [56, 56].
    """
    pixels = SAR_PIXELS + 2 * SAR_MARGIN
    wide = int(np.ceil(np.sqrt(2) * pixels)) + 3  # holds the chip at any angle
    turned = at_pose(site.blocks, 0.0, 0.0, -look)
    intensity = _backscatter(turned, site.ground, flight.depression, wide, CHIP_METRES / SAR_PIXELS)
    intensity = _rotate(intensity, look, pixels)
    clutter = flight.clutter * _smooth_noise(rng, pixels, CLUTTER_PIXELS)
    intensity = intensity * 10 ** (clutter / 10) + THERMAL_NOISE

    # Speckle: many scatterers of random phase in each resolution cell sum to a complex Gaussian.
    noise = rng.standard_normal((2, pixels, pixels))
    field = _low_pass(np.sqrt(intensity / 2) * (noise[0] + 1j * noise[1]), SPECKLE_PIXELS)
    # The blur leaves 1 / (4 pi sigma^2) of the power of white noise.
    gain = 10 ** rng.normal(flight.gain, GAIN_BELS)
    grey = GREY_OF_GRASS * (4 * np.pi * SPECKLE_PIXELS**2 * gain * abs(field) ** 2) ** COMPRESSION
    return _to_uint8(grey[SAR_MARGIN:-SAR_MARGIN, SAR_MARGIN:-SAR_MARGIN])


def _to_uint8(grey):
    return np.round(255 * np.clip(grey, 0, 1)).astype(np.uint8)
