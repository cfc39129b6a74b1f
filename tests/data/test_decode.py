import os
import struct
import subprocess
import sys

from data import decode as decoding
from data.decode import decode, decode_all, grey_levels, survey
from data.errors import DataError
from tests.conftest import ROOT

import numpy as np
import pytest
from PIL import Image

LEVELS = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)
UPRIGHT = np.random.default_rng(1).integers(0, 256, (8, 12), dtype=np.uint8)
# EXIF standard: orientation -> the stored array, given the upright one.
STORED = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
    5: np.transpose, 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1),
}  # fmt: skip


def save(path, image, **options):
    image.save(path, **options)
    return path


def test_every_kind_of_file_gives_the_same_grey(tmp_path):
    grey = Image.fromarray(LEVELS)
    palette = Image.fromarray(255 - LEVELS).convert("P")
    palette.putpalette([255 - i for i in range(256) for _ in range(3)])
    alpha = grey.convert("RGBA")
    alpha.putalpha(128)
    files = [
        save(tmp_path / "l.png", grey),
        save(tmp_path / "rgb.png", grey.convert("RGB")),
        save(tmp_path / "rgba.png", alpha),
        save(tmp_path / "la.png", grey.convert("LA")),
        save(tmp_path / "p.png", palette),
        save(tmp_path / "i16.png", Image.fromarray(LEVELS.astype(np.uint16) * 257)),
        save(tmp_path / "l.tif", grey),
        save(tmp_path / "L.BMP", grey),
    ]
    for path in files:
        np.testing.assert_array_equal(decode(path), LEVELS, err_msg=path.name)


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_obeyed(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(kind, {})
    path = save(tmp_path / f"chip.{kind}", stored, exif=exif, **options)
    chip = decode(path)
    assert chip.shape == UPRIGHT.shape
    assert np.abs(chip.astype(int) - UPRIGHT).max() <= (2 if kind == "jpg" else 0)


def test_exif_orientation_of_a_16_bit_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(UPRIGHT)).astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode(save(tmp_path / "chip.png", stored, exif=exif)), UPRIGHT)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # of Pillow
def test_a_damaged_exif_block_is_ignored(tmp_path):
    for block in (b"Exif\0\0", b"Exif\0\0II*\0garbage", b"\xff" * 30):
        path = save(tmp_path / "chip.png", Image.fromarray(UPRIGHT), exif=block)
        np.testing.assert_array_equal(decode(path), UPRIGHT)


