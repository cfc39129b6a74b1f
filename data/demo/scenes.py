"""What the demo set shows: a survey for training, flights for validation and test.

The **survey** passes again and again over parked vehicles, while the radar circles. An individual comes once
in each of many frames: nearly unchanged in the EO chip, from another side and with fresh speckle in the SAR
chip. The **flights** follow one object at a time, a group of SAR chips that see it from nearly one side.
"""

from typing import NamedTuple

from data.demo.objects import VEHICLES, individual
from data.demo.simulator import SAR_PIXELS, Flight, eo_chip, eo_surface, new_site, sar_chip

import numpy as np

FLIGHT_SHIFT = 1.0  # how much the radar of the flights differs from that of the survey: 0 = not at all
# The differences at FLIGHT_SHIFT 1: radians (mean and standard deviation over groups), bels and dB.
DEPRESSION_SHIFT, GAIN_SHIFT, CLUTTER_SHIFT = (-0.15, 0.04), 0.1, 0.8
EMPTY_SHARE = 2 / 826  # of the SAR chips, which are all zero; as in the real test set of 2022

FRAMES = 40  # of the survey
PAIRS_EACH = 30  # show one parked individual, at most
RAREST = 3  # individuals that a class has at least
MOVING_SHARE, MOVING_FRAMES = 0.03, 4  # of the pairs, which show vehicles that move; each is in so many frames
LOOK_STEP = 0.44  # radians that the radar circles from frame to frame
SUN = 0.9, 1.3  # at the first and the last frame: metres that a ray falls per metre of ground

ALONG_X = 0.6  # share of the objects that stand along x, as the bays and streets of the real set do
MOVING_GROUPS = 0.5  # share of the groups whose object moves, so that its surroundings change
TURN, TURN_NOISE = 0.05, 0.03  # radians a chip, standard deviations: a group's steady turn, and what is added
# The reference of the 2026 validation set: kind -> (chips, groups).
VALIDATION = {
    "sedan": (77, 72), "SUV": (77, 24), "pickup_truck": (77, 15), "van": (77, 17), "box_truck": (77, 23),
    "motorcycle": (77, 16), "flatbed_truck": (77, 5), "bus": (77, 10), "pickup_truck_w_trailer": (77, 27),
    "semi_w_trailer": (77, 14), "van_w_trailer": (77, 14), "SUV_w_trailer": (77, 11), "sedan_w_trailer": (77, 19),
    "flatbed_truck_w_trailer": (77, 13), "dump_truck": (77, 4), "plane": (77, 11), "dismount": (77, 23),
    "other": (77, 15), "bicycle": (24, 8), "semi": (7, 2),
}  # fmt: skip
LARGEST = 0.6  # of a kind's chips in one group
SIZE_SPREAD = 1.5  # standard deviation of the logarithm of a group's share of its kind's chips
# Of the gaps between numbers within a group and between groups, as measured on the same reference.
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
WITHIN_GAPS = (1, 1, 2, 5, 14, 51, 100)
BETWEEN_GAPS = (101, 113, 170, 451, 8_287, 106_739, 400_000)
MIXED = 300  # groups for each one that runs on into the next, so that the two look like one


class Visits(NamedTuple):
    """An individual of the survey: the frames that it is in, and the numbers of its pairs."""

    kind: str
    name: str
    moving: bool
    frames: list
    numbers: list


class Group(NamedTuple):
    """One object of a flight, and the numbers of its chips."""

    kind: str
    numbers: list


