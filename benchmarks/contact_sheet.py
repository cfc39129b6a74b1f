"""Show the demo set: a sheet of chips, and how its SAR grey levels compare with real ones.

python benchmarks/contact_sheet.py [ROOT] [OUT.png]

A row per class with pairs (EO left, SAR right), then rows of out-of-distribution SAR chips from the
test scenes. The printed figures cover the SAR chips of the training and test folders.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.demo import DEMO_ROOT, ensure_demo
from data.demo.simulator import SAR_PIXELS
from data.layouts import OFFICIAL_CLASSES

import numpy as np
from PIL import Image, ImageDraw

PAIRS = 4  # for each class
OOD_ROWS = 2
GAP = 3  # between chips, px
LABEL = 140  # width of the column of names, px
# Published for the real set, and measured on 49 real chips; the axes are x, y.
MEAN, STD = "0.406 .. 0.418", "0.125 .. 0.128"
PERCENTILES = {1: 37, 5: 54, 25: 83, 50: 104, 75: 126, 95: 170, 99: 211}
AUTOCORRELATION = {1: (0.81, 0.79), 2: (0.57, 0.53), 3: (0.42, 0.41), 4: (0.35, 0.36),
                   6: (0.26, 0.30), 8: (0.20, 0.25)}


def read_tile(path):
    """A chip at the size of a SAR chip, pixels repeated."""
    with Image.open(path) as chip:
        return chip.convert("L").resize((SAR_PIXELS, SAR_PIXELS), Image.Resampling.NEAREST)


def rows_of_paths(root):
    """Yield (label, 2 * PAIRS paths) for each row of the sheet."""
    for name in OFFICIAL_CLASSES:
        eo = sorted((root / "train/EO_Train" / name).glob("*.png"))[:PAIRS]
        sar = sorted((root / "train/SAR_Train" / name).glob("*.png"))[:PAIRS]
        yield name, [path for pair in zip(eo, sar, strict=True) for path in pair]
    with open(root / "test/test_reference.csv", newline="") as file:
        ids = [row["image_id"] for row in csv.DictReader(file) if row["OOD_flag"] == "1"]
    # Spread over the scenes, since the frames of one scene look alike.
    spread = np.linspace(0, len(ids) - 1, OOD_ROWS * 2 * PAIRS).astype(int)
    for row in spread.reshape(OOD_ROWS, -1):
        yield "OOD (SAR)", [root / "test" / f"{ids[i]}.png" for i in row]


def draw_sheet(root):
    """The contact sheet, in 24 grey levels to keep the file small."""
    rows, step = list(rows_of_paths(root)), SAR_PIXELS + GAP
    sheet = Image.new("L", (LABEL + 2 * PAIRS * step, len(rows) * step), 255)
    draw = ImageDraw.Draw(sheet)
    for y, (label, paths) in enumerate(rows):
        draw.text((4, y * step + SAR_PIXELS // 2 - 6), label, fill=0)
        for x, path in enumerate(paths):
            sheet.paste(read_tile(path), (LABEL + x * step, y * step))
    return sheet.quantize(24)


def autocorrelation(chips, lag, axis):
    """Correlation of pixels `lag` apart along an axis of chips (N, H, W), mean over chips."""
    deviation = chips - chips.mean((1, 2), keepdims=True)
    size = chips.shape[axis]
    ahead = np.take(deviation, range(lag, size), axis)
    behind = np.take(deviation, range(size - lag), axis)
    return ((ahead * behind).mean((1, 2)) / deviation.var((1, 2))).mean()


def print_statistics(root):
    """Grey levels of the non-empty SAR chips beside the published figures, as a table."""
    paths = [*root.glob("train/SAR_Train/*/*.png"), *root.glob("test/*.png")]
    grey = np.stack([np.asarray(read_tile(path)) for path in sorted(paths)])
    grey = grey[grey.any((1, 2))]
    chips = grey / 255
    print(f"{'SAR grey level':<26}{'demo':>12}{'real':>16}")
    print(f"{'mean':<26}{chips.mean():>12.3f}{MEAN:>16}")
    print(f"{'standard deviation':<26}{chips.std():>12.3f}{STD:>16}")
    for percent, real in PERCENTILES.items():
        print(f"{f'percentile {percent}':<26}{np.percentile(grey, percent):>12.0f}{real:>16}")
    for lag, (real_x, real_y) in AUTOCORRELATION.items():
        ours = f"{autocorrelation(chips, lag, 2):.2f} {autocorrelation(chips, lag, 1):.2f}"
        print(f"{f'autocorrelation {lag} px, x y':<26}{ours:>12}{f'{real_x:.2f} {real_y:.2f}':>16}")


def main(root=DEMO_ROOT, out="docs/figures/demo.png"):
    ensure_demo(root)
    draw_sheet(Path(root)).save(out, optimize=True)
    print(f"{out}: {Path(out).stat().st_size / 1000:.0f} kB")
    print_statistics(Path(root))


if __name__ == "__main__":
    main(*sys.argv[1:])
