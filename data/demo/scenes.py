"""The scenes of the demo set: which objects they hold, and the SAR chips of their frames."""

from data.demo.simulator import (
    DEPRESSION,
    KINDS,
    OFF_CENTRE,
    SAR_PIXELS,
    at_pose,
    individual,
    sar_chip,
    surroundings,
)

import numpy as np

OOD_SHARE = 0.28  # of the objects in validation and test scenes
# A kind comes about as often as it stands here: kinds are dealt as from a deck of cards.
STRANGER_DECK = ("tank",) * 3 + ("aircraft",) * 3 + ("building",) * 3 + ("excavator",) * 2 + (
    "tractor", "containers", "clutter", "empty")


def plan_scenes(rng, names, scenes):
    """Choose the objects of each scene.

    Args:
        rng: numpy Generator; all randomness comes from it.
        names: class names to draw from.
        scenes: number of scenes.

    Returns:
        For each scene a list with the kinds of its one, two or three objects.
    """
    sizes = rng.permutation([1 if 5 * i < 3 * scenes else 2 + i % 2 for i in range(scenes)])
    objects = int(sizes.sum())
    strangers = max(1, round(OOD_SHARE * objects)) if objects else 0
    kinds = _deal(rng, names, objects - strangers) + _deal(rng, STRANGER_DECK, strangers)
    kinds = iter(rng.permutation(kinds).tolist())
    return [[next(kinds) for _ in range(size)] for size in sizes]


def _deal(rng, deck, count):
    """`count` names from `deck`, which is shuffled again whenever it is used up: nearly even counts."""
    rounds = [rng.permutation(deck) for _ in range(-(-count // len(deck)))]
    return [str(name) for name in np.concatenate(rounds)[:count]] if count else []


def simulate_scene(rng, kinds):
    """Follow the objects of one scene over 6 to 24 frames, interleaved.

    Each object stays the same individual and turns slowly; ground and speckle change.

    Args:
        rng: numpy Generator; all randomness comes from it.
        kinds: names in KINDS, one for each object.

    Yields:
        (kind, SAR chip uint8 [56, 56]) per frame.
    """
    objects = [(kind, individual(rng, KINDS[kind])) for kind in kinds]
    headings, rates = rng.uniform(0, 2 * np.pi, len(kinds)), rng.normal(0, 0.07, len(kinds))
    depression = rng.normal(*DEPRESSION)
    for number in rng.permutation(np.arange(rng.integers(6, 25)) % len(kinds)):
        kind, blocks = objects[number]
        headings[number] += rates[number] + rng.normal(0, 0.03)
        if kind == "empty":
            yield kind, np.zeros((SAR_PIXELS, SAR_PIXELS), np.uint8)
            continue
        blocks = at_pose(blocks, *rng.normal(0, OFF_CENTRE, 2), headings[number])
        yield kind, sar_chip(rng, surroundings(rng) + blocks, depression)
