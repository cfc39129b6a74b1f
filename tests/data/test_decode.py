import os
import subprocess
import sys

from data import decode as decoding
from data.decode import decode, decode_all
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
    for name, message in (("empty.png", "cannot identify"), ("float.tif", "floating-point"), ("none.png", "No such")):
        with pytest.raises(DataError, match=message):
            decode(tmp_path / name)


@pytest.fixture
def many(tmp_path):
    """100 chips, each another one, one of them unreadable."""
    paths = [save(tmp_path / f"{i}.png", Image.fromarray(np.roll(LEVELS, i, 0) ^ i)) for i in range(100)]
    paths[50].write_bytes(b"")
    return paths


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


def test_workers_that_are_not_forked_do_the_same_work(tmp_path, many, monkeypatch):
    monkeypatch.setattr(decoding, "CHUNK", 10)
    forked, spawned = (decode_all(many, tmp_path / f"{fork}.npy", 12, fork) for fork in (True, False))
    assert forked == spawned and list(forked.unreadable) == [50]
    assert (tmp_path / "True.npy").read_bytes() == (tmp_path / "False.npy").read_bytes()


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
