"""A simulator of the two sensors.

Everything on the ground (vehicles, trees, roads, buildings) is a list of `Part`: upright blocks
with a pose, a height and a material. The same list is seen twice:

    parts -> height and albedo on a grid -> light, shadow, blur, noise             -> EO chip
    parts -> scatterers -> layover, shadow -> speckle -> nearly logarithmic compression -> SAR chip

The radar looks along +y (down the rows) at a depression angle of about 40 degrees, the sun shines
along +x. Lengths are metres, angles radians, reflectivities decibels against grass.
"""

from typing import NamedTuple

import numpy as np

EO_PIXELS, SAR_PIXELS = 32, 56
CHIP_METRES = 15.0  # ground width of a chip, the same for both sensors
MARGIN_PIXELS = 4  # drawn around a SAR chip, then cut off: what lies there throws shadow inside
EO_OVERSAMPLING, SAR_OVERSAMPLING = 3, 2  # grid cells per pixel, along each axis
SPECKLE_PIXELS = 1.22  # blur of the complex SAR image: the resolution of the radar
CLUTTER_PIXELS = 8.5, 3.5  # size (y, x) of the patches in which the ground's reflectivity varies
CLUTTER_DB = 3.2  # and by how much (standard deviation)
COMPRESSION = 0.185  # grey level = GREY_OF_GRASS * intensity ** COMPRESSION: close to a logarithm
GREY_OF_GRASS = 0.47
THERMAL_NOISE = 0.03  # intensity against grass: what shadows are filled with
GAIN_BELS = 0.1  # spread of the receiver's gain over chips
DEPRESSION = 0.7, 0.06  # mean and spread over scenes
NEIGHBOURS = ("sedan", "SUV", "pickup_truck", "van")  # what may stand beside a vehicle
OFF_CENTRE = 0.4  # metres, how well a vehicle is centred in its chip


class Material(NamedTuple):
    albedo: float  # EO brightness, 0..1; a part's tone is added
    top_db: float  # reflectivity of the upper face
    wall_db: float  # reflectivity of the sides, seen at a slant
    corner_db: float  # the flash where a side that faces the radar meets what it stands on


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


class Part(NamedTuple):
    """An upright block; later parts of a list overwrite earlier ones where they overlap."""

    x: float  # centre, along the vehicle's axis until placed in the chip
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
    return (Part(middle, 0, length, width, top - 0.1, GLASS),
            Part(middle - 0.05, 0, length - 0.9, width, top, PAINT))


_PICKUP = (Part(0, 0, 5.9, 2.0, 1.1, PAINT), *_cabin(1.4, -0.9, 1.7, 1.85),
           Part(-1.9, 0, 1.8, 1.5, 0.7, DARK))

