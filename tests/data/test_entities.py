"""Which pairs show the same object: by hand on small chips, by a CSV, and on real chips."""

import time

from data import entities as module
from data.decode import decode
from data.entities import discover, find_entities, read_entities
from data.errors import DataError
from data.layouts import Pairs, find_pairs
from tests.conftest import real_chips

import numpy as np
import pytest
from PIL import Image
from scipy.sparse.csgraph import connected_components

SIX_LARGEST = [97, 96, 78, 55, 37, 18]  # of the 826 real EO chips: sets of near-equal ones


def chips_at(angles, side=8):
    """Chips uint8 [N, side, side] whose correlations are the cosines of the differences of the angles, nearly."""
    rows, columns = np.meshgrid(*[np.cos(np.pi * (np.arange(side) + 0.5) / side)] * 2)
    waves = np.cos(angles)[:, None, None] * rows + np.sin(angles)[:, None, None] * columns
    return np.rint(127 + 60 * waves).astype(np.uint8)


def sets(entities):
    """The sets of chips that have the same entity."""
    return {tuple(np.flatnonzero(entities == entity)) for entity in np.unique(entities)}


def linked(chips):
    """The components of all pairs of chips whose correlation is above 0.8, in NumPy and SciPy."""
    return connected_components(np.corrcoef(chips.reshape(len(chips), -1)) > 0.8)[1]


def same_partition(one, two):
    return sets(one) == sets(two)


def test_chips_above_the_correlation_and_chains_of_them_are_one_entity():
    # The cosine is 0.8 at 0.6435. The first three are a chain, the fourth is not linked to it.
    chips = chips_at(np.array([0.0, 0.6, 1.2, 1.9, 3.1, 3.1]))
    assert sets(discover(chips, np.zeros(6, int))) == {(0, 1, 2), (3,), (4, 5)}
    assert sets(discover(chips, np.array([0, 0, 1, 1, 1, 0]))) == {(0, 1), (2,), (3,), (4,), (5,)}


def test_brightness_and_contrast_do_not_count():
    chip = chips_at(np.array([0.4]))
    darker = np.rint(chip * 0.3 + 10).astype(np.uint8)
    assert sets(discover(np.concatenate((chip, darker)), np.zeros(2, int))) == {(0, 1)}


def test_chips_of_one_level_are_entities_of_their_own():
    chips = np.concatenate((np.zeros((2, 8, 8), np.uint8), np.full((2, 8, 8), 90, np.uint8), chips_at(np.zeros(2))))
    assert sets(discover(chips, np.zeros(6, int))) == {(0,), (1,), (2,), (3,), (4, 5)}


def test_large_chips_are_averaged():
    chips = chips_at(np.array([0.0, 0.5, 1.5, 2.0]), 100)
    assert sets(discover(chips, np.zeros(4, int))) == {(0, 1), (2, 3)}


def survey(objects=40, looks=25, side=16, seed=0):
    """Chips of objects, smooth patterns, each seen several times with noise, in a random order."""
    random = np.random.default_rng(seed)
    patterns = random.normal(size=(objects, 6, 6)).repeat(4, 1).repeat(4, 2)[:, :side, :side]
    looks = np.repeat(patterns, looks, 0) + 0.35 * random.normal(size=(objects * looks, side, side))
    return np.rint(128 + 30 * random.permutation(looks)).clip(0, 255).astype(np.uint8)


def test_sets_are_those_of_all_pairs(monkeypatch):
    chips = survey()
    wanted = linked(chips)
    assert 20 < len(set(wanted)) < 500
    for rows, columns in ((1024, 4096), (64, 96), (7, 1000)):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "COLUMNS_AT_ONCE", columns)
        monkeypatch.setattr(module, "PAIRS_AT_ONCE", rows)
        assert same_partition(discover(chips, np.zeros(len(chips), int)), wanted)


def test_principal_components_find_nearly_all_links_and_add_none(monkeypatch):
    chips = survey()
    wanted = linked(chips)
    monkeypatch.setattr(module, "WORK", 1)
    entities = discover(chips, np.zeros(len(chips), int))
    assert all(len(set(wanted[list(chips)])) == 1 for chips in sets(entities))
    assert len(sets(entities)) - len(set(wanted)) <= 2


@pytest.mark.parametrize("work", [module.WORK, 1])
def test_any_number_of_workers_finds_the_same(monkeypatch, work):
    chips = survey(seed=1)
    monkeypatch.setattr(module, "WORK", work)
    monkeypatch.setattr(module, "ROWS", 50)
    monkeypatch.setattr(module, "COLUMNS_AT_ONCE", 70)
    one, *others = (discover(chips, np.zeros(len(chips), int), workers) for workers in (1, 2, 5))
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("work", [module.WORK, 1])
def test_the_six_largest_sets_of_real_chips(monkeypatch, work):
    """In all pixels, and in principal components as in a class of the challenge's size."""
    monkeypatch.setattr(module, "WORK", work)
    paths = sorted((real_chips("unicorn_pairs") / "test_images_EO").glob("*.png"))
    chips = np.stack([decode(path, 32) for path in paths])
    entities = discover(chips, np.zeros(len(chips), int))
    assert len(chips) == 826 and sorted(np.unique(entities, return_counts=True)[1])[:-7:-1] == SIX_LARGEST


