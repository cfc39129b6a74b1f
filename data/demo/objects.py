"""What lies on the ground: vehicles, the challenge's unknown objects, and their surroundings.

Everything is a list of upright `Block`s, each with a pose, a height and a material. Lengths are metres,
angles radians, reflectivities decibels against grass.
"""

from typing import NamedTuple

import numpy as np

OFF_CENTRE = 0.4  # m, standard deviation of an object's offset from the centre of its chip
STALL = 3.0  # m, width of a parking bay


class Material(NamedTuple):
    albedo: float  # EO brightness, 0..1; a block's tone is added
    top_db: float  # reflectivity of the upper face
    wall_db: float  # reflectivity of the sides, seen at a slant
    corner_db: float  # extra return where a side that faces the radar meets the ground (corner reflector)


MATERIALS = (
    Material(0.27, 0.0, 0.0, -30.0),
    Material(0.22, -5.0, -5.0, -30.0),
    Material(0.16, 2.0, 2.0, -30.0),
    Material(0.50, -2.0, 2.0, 8.0),
    Material(0.55, -4.0, 2.0, 10.0),
    Material(0.10, -5.0, 0.0, 0.0),
    Material(0.14, 1.0, 1.0, 5.0),
    Material(0.55, 4.0, 2.0, 9.0),
    Material(0.55, -5.0, -5.0, -30.0),
)
GRASS, ASPHALT, FOLIAGE, CONCRETE, PAINT, GLASS, DARK, CARGO, MARKING = range(len(MATERIALS))


class Block(NamedTuple):
    """An upright block; later blocks of a list overwrite earlier ones where they overlap."""

    x: float  # centre; along the object's axis, or in the chip after `at_pose`
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
    return (
        Block(middle, 0, length, width, top - 0.1, GLASS),
        Block(middle - 0.05, 0, length - 0.9, width, top, PAINT),
    )


def _with_trailer(vehicle, rear, length):
    """A vehicle whose rear end is at x = -rear, with a flat trailer of this length; centred."""
    shift, hitch = (length + 1.2) / 2, 1.2
    middle = shift - rear - hitch - length / 2
    return (
        *(block._replace(x=block.x + shift) for block in vehicle),
        Block(middle + (length + hitch) / 2, 0, 1.4, 0.15, 0.5, DARK),
        Block(middle, 0, length, 1.9, 0.9, CARGO),
        Block(middle, 0, length - 0.4, 1.5, 0.6, DARK),
    )


