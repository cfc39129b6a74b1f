"""The simulator of both sensors: one EO chip and one SAR chip of the same ground.

Everything on the ground (vehicles, trees, roads, buildings) is a list of upright `Block`s, each
with a pose, a height and a material. Both sensors image the same list:

    blocks -> height and albedo on a grid -> light, shadow, blur, noise             -> EO chip
    blocks -> scatterers -> layover, shadow -> speckle -> nearly logarithmic compression -> SAR chip

The radar looks along +y (down the rows) at a depression angle of about 40 degrees, the sun shines
along +x. Lengths are metres, angles radians, reflectivities decibels against grass.
"""

from typing import NamedTuple

import numpy as np

EO_PIXELS, SAR_PIXELS = 32, 56
CHIP_METRES = 15.0  # ground width of a chip, the same for both sensors
MARGIN_PIXELS = 4  # simulated around a SAR chip, then cut off: objects there cast shadows into the chip
EO_OVERSAMPLING, SAR_OVERSAMPLING = 3, 2  # grid cells per pixel, along each axis
SPECKLE_PIXELS = 1.22  # blur of the complex SAR image: the resolution of the radar
CLUTTER_PIXELS = 8.5, 3.5  # size (y, x) of the patches in which the ground's reflectivity varies
CLUTTER_DB = 3.2  # standard deviation of the ground's reflectivity
COMPRESSION = 0.185  # grey level = GREY_OF_GRASS * intensity ** COMPRESSION: close to a logarithm
GREY_OF_GRASS = 0.47
THERMAL_NOISE = 0.03  # intensity inside shadows, relative to grass
GAIN_BELS = 0.1  # standard deviation of the receiver's gain over chips
DEPRESSION = 0.7, 0.06  # radians: mean and standard deviation over scenes
NEIGHBOURS = ("sedan", "SUV", "pickup_truck", "van")  # kinds that may be parked beside a vehicle
OFF_CENTRE = 0.4  # metres, standard deviation of a vehicle's offset from the centre of its chip


class Material(NamedTuple):
    albedo: float  # EO brightness, 0..1; a block's tone is added
    top_db: float  # reflectivity of the upper face
    wall_db: float  # reflectivity of the sides, seen at a slant
    corner_db: float  # extra return where a side that faces the radar meets the ground (corner reflector)


MATERIALS = (
    Material(0.42, 0.0, 0.0, -30.0),
    Material(0.25, -5.0, -5.0, -30.0),
    Material(0.30, 2.0, 2.0, -30.0),
    Material(0.50, -2.0, 2.0, 8.0),
    Material(0.50, -4.0, 2.0, 10.0),
    Material(0.10, -5.0, 0.0, 0.0),
    Material(0.22, 1.0, 1.0, 5.0),
    Material(0.45, 4.0, 2.0, 9.0),
)
GRASS, ASPHALT, FOLIAGE, CONCRETE, PAINT, GLASS, DARK, CARGO = range(len(MATERIALS))


class Block(NamedTuple):
    """An upright block; later blocks of a list overwrite earlier ones where they overlap."""

    x: float  # centre; along the vehicle's axis, or in the chip after `at_pose`
    y: float
    length: float
    width: float
    top: float  # height of the upper face above ground
    material: int
    heading: float = 0.0
    tone: float = 0.0  # added to the albedo


def _cabin(front, rear, width, top):
    """A passenger cabin from `rear` to `front`: glass all around, a painted roof on it."""
    middle, length = (front + rear) / 2, front - rear
    return (Block(middle, 0, length, width, top - 0.1, GLASS),
            Block(middle - 0.05, 0, length - 0.9, width, top, PAINT))


_PICKUP = (Block(0, 0, 5.9, 2.0, 1.1, PAINT), *_cabin(1.4, -0.9, 1.7, 1.85),
           Block(-1.9, 0, 1.8, 1.5, 0.7, DARK))

