"""The simulator: grey levels like real ones, radar geometry, individuals and flights."""

from benchmarks.contact_sheet import grey_statistics, read_chips, real_pairs
from data.demo import objects, simulator
from data.demo.scenes import Group, Visits, group_chips, plan_survey, survey_pairs
from data.demo.writer import TRAIN_COUNTS
from tests.conftest import real_chips

import numpy as np
import pytest

TOLERANCE = 0.15


def flat_site(blocks):
    """Blocks on asphalt."""
    return simulator.Site(blocks, objects.ASPHALT, 1.0)


def mean_chip(blocks, look=0.0, chips=20, flight=simulator.Flight()):  # noqa: B008 - it is a tuple
    """Mean SAR chip over fresh speckle."""
    site = flat_site(blocks)
    return np.mean([simulator.sar_chip(np.random.default_rng(i), site, look, flight) for i in range(chips)], 0)


@pytest.fixture(scope="module")
def survey():
    """The survey of the default demo set: two pairs of each individual, and whose they are.

    Returns:
        EO chips (N, 32, 32) and SAR chips (N, 56, 56), 0..255, the position of the individual in the plan (N,),
        and whether it moves (N,).
    """
    chips, owner, moving = [], [], []
    for i, visits in enumerate(plan_survey(np.random.default_rng([0, 1]), TRAIN_COUNTS)):
        few = visits._replace(frames=visits.frames[:: -(-len(visits.frames) // 2)])
        pairs = list(survey_pairs(np.random.default_rng([0, 1, i + 1]), few))
        chips += pairs
        owner += [i] * len(pairs)
        moving += [visits.moving] * len(pairs)
    eo, sar = (np.stack(side) for side in zip(*chips, strict=True))
    return eo, sar, np.array(owner), np.array(moving)


@pytest.mark.slow
@pytest.mark.parametrize("sensor, side", [("EO", 32), ("SAR", 56)])
def test_grey_levels_match_the_real_chips(survey, sensor, side):
    column = ("EO", "SAR").index(sensor)
    real = grey_statistics(read_chips([pair[column] for pair in real_pairs(real_chips("unicorn_pairs"))], side))
    ours = survey[column][survey[column].any((1, 2))] / 255
    measured = grey_statistics(ours)
    unlike = {name for name in real if measured[name] != pytest.approx(real[name], rel=TOLERANCE)}
    # Farther apart than 4 pixels, and for the darkest percent of the EO pixels, the demo set is not that near.
    assert {name for name in unlike if not name.endswith((" 6 px", " 8 px"))} <= {"percentile 1"}


def test_an_individual_looks_alike_in_eo_and_unlike_others(survey):
    eo, _, owner, moving = survey
    vectors = eo.reshape(len(eo), -1) - eo.mean((1, 2))[:, None]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    correlation = vectors @ vectors.T
    same = owner[:, None] == owner
    parked = correlation[(same & ~moving & ~np.eye(len(eo), dtype=bool))]
    assert np.mean(parked > 0.85) > 0.9
    assert np.mean(correlation[~same] < 0.6) > 0.98 and np.mean(correlation[~same] < 0.8) > 0.999


def test_the_radar_sees_a_parked_vehicle_from_another_side_in_every_frame():
    visits = Visits("bus", "bus_1", False, [0, 7], [0, 1])
    heading = np.random.default_rng(5)
    first, second = (sar for _, sar in survey_pairs(heading, visits))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.5


def test_a_tall_block_is_laid_over_towards_the_radar_and_throws_its_shadow_away_from_it():
    block = [objects.Block(0, 0, 6, 6, 3, objects.CONCRETE)]
    chip = mean_chip(block)
    centre, ground = chip[:, 26:30].mean(1), chip[:, :4].mean()
    metre = 56 / simulator.CHIP_METRES
    near, far = 28 - 3 * metre, 28 + 3 * metre  # the block's sides
    assert centre[int(near - 2 * metre) : int(near)].mean() > 1.1 * ground
    assert centre[int(far + metre / 2) : int(far + 2.5 * metre)].mean() < 0.8 * ground


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_the_ground_stays_where_it_is_when_the_radar_looks_from_another_side(quarters):
    """A look turned by 90 degrees at a block turned with it gives the chip turned by 90 degrees."""
    block = [objects.Block(1.5, -2, 6, 3, 2.5, objects.CONCRETE)]
    turn = quarters * np.pi / 2
    turned = mean_chip(objects.at_pose(block, 0, 0, turn), look=turn)
    # Angles run from x (columns) to y (rows, downwards), so a positive turn is clockwise in the picture.
    assert np.corrcoef(turned.ravel(), np.rot90(mean_chip(block), -quarters).ravel())[0, 1] > 0.8
    assert np.corrcoef(turned.ravel(), mean_chip(block).ravel())[0, 1] < 0.5


def test_turning_does_not_change_the_statistics_of_speckle():
    spread = [mean_chip([], look, chips=1).std() for look in (0.0, 0.4, np.pi / 4)]
    assert spread == pytest.approx([spread[0]] * 3, rel=0.03)


def test_a_side_flashes_when_it_faces_the_radar():
    bus = list(objects.VEHICLES["bus"])

    def bright_pixels(look):
        site = flat_site(bus)
        chips = [simulator.sar_chip(np.random.default_rng(i), site, look, simulator.Flight()) for i in range(20)]
        return np.mean(np.array(chips) > 200)

    assert bright_pixels(0.0) > 2 * bright_pixels(0.6)


@pytest.mark.slow
def test_the_flight_shift_changes_brightness_clutter_and_the_depression():
    group = Group("sedan", list(range(6)))

    def chips(shift):
        return np.stack([chip for i in range(20) for chip in group_chips(np.random.default_rng(i), group, shift)])

    survey, flight = chips(0.0), chips(1.0)
    assert flight.mean() > 1.01 * survey.mean()
    assert flight.std((1, 2)).mean() > 1.02 * survey.std((1, 2)).mean()

    box = [objects.Block(0, 0, 6, 6, 1.5, objects.CONCRETE)]
    lengths = []  # of the shadow, in rows
    for depression in (0.70, 0.55):
        profile = mean_chip(box, flight=simulator.Flight(depression))[:, 20:36].mean(1)
        lengths.append(np.sum(profile < 0.8 * np.median(profile)))
    assert 1.2 < lengths[1] / lengths[0] < 1.6  # tan(0.70) / tan(0.55) = 1.37


def test_every_kind_can_be_simulated():
    for kind in objects.KINDS:
        rng = np.random.default_rng(0)
        for chip in group_chips(rng, Group(kind, [1, 2])):
            assert chip.shape == (56, 56) and chip.dtype == np.uint8