# Noses point to +x. Sizes are those of common vehicles of each kind.
VEHICLES = {
    "sedan": (Block(0, 0, 4.6, 1.75, 0.9, PAINT), *_cabin(0.9, -1.6, 1.5, 1.4)),
    "SUV": (Block(0, 0, 5.0, 2.05, 1.1, PAINT), *_cabin(1.1, -2.4, 1.8, 1.9)),
    "pickup_truck": (
        Block(0, 0, 5.9, 2.0, 1.1, PAINT), *_cabin(1.4, -0.9, 1.7, 1.85), Block(-1.9, 0, 1.8, 1.5, 0.7, DARK),
    ),
    "van": (Block(0, 0, 5.7, 2.1, 1.2, PAINT), *_cabin(2.3, -2.8, 2.1, 2.4)),
    "box_truck": (
        Block(2.9, 0, 1.9, 2.1, 2.2, PAINT), Block(3.4, 0, 0.7, 1.9, 1.9, GLASS), Block(-0.9, 0, 5.4, 2.4, 3.3, CARGO),
    ),
    "motorcycle": (
        Block(0, 0, 2.1, 0.5, 0.9, DARK), Block(-0.2, 0, 0.6, 0.7, 1.4, PAINT), Block(0.5, 0, 0.2, 0.8, 1.1, DARK),
    ),
    "flatbed_truck": (
        Block(-0.9, 0, 5.8, 2.4, 1.1, DARK), Block(2.9, 0, 1.9, 2.2, 2.4, PAINT), Block(3.3, 0, 0.7, 2.0, 2.2, GLASS),
        Block(1.9, 0, 0.2, 2.3, 2.0, DARK),
    ),
    "bus": (
        Block(0, 0, 11.5, 2.5, 3.0, PAINT), Block(5.5, 0, 0.6, 2.4, 2.6, GLASS), Block(1.5, 0, 1.6, 1.4, 3.3, DARK),
        Block(-3.0, 0, 1.6, 1.4, 3.3, DARK),
    ),
}  # fmt: skip
VEHICLES |= {
    "pickup_truck_w_trailer": _with_trailer(VEHICLES["pickup_truck"], 2.95, 4.8),
    "semi_w_trailer": (
        Block(5.6, 0, 2.4, 2.4, 2.2, PAINT), Block(5.1, 0, 1.4, 2.3, 3.0, PAINT), Block(-1.5, 0, 11.0, 2.5, 3.9, CARGO),
    ),
}  # fmt: skip
# None of the ten classes: the kinds that the challenge's reference of 2026 names.
UNKNOWN = {
    "van_w_trailer": _with_trailer(VEHICLES["van"], 2.85, 4.5),
    "SUV_w_trailer": _with_trailer(VEHICLES["SUV"], 2.5, 4.2),
    "sedan_w_trailer": _with_trailer(VEHICLES["sedan"], 2.3, 3.6),
    "flatbed_truck_w_trailer": _with_trailer(VEHICLES["flatbed_truck"], 3.8, 4.6),
    "dump_truck": (
        Block(2.7, 0, 2.0, 2.4, 2.6, PAINT), Block(3.3, 0, 0.7, 2.1, 2.2, GLASS), Block(-1.0, 0, 4.8, 2.5, 2.4, CARGO),
        Block(-1.0, 0, 4.2, 2.0, 1.4, DARK),
    ),
    "plane": (
        Block(0, 0, 8.0, 1.2, 1.8, PAINT), Block(0.9, 0, 1.5, 10.5, 2.2, PAINT), Block(-3.6, 0, 0.9, 3.4, 1.8, PAINT),
    ),
    "dismount": (Block(0, 0, 0.5, 0.6, 1.75, DARK),),  # a person on foot
    "bicycle": (Block(0, 0, 1.7, 0.35, 0.9, DARK), Block(-0.1, 0, 0.4, 0.5, 1.7, PAINT)),
    "semi": (
        Block(1.6, 0, 2.4, 2.4, 2.2, PAINT), Block(1.1, 0, 1.4, 2.3, 3.0, PAINT), Block(-1.5, 0, 3.8, 1.0, 1.0, DARK),
    ),
    "other": (),  # one of OTHERS
}  # fmt: skip
OTHERS = {
    "tank": (
        Block(0, 0, 6.6, 3.4, 1.4, DARK), Block(-0.3, 0, 2.6, 2.2, 2.3, DARK), Block(2.8, 0, 4.2, 0.25, 2.0, DARK),
    ),
    "excavator": (
        Block(-0.8, 0, 3.6, 2.8, 1.1, DARK), Block(-1.0, 0, 3.0, 2.4, 2.8, PAINT),
        Block(2.2, 0.4, 4.4, 0.5, 3.2, PAINT), Block(4.3, 0.4, 0.9, 1.2, 1.0, DARK),
    ),
    "tractor": (
        Block(0.7, 0, 2.2, 0.9, 1.5, PAINT), Block(-0.8, 0, 1.5, 1.4, 2.7, GLASS),
        Block(-0.9, 1.0, 1.7, 0.5, 1.7, DARK), Block(-0.9, -1.0, 1.7, 0.5, 1.7, DARK),
    ),
    "containers": (Block(0, 1.4, 6.1, 2.4, 2.6, CARGO), Block(0.4, -1.4, 6.1, 2.4, 5.2, CARGO)),
    "building": (Block(0, 0, 11.0, 8.0, 4.0, CONCRETE), Block(1.5, 1.0, 2.0, 1.5, 5.0, DARK)),
    "clutter": (),
}  # fmt: skip
KINDS = VEHICLES | UNKNOWN
NEIGHBOURS = ("sedan", "sedan", "SUV", "pickup_truck", "van")  # what is parked beside an object


def individual(rng, kind):
    """One individual of a kind (a name in KINDS), as blocks: its own size, proportions and paint."""
    blocks = OTHERS[str(rng.choice(list(OTHERS)))] if kind == "other" else KINDS[kind]
    along, across, up = rng.normal(1.0, (0.045, 0.04, 0.05))
    light = rng.random() < 0.6
    tones = {
        PAINT: rng.uniform(0.1, 0.6) if light else rng.uniform(-0.45, -0.2),
        CARGO: rng.uniform(-0.2, 0.5),
    }
    return [
        block._replace(
            x=block.x * along, length=block.length * along, y=block.y * across, width=block.width * across,
            top=block.top * up, tone=tones.get(block.material, rng.normal(0, 0.04)),
        )
        for block in blocks
    ]  # fmt: skip