@pytest.fixture
def root(tmp_path):
    """A data set of two classes with the stems 0 to 5 each: the objects 0, 0, 0, 1, 1, 2; SAR chips are flat."""
    chips = chips_at(np.array([0.0, 0.1, 0.2, 1.2, 1.3, 2.5]))
    for name in ("ant", "bee"):
        for number, chip in enumerate(chips):
            for sensor, levels in (("EO", chip), ("SAR", np.full((9, 9), number * 9 + ord(name[0]), np.uint8))):
                (tmp_path / "data" / sensor / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(levels).save(tmp_path / f"data/{sensor}/{name}/{number}.png")
        Image.fromarray(chips[0]).save(tmp_path / f"data/EO/{name}/only_{name}.png")
        Image.fromarray(chips[0]).save(tmp_path / f"data/SAR/{name}/only_{name}.png")
    return tmp_path


FOUND = [0, 0, 0, 1, 1, 2, 0]  # of a class of that data set; the last is only_<class>


def write(root, *rows, header="chip,entity"):
    path = root / "entities.csv"
    path.write_text("\n".join([header, *rows, ""]))
    return path


def test_entities_are_numbered_by_class(root):
    pairs = find_pairs(root / "data")
    entities = find_entities(pairs, root / "chips")
    assert entities.dtype == np.int32 and entities.tolist() == FOUND + [3 + x for x in FOUND]


def test_chips_are_read_as_the_stage_reads_them(root):
    """A chip beyond the range that was surveyed is then no error that GREY_RANGE cannot mend."""
    pairs = find_pairs(root / "data")
    for path in pairs.eo:
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 8).save(path)
    entities = find_entities(pairs, root / "chips", reading=(24, (0.0, 2040.0)))
    assert entities.tolist() == FOUND + [3 + x for x in FOUND]
    (store,) = (path for path in (root / "chips").glob("*.npy") if not path.name.startswith("entities"))
    assert store.name.endswith("-24-0.0_2040.0.npy")


def test_a_csv_overrides_what_was_found(root, capsys):
    pairs = find_pairs(root / "data")
    path = write(root, "ant/0,a", "ant/5.png,a", "bee/0,a", "only_bee,b", "", "ant/1, c d ")
    listed = find_entities(pairs, root / "chips", listed=path)
    assert listed.tolist() == [0, 1, 2, 3, 3, 0, 2, 4, 5, 5, 6, 6, 7, 8]
    assert f"14 pairs show 9 entities; {path} lists 5 of the pairs" in capsys.readouterr().out
    assert find_entities(pairs, root / "chips").tolist() == FOUND + [3 + x for x in FOUND]


def test_names_of_the_release_of_2021(root):
    pairs = Pairs(["x/0/EO_7.png", "x/0/EO_8.png"], ["x/0/SAR_7.png", "x/0/SAR_8.png"], np.zeros(2, int), ("a",), (0,))
    assert read_entities(write(root, "EO_7,a", "SAR_8,b"), pairs) == {0: (0, "a"), 1: (0, "b")}


@pytest.mark.parametrize("rows, message", [
    (["ant/9,a"], "line 2: there is no training chip 'ant/9'; write names such as ant/0"),
    (["ant/0,a", "1,a"], "line 3: several classes have a chip '1'; write <class>/1"),
    (["only_ant,a", "ant/only_ant.png,b"], "line 3: ant/only_ant.png stands there twice; remove one row"),
    (["ant/0,"], "line 2: ant/0 has no entity; write one, or remove the row"),
    (["ant/0"], "line 2: 1 cells where the header has 2"),
])  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(root, rows, message):
    path = write(root, *rows)
    with pytest.raises(DataError) as error:
        find_entities(find_pairs(root / "data"), root / "chips", listed=path)
    assert f"{path}, {message}" in str(error.value)


def test_a_file_without_the_columns(root):
    pairs = find_pairs(root / "data")
    with pytest.raises(DataError, match="has no column entity; a list of entities starts with the line chip,entity"):
        find_entities(pairs, root / "chips", listed=write(root, header="chip,vehicle"))
    with pytest.raises(DataError, match="nowhere.csv is not a file"):
        find_entities(pairs, root / "chips", listed="nowhere.csv")


def test_they_are_computed_once_for_the_same_pixels_and_labels(root, monkeypatch):
    pairs, calls = find_pairs(root / "data"), []
    monkeypatch.setattr(module, "discover", lambda *arguments: calls.append(1) or discover(*arguments))
    first = find_entities(pairs, root / "chips")
    assert find_entities(pairs, root / "chips").tolist() == first.tolist() and len(calls) == 1
    # Neither half a file nor one that is left of a process that was killed is read.
    (path,) = (root / "chips").glob("entities-*.npy")
    path.with_suffix(".part").write_bytes(b"x")
    path.write_bytes(path.read_bytes()[:-8])
    assert find_entities(pairs, root / "chips").tolist() == first.tolist() and len(calls) == 2
    for name, value in (("CORRELATION", 0.5), ("LEAST", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            find_entities(pairs, root / "chips")
    assert len(calls) == 4
    Image.fromarray(chips_at(np.array([2.5]))[0]).save(root / "data/EO/ant/0.png")
    assert find_entities(find_pairs(root / "data"), root / "chips").tolist() != first.tolist() and len(calls) == 5


def test_few_files_are_kept(root, monkeypatch):
    pairs = find_pairs(root / "data")
    monkeypatch.setattr(module, "KEPT", 2)
    for correlation in (0.5, 0.6, 0.7):
        monkeypatch.setattr(module, "CORRELATION", correlation)
        find_entities(pairs, root / "chips")
        time.sleep(0.01)
    assert len(list((root / "chips").glob("entities-*.npy"))) == 2


def test_unreadable_chips_are_entities_of_their_own(root):
    for number in (0, 1):
        (root / f"data/EO/ant/{number}.png").write_bytes(b"x")
    pairs = find_pairs(root / "data")
    with pytest.raises(DataError, match="2 files are no readable images"):
        find_entities(pairs, root / "chips")
    assert find_entities(pairs, root / "chips", skip_bad=True)[:7].tolist() == [0, 1, 2, 3, 3, 4, 2]