# Noses point to +x. Sizes are those of common vehicles of each kind.
VEHICLES = {
    "sedan": (Part(0, 0, 4.6, 1.75, 0.9, PAINT), *_cabin(0.9, -1.6, 1.5, 1.4)),
    "SUV": (Part(0, 0, 5.0, 2.05, 1.1, PAINT), *_cabin(1.1, -2.4, 1.8, 1.9)),
    "pickup_truck": _PICKUP,
    "van": (Part(0, 0, 5.7, 2.1, 1.2, PAINT), *_cabin(2.3, -2.8, 2.1, 2.4)),
    "box_truck": (Part(2.9, 0, 1.9, 2.1, 2.2, PAINT), Part(3.4, 0, 0.7, 1.9, 1.9, GLASS),
                  Part(-0.9, 0, 5.4, 2.4, 3.3, CARGO)),
    "motorcycle": (Part(0, 0, 2.1, 0.5, 0.9, DARK), Part(-0.2, 0, 0.6, 0.7, 1.4, PAINT),
                   Part(0.5, 0, 0.2, 0.8, 1.1, DARK)),
    "flatbed_truck": (Part(-0.9, 0, 5.8, 2.4, 1.1, DARK), Part(2.9, 0, 1.9, 2.2, 2.4, PAINT),
                      Part(3.3, 0, 0.7, 2.0, 2.2, GLASS), Part(1.9, 0, 0.2, 2.3, 2.0, DARK)),
    "bus": (Part(0, 0, 11.5, 2.5, 3.0, PAINT), Part(5.5, 0, 0.6, 2.4, 2.6, GLASS),
            Part(1.5, 0, 1.6, 1.4, 3.3, DARK), Part(-3.0, 0, 1.6, 1.4, 3.3, DARK)),
    "pickup_truck_w_trailer": (
        *(part._replace(x=part.x + 3.2) for part in _PICKUP),
        Part(-0.3, 0, 1.4, 0.15, 0.5, DARK), Part(-3.4, 0, 4.8, 1.9, 0.9, CARGO),
        Part(-3.4, 0, 4.4, 1.5, 0.6, DARK)),
    "semi_w_trailer": (Part(5.6, 0, 2.4, 2.4, 2.2, PAINT), Part(5.1, 0, 1.4, 2.3, 3.0, PAINT),
                       Part(-1.5, 0, 11.0, 2.5, 3.9, CARGO)),
}
# None of the ten. Their reference class is "unknown".
STRANGERS = {
    "tank": (Part(0, 0, 6.6, 3.4, 1.4, DARK), Part(-0.3, 0, 2.6, 2.2, 2.3, DARK),
             Part(2.8, 0, 4.2, 0.25, 2.0, DARK)),
    "excavator": (Part(-0.8, 0, 3.6, 2.8, 1.1, DARK), Part(-1.0, 0, 3.0, 2.4, 2.8, PAINT),
                  Part(2.2, 0.4, 4.4, 0.5, 3.2, PAINT), Part(4.3, 0.4, 0.9, 1.2, 1.0, DARK)),
    "tractor": (Part(0.7, 0, 2.2, 0.9, 1.5, PAINT), Part(-0.8, 0, 1.5, 1.4, 2.7, GLASS),
                Part(-0.9, 1.0, 1.7, 0.5, 1.7, DARK), Part(-0.9, -1.0, 1.7, 0.5, 1.7, DARK)),
    "aircraft": (Part(0, 0, 8.0, 1.2, 1.8, PAINT), Part(0.9, 0, 1.5, 10.5, 2.2, PAINT),
                 Part(-3.6, 0, 0.9, 3.4, 1.8, PAINT)),
    "containers": (Part(0, 1.4, 6.1, 2.4, 2.6, CARGO), Part(0.4, -1.4, 6.1, 2.4, 5.2, CARGO)),
    "building": (Part(0, 0, 11.0, 8.0, 4.0, CONCRETE), Part(1.5, 1.0, 2.0, 1.5, 5.0, DARK)),
    "clutter": (),
    "empty": (),  # an all-zero chip
}
KINDS = VEHICLES | STRANGERS


def _instance(rng, parts):
    """One individual of a kind: its own size, proportions and paint."""
    along, across, up = rng.normal(1.0, (0.045, 0.04, 0.05))
    light = rng.random() < 0.75
    tones = {PAINT: rng.uniform(0.15, 0.42) if light else rng.uniform(-0.38, -0.2),
             CARGO: rng.uniform(-0.2, 0.4)}
    return [part._replace(x=part.x * along, length=part.length * along, y=part.y * across,
                          width=part.width * across, top=part.top * up,
                          tone=tones.get(part.material, rng.normal(0, 0.04))) for part in parts]


def _place(parts, x, y, heading):
    """Parts given along a vehicle's axis, moved to (x, y) and turned."""
    cos, sin = np.cos(heading), np.sin(heading)
    return [part._replace(x=x + cos * part.x - sin * part.y, y=y + sin * part.x + cos * part.y,
                          heading=heading + part.heading) for part in parts]