def test_images_and_arrays_from_memory_give_what_their_files_give(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    signed, deep = (RAMP - 128).astype(np.int8), (RAMP * 16).astype(np.uint16)
    files = [
        save(tmp_path / "turned.jpg", Image.fromarray(UPRIGHT), exif=exif),
        save(tmp_path / "turned.png", Image.fromarray(UPRIGHT).convert("P"), exif=exif),
        save(tmp_path / "turned.tif", Image.fromarray(deep), exif=exif),
        pages(tmp_path / "pages.tif", LEVELS, UPRIGHT),
        write_tiff(tmp_path / "signed.tif", signed),
        save(tmp_path / "float.tif", Image.fromarray(deep.astype(np.float32))),
    ]
    for path in files:
        with Image.open(path) as image:
            before, format_before = np.array(image), image.format
            np.testing.assert_array_equal(grey_levels(image, 9, (0, 4095)), decode(path, 9, (0, 4095)))
            np.testing.assert_array_equal(image, before)
            assert image.format == format_before
    image = Image.fromarray(np.ascontiguousarray(np.rot90(UPRIGHT)))
    image.getexif()[0x0112] = 6
    np.testing.assert_array_equal(grey_levels(image), UPRIGHT)
    for array in (UPRIGHT, deep, signed, RAMP / 255, RAMP > 99, np.asfortranarray(deep), UPRIGHT[:, ::-1]):
        np.save(path := tmp_path / "a.npy", array)
        np.testing.assert_array_equal(grey_levels(array, 9, (-99, 4000)), decode(path, 9, (-99, 4000)))
    for value, message in ((np.zeros((2, 2, 2)), r"\[2, 2, 2\]"), (Image.new("F", (2, 2)), "set GREY_RANGE")):
        with pytest.raises(DataError, match=message):
            grey_levels(value)


def pages(path, *arrays):
    first, *others = map(Image.fromarray, arrays)
    return save(path, first, save_all=True, append_images=others)


@pytest.mark.parametrize("fork", [True, False])
def test_the_first_page_of_a_tiff_is_taken_and_such_files_are_listed(tmp_path, fork):
    paths = [
        save(tmp_path / "0.tif", Image.fromarray(LEVELS)),
        pages(tmp_path / "1.tif", 255 - LEVELS, LEVELS, LEVELS),
        save(tmp_path / "2.png", Image.fromarray(LEVELS)),
    ]
    decoded = decode_all(paths, tmp_path / "chips.npy", 12, fork)
    assert decoded.multipage == [str(paths[1])] and decoded.unreadable == {}
    np.testing.assert_array_equal(np.load(tmp_path / "chips.npy"), [LEVELS, 255 - LEVELS, LEVELS])


def test_files_that_are_no_images_are_refused(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    save(tmp_path / "float.tif", Image.fromarray(LEVELS.astype(np.float32)))
    for name, message in (
        ("empty.png", "cannot identify"), ("float.tif", "floating-point.* set GREY_RANGE"), ("none.png", "No such"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            decode(tmp_path / name)


def test_all_16_bit_levels_are_divided_by_257_bit_for_bit(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257).astype(np.uint8)
    for path in (save(tmp_path / "a.png", Image.fromarray(values)), save(tmp_path / "a.tif", Image.fromarray(values))):
        for grey_range in (None, (0, 65535)):
            np.testing.assert_array_equal(decode(path, grey_range=grey_range), expected)


RAMP = np.arange(256).reshape(16, 16)  # the levels that all of the following files hold
DEEP = {
    "16 bit": ((RAMP * 257).astype(np.uint16), (0, 65535)),
    "12 bit": (np.rint(RAMP * 4095 / 255).astype(np.uint16), (0, 4095)),
    "signed 16 bit": ((RAMP * 100 - 20_000).astype(np.int16), (-20_000, 5_500)),
    "signed 8 bit": ((RAMP - 128).astype(np.int8), (-128, 127)),
    "32 bit": ((RAMP * 1000 - 5).astype(np.int32), (-5, 254_995)),
    "decibel": ((RAMP / 255 * 30 - 30).astype(np.float32), (-30, 0)),
    "float64": (RAMP / 255, (0, 1)),
    "turned": (np.asfortranarray(RAMP.T / 255).T, (0, 1)),
}


def write_tiff(path, values):
    """An uncompressed TIFF, byte by byte, since Pillow writes no signed ones."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8 * values.itemsize), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, 1), (278, 4, height), (279, 4, values.nbytes), (339, 3, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, field, 1, value) for tag, field, value in tags)
    offset = 8 + values.nbytes
    header = b"II*\0" + struct.pack("<I", offset)
    path.write_bytes(header + values.tobytes() + struct.pack("<H", len(tags)) + entries + bytes(4))
    return path


@pytest.mark.parametrize("name", DEEP)
def test_levels_of_more_than_8_bits_are_read_through_the_range(tmp_path, name):
    values, grey_range = DEEP[name]
    np.save(tmp_path / "a.npy", values)
    paths = [tmp_path / "a.npy"]
    if values.dtype != np.float64:  # Pillow reads no such TIFF
        paths.append(write_tiff(tmp_path / "a.tif", values))
    for path in paths:
        np.testing.assert_array_equal(decode(path, grey_range=grey_range), RAMP)
    black, white = grey_range
    middle, span = (black + white) / 2, white - black
    expected = np.rint(255 * np.clip((values.astype(float) - (middle - span / 4)) / (span / 2), 0, 1))
    halved = decode(tmp_path / "a.npy", grey_range=(middle - span / 4, middle + span / 4))
    np.testing.assert_array_equal(halved, expected)
    assert (halved == 0).sum() >= 60 and (halved == 255).sum() >= 60


def test_8_bit_files_are_not_changed_by_the_range(tmp_path):
    np.save(tmp_path / "a.npy", LEVELS)
    for path in (tmp_path / "a.npy", save(tmp_path / "a.png", Image.fromarray(LEVELS))):
        for grey_range in (None, (0, 255), (-3.5, 2.0)):
            np.testing.assert_array_equal(decode(path, grey_range=grey_range), LEVELS)


def test_pixels_that_are_not_finite_are_black_and_counted(tmp_path):
    values = RAMP / 255 + 1.0
    values[0, :4] = np.nan, np.inf, -np.inf, np.nan
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, array in zip(paths, (values, RAMP / 255 + 1, np.full((16, 16), np.nan)), strict=True):
        np.save(path, array)
    decoded = decode_all(paths, tmp_path / "chips.npy", 16, True, (1.0, 2.0))
    assert decoded.not_finite == {str(paths[0]): 4, str(paths[2]): 256} and not decoded.unreadable
    expected = np.where(np.isfinite(values), RAMP, 0)
    np.testing.assert_array_equal(np.load(tmp_path / "chips.npy"), [expected, RAMP, np.zeros((16, 16))])


@pytest.mark.parametrize("values, message", [
    (np.zeros((2, 3, 3)), r"float64 \[2, 3, 3\]; a chip is an array \[H, W\]"),
    (np.zeros(5), r"float64 \[5\]"), (np.zeros((0, 4)), r"\[0, 4\]"), (np.zeros((3, 3), complex), "complex128"),
    (np.array([["a"]]), "<U1"), (np.array([[{}]]), "allow_pickle"), (np.zeros((2**13, 2**12), bool), "are no chip"),
    (RAMP.astype(np.uint16) * 257, "nearly all of its levels, 0 to 65535, are outside GREY_RANGE=0,255; "
        "train with GREY_RANGE=0,65535, or convert the file to levels of 0 to 255"),
    (RAMP / 5 - 50, "nearly all of its levels, -50 to 1, are outside GREY_RANGE=0,255"),
])  # fmt: skip
def test_arrays_that_are_no_chips_are_refused(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(DataError, match=message):
        decode(tmp_path / "a.npy", grey_range=(0, 255))


@pytest.mark.parametrize("size", [5, 40, 120, 127, 140, 300, 2**17])
def test_a_damaged_array_is_refused(tmp_path, size):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(150, 150)))
    os.truncate(tmp_path / "a.npy", size)
    with pytest.raises(DataError):
        decode(tmp_path / "a.npy", grey_range=(0, 1))


def noise(most, dtype=np.uint16, shape=(40, 24, 24)):
    return (np.random.default_rng(0).random(shape) ** 2 * most).astype(dtype)


RANGES = {
    "8 bit": (noise(255, np.uint8), (0, 255)),
    "8 bit in 16": (noise(255), (0, 255)),
    "12 bit": (noise(4095), (0, 4095)),
    "12 bit, signed": (noise(4095, np.int32), (0, 4095)),
    "10 bit": (noise(1000), (0, 1023)),
    "a bit more than a quarter of 16": (noise(17_000), (0, 65535)),
    "16 bit": (noise(65535), (0, 65535)),
    "one hot pixel": (np.where(np.arange(40 * 576).reshape(40, 24, 24) == 7, 65535, noise(4095)), (0, 4095)),
    "empty chips beside decibels": (np.r_[noise(20, float) - 25, np.zeros((9, 24, 24))], None),
    "gaps": (np.where(noise(100) == 3, np.nan, noise(20, float) - 25), None),
    "all empty": (np.zeros((3, 9, 9)), (0, 1)),
    "all empty, 16 bit": (np.zeros((3, 9, 9), np.uint16), (0, 65535)),
}


@pytest.mark.parametrize("name", RANGES)
def test_survey_takes_the_range_from_format_and_contents(tmp_path, name):
    arrays, expected = RANGES[name]
    paths = [tmp_path / f"{i}.npy" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    side, grey_range = survey(paths)
    assert side == arrays.shape[1] and {type(x) for x in grey_range} == {float}
    if expected is None:  # percentiles of the chips that are not empty
        varied = arrays[:40][np.isfinite(arrays[:40])]
        np.testing.assert_allclose(grey_range, np.percentile(varied, (0.1, 99.9)), rtol=1e-5)
    else:
        assert grey_range == expected


def test_survey_reads_tiff_and_png(tmp_path):
    values = [(RAMP / 8 - 30).astype(np.float32), (RAMP - 128).astype(np.int8), (RAMP * 16).astype(np.uint16)]
    for i, array in enumerate(values):
        write_tiff(tmp_path / f"{i}.tif", array)
    ranges = [survey([tmp_path / f"{i}.tif"]).grey_range for i in range(3)]
    assert ranges[2] == (0, 4095)
    np.testing.assert_allclose(ranges[:2], [[-29.97, 1.84], [-127.7, 126.7]], atol=0.05)
    save(tmp_path / "a.png", Image.fromarray(values[2]))
    assert survey([tmp_path / "a.png"]) == (16, (0, 4095))
    # 8-bit files do not count, and unreadable ones are left to `decode_all`.
    (tmp_path / "c.png").write_bytes(b"")
    save(tmp_path / "b.png", Image.fromarray(LEVELS))
    assert survey([tmp_path / f"{name}.png" for name in "abbbc"]) == (12, (0, 4095))


@pytest.fixture
def many(tmp_path):
    """100 chips, each another one, one of them unreadable."""
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(np.roll(LEVELS, i, 0) ^ i)) for i in range(100)]
    paths[50].write_bytes(b"")
    return paths


@pytest.mark.slow
def test_digest_depends_on_pixels_and_order_only(tmp_path, many, monkeypatch):
    def digest(paths, side=12, fork=True):
        return decode_all(paths, tmp_path / "chips.npy", side, fork).digest

    first = digest(many)
    assert len(first) == 32 and int(first, 16)
    moved = tmp_path / "moved"
    moved.mkdir()
    copies = [save(moved / f"{i:03d}.bmp", Image.open(p)) if i != 50 else p for i, p in enumerate(many)]
    assert digest(copies) == first
    monkeypatch.setattr(decoding, "CHUNK", 7)
    assert digest(many) == digest(many, fork=False) == first
    assert digest(many[1:] + many[:1]) != first
    assert digest(many, side=13) != first
    save(many[0], Image.fromarray(LEVELS ^ 1))
    assert digest(many) != first
    # An unreadable file is not the same as a black chip.
    save(many[50], Image.fromarray(np.zeros_like(LEVELS)))
    black = digest(many)
    many[50].write_bytes(b"")
    assert digest(many) != black


@pytest.mark.slow
def test_workers_that_are_not_forked_do_the_same_work(tmp_path, many, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 10)
    forked, spawned = (decode_all(many, tmp_path / f"{fork}.npy", 12, fork) for fork in (True, False))
    assert forked == spawned and list(forked.unreadable) == [50]
    assert (tmp_path / "True.npy").read_bytes() == (tmp_path / "False.npy").read_bytes()


@pytest.mark.slow
def test_workers_that_are_not_forked_do_not_run_the_script_again(tmp_path, many):
    """As in a short script of a user, which has no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "print('started', os.getpid(), flush=True)\n"
        "from data import decode\n"
        "decode.CHUNK = 10\n"
        "paths = sorted(Path(sys.argv[1]).glob('*.png'))\n"
        "print(len(decode.decode_all(paths, sys.argv[1] + '/chips.npy', 12, False).unreadable))\n"
    )
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1 and done.stdout.endswith("\n1\n")


def test_workers_do_not_import_torch():
    code = "import sys, data.decode; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "False\n"


def test_a_tiff_whose_white_is_zero_is_inverted(tmp_path):
    deep = (LEVELS.astype(np.uint16) + 100) * 100
    path = save(tmp_path / "white.tif", Image.fromarray(65535 - deep), tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    np.testing.assert_array_equal(decode(path), np.rint(deep / 257))
    real = save(tmp_path / "real.tif", Image.fromarray(LEVELS.astype(np.float32)), tiffinfo={262: 0})
    with pytest.raises(DataError, match="0 is white in it"):
        decode(real, None, (0, 255))


def test_a_tiff_of_32_bits_without_sign_keeps_its_large_values(tmp_path):
    levels = np.linspace(0, 2**32 - 1, 144).reshape(12, 12).astype(np.uint32)
    path = save(tmp_path / "deep.tif", Image.fromarray(levels.view(np.int32)))
    signed_tag, tag = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert path.read_bytes().count(signed_tag) == 1
    path.write_bytes(path.read_bytes().replace(signed_tag, tag))
    np.testing.assert_array_equal(decode(path, None, (0, 2**32 - 1)), np.rint(levels / (2**32 - 1) * 255))
    signed = save(tmp_path / "signed.tif", Image.fromarray(LEVELS.astype(np.int32) - 100))
    np.testing.assert_array_equal(decode(signed, None, (-100, 155)), LEVELS)


def test_the_share_of_pixels_outside_the_range(tmp_path):
    """Half of the finite pixels of one file are too bright, a quarter of another is not finite, a third has 8 bits."""
    bright = np.full((4, 4), 50.0)
    bright[:2] = 300
    gaps = np.linspace(0, 200, 16).reshape(4, 4)
    gaps[0] = np.nan
    for name, values in (("0", bright), ("1", gaps), ("2", LEVELS[:4, :4])):
        np.save(tmp_path / f"{name}.npy", values)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    assert decode_all(paths, tmp_path / "out.npy", 4, True, (0, 200)).outside == pytest.approx(0.5 / 3)
    gaps[1:] += 1000  # all finite pixels are outside
    np.save(paths[1], gaps)
    with pytest.raises(DataError, match="nearly all of its levels, 1053"):
        decode(paths[1], None, (0, 200))


@pytest.mark.parametrize("sides, side", [
    (range(20, 60), 39),  # each once: the median
    ([24] * 8 + list(range(30, 62)), 24),  # a fifth
    ([24] * 7 + list(range(30, 63)), 42),
])  # fmt: skip
def test_the_side_of_chips_that_are_all_different_is_their_median(tmp_path, sides, side):
    paths = [save(tmp_path / f"{i}.png", Image.new("L", (s, 12))) for i, s in enumerate(sides)]
    assert survey(paths).side == side
