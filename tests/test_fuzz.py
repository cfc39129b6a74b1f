"""Whatever bytes a file holds, a reader takes it or raises one of the declared errors."""

import io
import runpy

from data.decode import survey
from data.errors import DataError
from data.labelled import find_reference, read_labelled
from data.store import decode
from models.backbone import BackboneError, Classifier
from tests.conftest import ROOT
from utils.run.checkpoint import KEYS, build_model, load_checkpoint, save_checkpoint
from utils.run.settings import CheckpointError, SettingError, read_settings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

pytestmark = pytest.mark.slow
bounded = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LEVELS = np.arange(12 * 9, dtype=np.uint8).reshape(12, 9)


def damaged(*files):
    """One of the files, with bytes changed, cut off or added; or bytes of any kind."""
    changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8)

    def damage(file, changes, share, added):
        file = bytearray(file)
        for place, byte in changes:
            file[int(place**3 * len(file))] = byte  # more of them where the headers are
        return bytes(file[: int(share * len(file))]) + added

    share_left = st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1])
    return st.builds(damage, st.sampled_from(files), changes, share_left, st.binary(max_size=4)) | st.binary()


def saved(kind, mode, **options):
    file = io.BytesIO()
    Image.fromarray(LEVELS).convert(mode).save(file, kind, **options)
    return file.getvalue()


IMAGES = [
    saved(kind, mode)
    for kind in ("PNG", "BMP", "GIF", "TIFF", "JPEG", "WEBP")
    for mode in (("L", "RGB") if kind in ("JPEG", "WEBP") else ("L", "P", "RGB"))
]
IMAGES += [saved("TIFF", "L", compression="tiff_lzw"), saved("TIFF", "I;16"), saved("PNG", "LA")]


@settings(bounded, max_examples=200)
@given(content=damaged(*IMAGES))
@example(IMAGES[0][:36] + b"\x04" + IMAGES[0][37:])  # SyntaxError in Pillow
@example(IMAGES[0].replace(b"\0\0\0\rIHDR", b"\0\0\0\x0cIHDR"))  # ValueError
@example(saved("BMP", "L").replace(b"\x09\0\0\0\x0c", b"\x09\0\xff\0\x0c"))  # DecompressionBombError
def test_images(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.png"
    path.write_bytes(content)
    try:
        chip = decode(path, 16)
        assert chip.shape == (16, 16) and chip.dtype == np.uint8
    except DataError as error:
        assert str(error)


def saved_array(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


KINDS = (np.uint8, bool, np.int16, np.float32, np.float64)
ARRAYS = [saved_array(LEVELS.astype(kind)) for kind in KINDS]
ARRAYS += [saved_array(LEVELS[None]), saved_array(np.asfortranarray(LEVELS)), saved_array(LEVELS.astype(">u2"))]


@settings(bounded, max_examples=200)
@given(content=damaged(*ARRAYS))
@example(ARRAYS[0].replace(b"(12, 9)", b"(12L, 9"))  # TokenError in numpy
@example(ARRAYS[0].replace(b"(12, 9), }" + b" " * 10, b"(99999999999999, 9)}"))  # MemoryError
@example(ARRAYS[0].replace(b"(12, 9), }" + b" " * 26, b"(" + b"9" * 30 + b",), }"))  # OverflowError
def test_arrays(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.npy"
    path.write_bytes(content)
    side, (black, white) = survey([path])
    assert 0 < side <= 512 and black < white
    try:
        chip = decode(path, 16, (black, white))
        assert chip.shape == (16, 16) and chip.dtype == np.uint8
    except DataError as error:
        assert str(error)


REFERENCE = b"image_id,class,OOD_flag\r\nGotcha1,bus,0\r\nGotcha2,1,1\r\n"
CELLS = st.sampled_from(["Gotcha1", "2.png", "bus", "0", "1", "\u00b2", "", "\0", '"']) | st.text(max_size=3)
TABLES = st.lists(st.lists(CELLS, max_size=5).map(",".join), max_size=4)
HEADED = TABLES.map(lambda rows: REFERENCE[:25] + "\n".join(rows).encode(errors="surrogatepass"))


@settings(bounded, max_examples=150)
@given(content=damaged(REFERENCE, REFERENCE.decode().encode("utf-16")) | HEADED)
def test_references(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "reference.csv").write_bytes(content)
    chips = [folder / "Gotcha1.png", folder / "Gotcha2.png"]
    try:
        labelled = read_labelled(chips, find_reference(folder), ("sedan", "bus"), (0, 7))
        assert labelled.labels.shape == labelled.ood.shape == (2,) and set(labelled.labels) <= {-1, 0, 1}
    except DataError as error:
        assert "reference.csv" in str(error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "best.pt"
    network = Classifier("test_resnet", 2, 16).state_dict()
    contents = {
        "stage": "pretrain", "sensor": "EO", "settings": {}, "backbone": "test_resnet", "image_size": 16,
        "chip_side": 16, "views": ((0, 1.0),), "ood": {}, "validation": {}, "classes": ("a", "b"),
        "class_ids": (0, 1), "counts": (5, 3), "scales": (1.0,), "entities": "", "labelled_share": 1.0,
        "grey_range": (0.0, 255.0), "grey": (0.4, 0.1), "data_root": "x", "val_fraction": 0.1,
        "model": network,
    }  # fmt: skip
    save_checkpoint(path, contents)
    return path, path.read_bytes(), contents


def rebuilt(path):
    """Whether a checkpoint can be used; else it is refused."""
    try:
        return build_model(load_checkpoint(path, "pretrain.py"), path) is not None
    except (CheckpointError, BackboneError) as error:
        assert str(error)
        return False


@bounded
@given(data=st.data())
def test_bytes_of_checkpoints(checkpoint, data):
    path, undamaged, _ = checkpoint
    path.write_bytes(data.draw(damaged(undamaged)))
    rebuilt(path)


NUMBERS = st.integers(-2, 3) | st.floats()
VALUES = st.none() | st.booleans() | NUMBERS | st.text(max_size=3) | st.just(torch.full((2,), torch.nan))
ENTRIES = st.recursive(VALUES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x))


@bounded
@given(entries=st.dictionaries(st.sampled_from(list(KEYS)), ENTRIES, min_size=1, max_size=3))
def test_entries_of_checkpoints(checkpoint, entries):
    path, _, contents = checkpoint
    save_checkpoint(path, contents | entries)
    rebuilt(path)


NAMES = ["EPOCHS", "LEARNING_RATE", "TRAIN_SCALES", "CLASS_WEIGHTS", "CLASSES", "OUT_DIR", "SEED", "COMPILE"]
ODD = ["nan", "1e400", "(((" * 200, "9" * 5000, "1,,2", "[1", "-", "1j", "inf", "0", "2"]
TEXTS = st.text(max_size=8) | st.sampled_from(ODD)


@settings(bounded, max_examples=150)
@given(arguments=st.lists(st.tuples(st.sampled_from(NAMES), TEXTS).map("=".join) | st.text(max_size=4)))
def test_settings(arguments):
    script = runpy.run_path(str(ROOT / "pretrain.py"))
    try:
        read_settings(script, arguments)
    except SettingError as error:
        assert str(error)