def _surroundings(rng):
    """Road, trees, a parked neighbour: what happens to lie around the object, as placed parts."""
    parts = []
    along = rng.uniform(0, np.pi)
    normal = along + np.pi / 2
    if rng.random() < 0.7:
        offset = rng.normal(0, 3)
        parts.append(Part(offset * np.cos(normal), offset * np.sin(normal), 40,
                          rng.uniform(5, 14), 0.0, ASPHALT, along, rng.normal(0, 0.06)))
    for _ in range(rng.poisson(1.0)):
        bearing, distance = rng.uniform(0, 2 * np.pi), rng.uniform(6.5, 10)
        parts.append(Part(distance * np.cos(bearing), distance * np.sin(bearing),
                          *rng.uniform(2, 5, 2), rng.uniform(1, 4), FOLIAGE,
                          rng.uniform(0, np.pi), rng.normal(0, 0.06)))
    if rng.random() < 0.3:
        neighbour = _instance(rng, VEHICLES[NEIGHBOURS[rng.integers(4)]])
        side, shift = rng.choice((-1, 1)) * rng.uniform(4.0, 7.5), rng.normal(0, 3)
        parts += _place(neighbour, side * np.cos(normal) + shift * np.cos(along),
                        side * np.sin(normal) + shift * np.sin(along), along + rng.normal(0, 0.1))
    return parts


def _rasterise(parts, cells, metres):
    """Draw parts on a grid of cells x cells over metres x metres: height, material, tone."""
    centres = (np.arange(cells) + 0.5) * (metres / cells) - metres / 2
    height, tone = np.zeros((cells, cells)), np.zeros((cells, cells))
    material = np.full((cells, cells), GRASS)
    for part in parts:
        reach = np.hypot(part.length, part.width) / 2
        columns = slice(*np.searchsorted(centres, (part.x - reach, part.x + reach)))
        rows = slice(*np.searchsorted(centres, (part.y - reach, part.y + reach)))
        dx, dy = centres[None, columns] - part.x, centres[rows, None] - part.y
        cos, sin = np.cos(part.heading), np.sin(part.heading)
        u, v = (cos * dx + sin * dy) * (2 / part.length), (cos * dy - sin * dx) * (2 / part.width)
        inside = u**2 + v**2 < 1 if part.material == FOLIAGE else np.maximum(abs(u), abs(v)) < 1
        for grid, value in (height, part.top), (material, part.material), (tone, part.tone):
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


def eo_chip(rng, parts):
    """Photograph parts from above. Returns uint8 of shape (32, 32)."""
    cells = EO_PIXELS * EO_OVERSAMPLING
    height, material, tone = _rasterise(parts, cells, CHIP_METRES)
    albedo = np.array([m.albedo for m in MATERIALS])[material] + tone
    albedo += 0.04 * _smooth_noise(rng, cells, 2.0) * (height == 0)
    # A sunray falls `slope` metres per metre of ground; a cell is lit if no ray before is higher.
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


def _wall_scatterers(parts, cell, along=16, up=6):
    """Sides that face the radar as points (x, y, z) with their power, each (points,).

    Every side has a slant return, spread over its height, and a flash at its foot, where side and
    ground form a corner reflector. The flash needs a side that looks straight at the radar.
    """
    tall = [part for part in parts if part.top > 0.3]
    if not tall:
        return (np.empty(0),) * 4
    # Axes of all arrays: part, its 4 sides, steps along the side, steps up the side.
    x, y, length, width, top, material, heading, _ = (
        np.array(column)[:, None, None, None] for column in zip(*tall, strict=True))
    _, _, wall_db, corner_db = np.moveaxis(np.array(MATERIALS)[material], -1, 0)
    turn = np.arange(4)[:, None, None]
    normal = heading + np.pi / 2 * turn
    depth, extent = np.where(turn % 2, (width, length), (length, width))
    reach = depth / 2 + cell  # a cell outside its own block, which would hide it
    step = extent * ((np.arange(along) + 0.5) / along - 0.5)[:, None]
    climb = np.arange(up) / up  # the first point is the foot
    facing = np.maximum(-np.sin(normal), 0)
    area = extent * top * facing / along
    power = area * (10 ** (wall_db / 10) / up + 10 ** (corner_db / 10) * facing**12 * (climb == 0))
    points = np.broadcast_arrays(x + reach * np.cos(normal) - step * np.sin(normal),
                                 y + reach * np.sin(normal) + step * np.cos(normal),
                                 top * climb, power)
    return tuple(array.ravel() for array in points)