# Noses point to +x. Sizes are those of common vehicles of each kind.
VEHICLES = {
    "sedan": (Block(0, 0, 4.6, 1.75, 0.9, PAINT), *_cabin(0.9, -1.6, 1.5, 1.4)),
    "SUV": (Block(0, 0, 5.0, 2.05, 1.1, PAINT), *_cabin(1.1, -2.4, 1.8, 1.9)),
    "pickup_truck": _PICKUP,
    "van": (Block(0, 0, 5.7, 2.1, 1.2, PAINT), *_cabin(2.3, -2.8, 2.1, 2.4)),
    "box_truck": (Block(2.9, 0, 1.9, 2.1, 2.2, PAINT), Block(3.4, 0, 0.7, 1.9, 1.9, GLASS),
                  Block(-0.9, 0, 5.4, 2.4, 3.3, CARGO)),
    "motorcycle": (Block(0, 0, 2.1, 0.5, 0.9, DARK), Block(-0.2, 0, 0.6, 0.7, 1.4, PAINT),
                   Block(0.5, 0, 0.2, 0.8, 1.1, DARK)),
    "flatbed_truck": (Block(-0.9, 0, 5.8, 2.4, 1.1, DARK), Block(2.9, 0, 1.9, 2.2, 2.4, PAINT),
                      Block(3.3, 0, 0.7, 2.0, 2.2, GLASS), Block(1.9, 0, 0.2, 2.3, 2.0, DARK)),
    "bus": (Block(0, 0, 11.5, 2.5, 3.0, PAINT), Block(5.5, 0, 0.6, 2.4, 2.6, GLASS),
            Block(1.5, 0, 1.6, 1.4, 3.3, DARK), Block(-3.0, 0, 1.6, 1.4, 3.3, DARK)),
    "pickup_truck_w_trailer": (
        *(block._replace(x=block.x + 3.2) for block in _PICKUP),
        Block(-0.3, 0, 1.4, 0.15, 0.5, DARK), Block(-3.4, 0, 4.8, 1.9, 0.9, CARGO),
        Block(-3.4, 0, 4.4, 1.5, 0.6, DARK)),
    "semi_w_trailer": (Block(5.6, 0, 2.4, 2.4, 2.2, PAINT), Block(5.1, 0, 1.4, 2.3, 3.0, PAINT),
                       Block(-1.5, 0, 11.0, 2.5, 3.9, CARGO)),
}
# Out of distribution: none of the ten classes. Their reference class is "unknown".
STRANGERS = {
    "tank": (Block(0, 0, 6.6, 3.4, 1.4, DARK), Block(-0.3, 0, 2.6, 2.2, 2.3, DARK),
             Block(2.8, 0, 4.2, 0.25, 2.0, DARK)),
    "excavator": (Block(-0.8, 0, 3.6, 2.8, 1.1, DARK), Block(-1.0, 0, 3.0, 2.4, 2.8, PAINT),
                  Block(2.2, 0.4, 4.4, 0.5, 3.2, PAINT), Block(4.3, 0.4, 0.9, 1.2, 1.0, DARK)),
    "tractor": (Block(0.7, 0, 2.2, 0.9, 1.5, PAINT), Block(-0.8, 0, 1.5, 1.4, 2.7, GLASS),
                Block(-0.9, 1.0, 1.7, 0.5, 1.7, DARK), Block(-0.9, -1.0, 1.7, 0.5, 1.7, DARK)),
    "aircraft": (Block(0, 0, 8.0, 1.2, 1.8, PAINT), Block(0.9, 0, 1.5, 10.5, 2.2, PAINT),
                 Block(-3.6, 0, 0.9, 3.4, 1.8, PAINT)),
    "containers": (Block(0, 1.4, 6.1, 2.4, 2.6, CARGO), Block(0.4, -1.4, 6.1, 2.4, 5.2, CARGO)),
    "building": (Block(0, 0, 11.0, 8.0, 4.0, CONCRETE), Block(1.5, 1.0, 2.0, 1.5, 5.0, DARK)),
    "clutter": (),
    "empty": (),  # an all-zero chip
}
KINDS = VEHICLES | STRANGERS


def individual(rng, blocks):
    """One individual of a kind, as blocks: its own size, proportions and paint."""
    along, across, up = rng.normal(1.0, (0.045, 0.04, 0.05))
    light = rng.random() < 0.75
    tones = {PAINT: rng.uniform(0.15, 0.42) if light else rng.uniform(-0.38, -0.2),
             CARGO: rng.uniform(-0.2, 0.4)}
    return [block._replace(x=block.x * along, length=block.length * along, y=block.y * across,
                           width=block.width * across, top=block.top * up,
                           tone=tones.get(block.material, rng.normal(0, 0.04))) for block in blocks]