def plan_survey(rng, train_counts):
    """The individuals of the survey. Numbers run through the objects of one frame after the other.

    Args:
        rng: numpy Generator.
        train_counts: class name -> number of pairs.

    Returns:
        List of `Visits`.
    """
    plan = []
    for kind, count in train_counts.items():
        moving = int(MOVING_SHARE * count) // MOVING_FRAMES
        parked = count - moving * MOVING_FRAMES
        individuals = min(parked, max(RAREST, -(-count // PAIRS_EACH)))
        sizes = [len(part) for part in np.array_split(range(parked), individuals)] + [MOVING_FRAMES] * moving
        for i, size in enumerate(sizes):
            first = int(rng.integers(FRAMES - size + 1))
            plan.append(Visits(kind, f"{kind}_{i + 1}", i >= individuals, list(range(first, first + size)), []))
    order = rng.permutation(len(plan)).tolist()  # along the frame
    seen = sorted((frame, order[i], i) for i, visits in enumerate(plan) for frame in visits.frames)
    for number, (_, _, i) in enumerate(seen):
        plan[i].numbers.append(number)
    return plan


def plan_groups(rng, names, chips=1.0, groups=1.0):
    """The groups of the flights of a validation or test set.

    Args:
        rng: numpy Generator.
        names: which of the ten classes to show, besides all unknown kinds.
        chips, groups: how many, relative to the validation set of 2026.

    Returns:
        List of `Group`, in the order of their numbers.
    """
    objects = []
    for kind, (kind_chips, kind_groups) in VALIDATION.items():
        if kind in names or kind not in VEHICLES:
            kind_chips = max(1, round(chips * kind_chips))
            # Not all groups hold one chip alone: of the sedans 72 of 77 at most.
            kind_groups = max(1, min(round(groups * kind_groups), int(0.94 * kind_chips)))
            objects += [(kind, size) for size in _group_sizes(rng, kind_chips, kind_groups)]
    rng.shuffle(objects)
    mixed = rng.choice(np.arange(1, len(objects)), len(objects) // MIXED, replace=False)
    number, plan = int(rng.integers(16_000_000, 17_000_000)), []
    for i, (kind, size) in enumerate(objects):
        start = _gaps(rng, WITHIN_GAPS if i in mixed else BETWEEN_GAPS, 1)
        numbers = number + np.cumsum(np.concatenate([start, _gaps(rng, WITHIN_GAPS, int(size) - 1)]))
        plan.append(Group(str(kind), numbers.tolist()))
        number = int(numbers[-1])
    return plan


def _group_sizes(rng, chips, groups):
    """Sizes of the groups that share so many chips: many of one chip, few large ones."""
    while True:
        share = rng.lognormal(0, SIZE_SPREAD, groups)
        sizes = 1 + rng.multinomial(chips - groups, share / share.sum())
        if groups == 1 or sizes.max() <= max(LARGEST * chips, -(-chips // groups)):
            return sizes.tolist()


def _gaps(rng, quantiles, size):
    """Gaps between numbers, int64 [size], whose logarithm is interpolated between quantiles at SHARES."""
    return np.exp(np.interp(rng.random(size), SHARES, np.log(quantiles))).round().astype(int)


def survey_pairs(rng, visits):
    """Yield the EO chip, uint8 [32, 32], and the SAR chip, uint8 [56, 56], of each visit to an individual."""
    vehicle, heading, site = individual(rng, visits.kind), _heading(rng), None
    for frame in visits.frames:
        if site is None or visits.moving:
            heading += rng.normal(0, 0.5)
            site = new_site(rng, vehicle, heading)
            surface = eo_surface(rng, site)
        time = frame / FRAMES
        brightness = site.exposure * (0.9 + 0.2 * time) * (1 + rng.normal(0, 0.02))
        eo = eo_chip(rng, surface, brightness, SUN[0] + time * (SUN[1] - SUN[0]))
        yield eo, _sar_chip(rng, site, LOOK_STEP * frame + rng.normal(0, 0.05), Flight())


def group_chips(rng, group, shift=FLIGHT_SHIFT):
    """Yield the SAR chips, uint8 [56, 56], of a group.

    Args:
        rng: numpy Generator.
        group: Group.
        shift: how much the flight differs from the survey; 0 = not at all, 1 = as in the demo set.
    """
    vehicle, site = individual(rng, group.kind), None
    standard = Flight()
    flight = Flight(
        standard.depression + shift * rng.normal(*DEPRESSION_SHIFT),
        standard.gain + shift * GAIN_SHIFT, standard.clutter + shift * CLUTTER_SHIFT,
    )  # fmt: skip
    moving = rng.random() < MOVING_GROUPS
    heading, look, turn = _heading(rng), rng.uniform(0, 2 * np.pi), rng.normal(0, TURN)
    for _ in group.numbers:
        if site is None or moving:
            site = new_site(rng, vehicle, heading)
        yield _sar_chip(rng, site, look, flight)
        look += turn + rng.normal(0, TURN_NOISE)


def _heading(rng):
    """The heading of an object, radians."""
    if rng.random() < ALONG_X:
        return np.pi * rng.integers(2) + rng.normal(0, 0.15)
    return rng.uniform(0, 2 * np.pi)


def _sar_chip(rng, site, look, flight):
    """The SAR chip of a site, or now and then an empty one."""
    if rng.random() < EMPTY_SHARE:
        return np.zeros((SAR_PIXELS, SAR_PIXELS), np.uint8)
    return sar_chip(rng, site, look, flight)