def _backscatter(parts, depression, pixels, pixel):
    """Mean intensity in radar geometry, against grass: layover and shadow, (pixels, pixels)."""
    metres, cells, cell = pixels * pixel, pixels * SAR_OVERSAMPLING, pixel / SAR_OVERSAMPLING
    height, material, _ = _rasterise(parts, cells, metres)
    x, y, z, power = (np.concatenate(pair) for pair in zip(
        _surface_scatterers(height, material, cell), _wall_scatterers(parts, cell), strict=True))
    inside = (abs(x) < metres / 2) & (abs(y) < metres / 2)
    x, y, z, power = x[inside], y[inside], z[inside], power[inside]

    # z + y * tan(depression) is the same all along a ray, so the highest value between radar and
    # point tells whether the point lies in shadow.
    slope = np.tan(depression)
    column = ((x + metres / 2) / cell).astype(int)
    row = ((y + metres / 2) / cell).astype(int)
    centres = (np.arange(cells)[:, None] + 0.5) * cell - metres / 2
    horizon = np.maximum.accumulate(height + slope * centres, axis=0)
    lit = z + slope * y > horizon[row, column] - slope * cell
    # What stands high is nearer to the radar than its foot: it is laid over towards smaller y.
    row = np.clip(((y - z * slope + metres / 2) / pixel).astype(int), 0, pixels - 1)
    column = column // SAR_OVERSAMPLING
    image = np.bincount(row * pixels + column, power * lit, pixels**2)
    return image.reshape(pixels, pixels) / pixel**2


def sar_chip(rng, parts, depression):
    """Image parts by radar at a depression angle (radians). Returns uint8 of shape (56, 56)."""
    pixels = SAR_PIXELS + 2 * MARGIN_PIXELS
    clutter_db = CLUTTER_DB * _smooth_noise(rng, pixels, CLUTTER_PIXELS)
    intensity = _backscatter(parts, depression, pixels, CHIP_METRES / SAR_PIXELS)
    intensity = intensity * 10 ** (clutter_db / 10) + THERMAL_NOISE

    # Speckle: many scatterers of random phase in each resolution cell make a complex Gaussian.
    noise = rng.standard_normal((2, pixels, pixels))
    field = _low_pass(np.sqrt(intensity / 2) * (noise[0] + 1j * noise[1]), SPECKLE_PIXELS)
    # The blur leaves 1 / (4 pi sigma^2) of the power of white noise.
    speckled = 4 * np.pi * SPECKLE_PIXELS**2 * abs(field) ** 2 * 10 ** rng.normal(0, GAIN_BELS)
    grey = GREY_OF_GRASS * speckled**COMPRESSION
    return _to_uint8(grey[MARGIN_PIXELS:-MARGIN_PIXELS, MARGIN_PIXELS:-MARGIN_PIXELS])


def _to_uint8(grey):
    return np.round(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def simulate_pair(rng, kind):
    """A new individual of a class at a random heading.

    Args:
        rng: numpy Generator; all randomness comes from it.
        kind: a name in KINDS.
    Returns:
        EO chip (32, 32) and SAR chip (56, 56), both uint8.
    """
    individual = _instance(rng, KINDS[kind])
    pose = *rng.normal(0, OFF_CENTRE, 2), rng.uniform(0, 2 * np.pi)
    parts = _surroundings(rng) + _place(individual, *pose)
    return eo_chip(rng, parts), sar_chip(rng, parts, rng.normal(*DEPRESSION))


def simulate_scene(rng, kinds):
    """Follow the objects of one scene over 6 to 24 frames, interleaved.

    Each object stays the same individual and turns slowly; ground and speckle change.

    Yields:
        (kind, SAR chip uint8 (56, 56)) per frame.
    """
    objects = [(kind, _instance(rng, KINDS[kind])) for kind in kinds]
    headings, rates = rng.uniform(0, 2 * np.pi, len(kinds)), rng.normal(0, 0.07, len(kinds))
    depression = rng.normal(*DEPRESSION)
    for turn in rng.permutation(np.arange(rng.integers(6, 25)) % len(kinds)):
        kind, individual = objects[turn]
        headings[turn] += rates[turn] + rng.normal(0, 0.03)
        if kind == "empty":
            yield kind, np.zeros((SAR_PIXELS, SAR_PIXELS), np.uint8)
            continue
        placed = _place(individual, *rng.normal(0, OFF_CENTRE, 2), headings[turn])
        yield kind, sar_chip(rng, _surroundings(rng) + placed, depression)