def at_pose(blocks, x, y, heading):
    """Blocks given along a vehicle's axis, turned by `heading` and moved to (x, y)."""
    cos, sin = np.cos(heading), np.sin(heading)
    return [block._replace(x=x + cos * block.x - sin * block.y, y=y + sin * block.x + cos * block.y,
                           heading=heading + block.heading) for block in blocks]


def surroundings(rng):
    """Road, trees and a parked neighbour around the object, as blocks in the chip."""
    blocks = []
    along = rng.uniform(0, np.pi)
    normal = along + np.pi / 2
    if rng.random() < 0.7:
        offset = rng.normal(0, 3)
        blocks.append(Block(offset * np.cos(normal), offset * np.sin(normal), 40,
                            rng.uniform(5, 14), 0.0, ASPHALT, along, rng.normal(0, 0.06)))
    for _ in range(rng.poisson(1.0)):
        bearing, distance = rng.uniform(0, 2 * np.pi), rng.uniform(6.5, 10)
        blocks.append(Block(distance * np.cos(bearing), distance * np.sin(bearing),
                            *rng.uniform(2, 5, 2), rng.uniform(1, 4), FOLIAGE,
                            rng.uniform(0, np.pi), rng.normal(0, 0.06)))
    if rng.random() < 0.3:
        neighbour = individual(rng, VEHICLES[NEIGHBOURS[rng.integers(4)]])
        side, shift = rng.choice((-1, 1)) * rng.uniform(4.0, 7.5), rng.normal(0, 3)
        blocks += at_pose(neighbour, side * np.cos(normal) + shift * np.cos(along),
                        side * np.sin(normal) + shift * np.sin(along), along + rng.normal(0, 0.1))
    return blocks


def _rasterise(blocks, cells, metres):
    """Draw blocks on a grid of cells x cells over metres x metres: height, material, tone."""
    centres = (np.arange(cells) + 0.5) * (metres / cells) - metres / 2
    height, tone = np.zeros((cells, cells)), np.zeros((cells, cells))
    material = np.full((cells, cells), GRASS)
    for block in blocks:
        reach = np.hypot(block.length, block.width) / 2
        columns = slice(*np.searchsorted(centres, (block.x - reach, block.x + reach)))
        rows = slice(*np.searchsorted(centres, (block.y - reach, block.y + reach)))
        dx, dy = centres[None, columns] - block.x, centres[rows, None] - block.y
        cos, sin = np.cos(block.heading), np.sin(block.heading)
        u, v = (cos * dx + sin * dy) * (2 / block.length), (cos * dy - sin * dx) * (2 / block.width)
        inside = u**2 + v**2 < 1 if block.material == FOLIAGE else np.maximum(abs(u), abs(v)) < 1
        for grid, value in (height, block.top), (material, block.material), (tone, block.tone):
            grid[rows, columns][inside] = value
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


def eo_chip(rng, blocks):
    """The EO image of blocks, from above. Returns uint8 [32, 32]."""
    cells = EO_PIXELS * EO_OVERSAMPLING
    height, material, tone = _rasterise(blocks, cells, CHIP_METRES)
    albedo = np.array([m.albedo for m in MATERIALS])[material] + tone
    albedo += 0.04 * _smooth_noise(rng, cells, 2.0) * (height == 0)
    # A sunray falls `slope` metres per metre of ground. A cell is lit if no earlier cell is on a higher ray.
    slope = rng.uniform(0.8, 1.8)
    ray = height + slope * CHIP_METRES / cells * np.arange(cells)
    lit = ray >= np.maximum.accumulate(ray, axis=1)
    light = albedo * np.where(lit, 1.0, 0.45)
    pixels = light.reshape(EO_PIXELS, EO_OVERSAMPLING, EO_PIXELS, EO_OVERSAMPLING).mean((1, 3))
    pixels = _low_pass(pixels, rng.uniform(0.25, 0.5)).real
    pixels = rng.uniform(0.7, 1.15) * pixels + rng.normal(0, 0.012, pixels.shape)
    return _to_uint8(pixels)