def at_pose(blocks, x, y, heading):
    """Blocks given along an object's axis, turned by `heading` and moved to (x, y)."""
    cos, sin = np.cos(heading), np.sin(heading)
    return [
        block._replace(
            x=x + cos * block.x - sin * block.y, y=y + sin * block.x + cos * block.y, heading=heading + block.heading
        )
        for block in blocks
    ]


def surroundings(rng, width):
    """What surrounds an object `width` metres wide that stands along +x: a car park, a street or open ground.

    Returns:
        The material of the ground and blocks, to be turned with the object by `at_pose`.
    """
    ground, blocks = ((ASPHALT, _car_park), (GRASS, _street), (GRASS, _open_ground))[rng.choice(3, p=(0.5, 0.3, 0.2))]
    return ground, blocks(rng, width)


def _car_park(rng, width):
    """Painted bays side by side, some with parked vehicles; beyond the bays an aisle, or a strip of grass."""
    bay = max(STALL, width + 1.0)
    lines, end = [], rng.choice((-1, 1))
    full = rng.uniform(0, 0.7)
    painted = rng.random() < 0.8
    for side in (-2, -1, 0, 1):
        lines += [Block(0, (side + 0.5) * bay, 5.8, 0.25, 0.0, MARKING)] * painted
    if rng.random() < 0.5:  # the end of the bays
        material, reach = rng.choice((MARKING, GRASS, CONCRETE)), rng.uniform(0.4, 5)
        lines.append(Block(end * (3.0 + reach / 2), 0, reach, 40, 0.0, int(material), tone=rng.normal(0, 0.08)))
    cars = [(0, y) for y in (-2, -1, 1, 2)] + [(-end, y) for y in (-1, 0, 1)]
    for row, side in cars:
        if rng.random() < full:
            x, y = row * rng.uniform(6.5, 7.5) + rng.normal(0, 0.3), side * bay + rng.normal(0, 0.15)
            heading = np.pi * rng.integers(2) + rng.normal(0, 0.04)
            lines += at_pose(individual(rng, NEIGHBOURS[rng.integers(5)]), x, y, heading)
    return lines


def _street(rng, width):
    """A street along the object, with a kerb, trees and perhaps a building beside it."""
    side, edge = rng.choice((-1, 1)), rng.uniform(1.5, 3.0) + width / 2
    across = rng.uniform(6, 12)
    middle = side * (edge - across / 2)
    blocks = [Block(0, middle, 40, across, 0.0, ASPHALT, tone=rng.normal(0, 0.05))]
    if rng.random() < 0.6:
        blocks.append(Block(0, side * (edge + 0.3), 40, rng.uniform(0.4, 1.6), 0.1, CONCRETE, tone=rng.normal(0, 0.1)))
    if rng.random() < 0.5:
        blocks.append(Block(0, middle + rng.normal(0, 0.5), 40, 0.25, 0.0, MARKING))
    if rng.random() < 0.3:
        deep = rng.uniform(4, 10)
        blocks.append(Block(rng.normal(0, 5), side * (edge + 2.5 + deep / 2), rng.uniform(6, 20), deep,
                            rng.uniform(3, 6), CONCRETE, tone=rng.normal(0, 0.2)))  # fmt: skip
    if rng.random() < 0.3:
        y = middle - side * rng.uniform(1.0, 3.0) - side * width / 2
        blocks += at_pose(individual(rng, NEIGHBOURS[rng.integers(5)]), rng.normal(0, 5), y, np.pi * rng.integers(2))
    return blocks + _trees(rng, 1.0)


def _open_ground(rng, width):
    """Grass or concrete with trees, crossed by a path."""
    blocks = []
    if rng.random() < 0.5:
        blocks.append(Block(*rng.normal(0, 3, 2), 40, rng.uniform(3, 14), 0.0, int(rng.choice((ASPHALT, CONCRETE))),
                            rng.uniform(0, np.pi), rng.normal(0, 0.06)))  # fmt: skip
    return blocks + _trees(rng, 1.5)


def _trees(rng, number):
    """About `number` trees around the object."""
    trees = []
    for _ in range(rng.poisson(number)):
        bearing, distance = rng.uniform(0, 2 * np.pi), rng.uniform(6, 10)
        x, y, size = distance * np.cos(bearing), distance * np.sin(bearing), rng.uniform(2, 5, 2)
        trees.append(Block(x, y, *size, rng.uniform(1, 5), FOLIAGE, rng.uniform(0, np.pi), rng.normal(0, 0.06)))
    return trees