def _surface_scatterers(height, material, cell):
    """Upper faces as points (x, y, z) with their power, one per grid cell, each (cells**2,)."""
    centres = (np.arange(len(height)) + 0.5) * cell - len(height) * cell / 2
    x, y = np.meshgrid(centres, centres)
    power = 10 ** (np.array([m.top_db for m in MATERIALS])[material] / 10) * cell**2
    return x.ravel(), y.ravel(), height.ravel(), power.ravel()


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
        np.array(column)[:, None, None, None] for column in zip(*tall, strict=True))
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
    points = np.broadcast_arrays(x + reach * np.cos(normal) - step * np.sin(normal),
                                 y + reach * np.sin(normal) + step * np.cos(normal),
                                 top * climb, power)
    return tuple(array.ravel() for array in points)


def _backscatter(blocks, depression, pixels, pixel):
    """Mean intensity in radar geometry, against grass: layover and shadow, (pixels, pixels)."""
    metres, cells, cell = pixels * pixel, pixels * SAR_OVERSAMPLING, pixel / SAR_OVERSAMPLING
    height, material, _ = _rasterise(blocks, cells, metres)
    x, y, z, power = (np.concatenate(pair) for pair in zip(
        _surface_scatterers(height, material, cell), _wall_scatterers(blocks, cell), strict=True))
    inside = (abs(x) < metres / 2) & (abs(y) < metres / 2)
    x, y, z, power = x[inside], y[inside], z[inside], power[inside]

    # z + y * tan(depression) is constant along a ray. A point lies in shadow if a point nearer to the
    # radar has a higher value.
    slope = np.tan(depression)
    column = ((x + metres / 2) / cell).astype(int)
    row = ((y + metres / 2) / cell).astype(int)
    centres = (np.arange(cells)[:, None] + 0.5) * cell - metres / 2
    horizon = np.maximum.accumulate(height + slope * centres, axis=0)
    lit = z + slope * y > horizon[row, column] - slope * cell
    # Layover: a high point is nearer to the radar than its foot, so it moves towards smaller y.
    row = np.clip(((y - z * slope + metres / 2) / pixel).astype(int), 0, pixels - 1)
    column = column // SAR_OVERSAMPLING
    image = np.bincount(row * pixels + column, power * lit, pixels**2)
    return image.reshape(pixels, pixels) / pixel**2


def sar_chip(rng, blocks, depression):
    """The SAR image of blocks at a depression angle (radians). Returns uint8 [56, 56]."""
    pixels = SAR_PIXELS + 2 * MARGIN_PIXELS
    clutter_db = CLUTTER_DB * _smooth_noise(rng, pixels, CLUTTER_PIXELS)
    intensity = _backscatter(blocks, depression, pixels, CHIP_METRES / SAR_PIXELS)
    intensity = intensity * 10 ** (clutter_db / 10) + THERMAL_NOISE

    # Speckle: many scatterers of random phase in each resolution cell sum to a complex Gaussian.
    noise = rng.standard_normal((2, pixels, pixels))
    field = _low_pass(np.sqrt(intensity / 2) * (noise[0] + 1j * noise[1]), SPECKLE_PIXELS)
    # The blur leaves 1 / (4 pi sigma^2) of the power of white noise.
    speckled = 4 * np.pi * SPECKLE_PIXELS**2 * abs(field) ** 2 * 10 ** rng.normal(0, GAIN_BELS)
    grey = GREY_OF_GRASS * speckled**COMPRESSION
    return _to_uint8(grey[MARGIN_PIXELS:-MARGIN_PIXELS, MARGIN_PIXELS:-MARGIN_PIXELS])


def _to_uint8(grey):
    return np.round(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def simulate_pair(rng, kind):
    """A pair of chips of a new individual at a random heading.

    Args:
        rng: numpy Generator; all randomness comes from it.
        kind: a name in KINDS.

    Returns:
        EO chip uint8 [32, 32] and SAR chip uint8 [56, 56].
    """
    vehicle = individual(rng, KINDS[kind])
    pose = *rng.normal(0, OFF_CENTRE, 2), rng.uniform(0, 2 * np.pi)
    blocks = surroundings(rng) + at_pose(vehicle, *pose)
    return eo_chip(rng, blocks), sar_chip(rng, blocks, rng.normal(*DEPRESSION))
