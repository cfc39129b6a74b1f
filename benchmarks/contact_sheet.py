"""Show the demo set: sheets of its chips, beside real ones, and how the grey levels of both compare.

python benchmarks/contact_sheet.py [ROOT] [OUT.png] [REAL]

OUT.png shows the demo set in ROOT: a row per class with pairs (EO left, SAR right), the frames of one individual,
then SAR chips of the unknown kinds. REAL is a folder with the pairs of the 2022 test set (test_images,
test_images_EO). If it exists, OUT_real.png shows demo pairs left and real pairs right, and the grey levels of both
are printed.
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

REAL = Path(__file__).resolve().parents[2] / "shared/unicorn_pairs"
PAIRS = 4  # in a row
RANDOM_ROWS = 8  # of OUT_real.png
GAP = 3  # between chips, px
LABEL = 140  # width of the column of names, px
GREY_LEVELS = 16  # in the pictures, to keep the files small
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LAGS = (1, 2, 3, 4, 6, 8)  # px


def pairs_of(root, kind="*"):
    """Paths (EO, SAR) of the training pairs of a class, by number."""
    sar = {path.name: path for path in root.glob(f"train/SAR_Train/{kind}/*.png")}
    eo = sorted(root.glob(f"train/EO_Train/{kind}/*.png"), key=lambda path: path.name)
    return [(path, sar[path.name]) for path in eo]


def real_pairs(folder):
    """Paths (EO, SAR) of the real pairs, by number."""
    eo = sorted(folder.glob("test_images_EO/EO_*.png"))
    return [(path, folder / "test_images" / path.name.replace("EO_", "SAR_")) for path in eo]


def class_rows(root):
    """Yield (label, 2 * PAIRS paths) for each row of the demo set's sheet."""
    for name in OFFICIAL_CLASSES:
        pairs = pairs_of(root, name)
        yield name, flat(pairs[:: -(-len(pairs) // PAIRS)])
    with open(root / "entities.csv", newline="") as file:
        chips = [row["chip"] for row in csv.DictReader(file) if row["entity"] == "bus_1"]
    paths = {path.stem: (path, sar) for path, sar in pairs_of(root, "bus")}
    yield "bus_1, frame by frame", flat(paths[chip] for chip in chips[:PAIRS])
    unknown = {}
    with open(root / "test/test_reference.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["OOD_flag"] == "1":
                unknown.setdefault(row["class"], []).append(root / "test" / f"{row['image_id']}.png")
    few = {name: paths[:: -(-len(paths) // PAIRS)] for name, paths in sorted(unknown.items())}
    for left, right in zip(list(few)[::2], list(few)[1::2], strict=True):
        yield f"{left},\n{right}", few[left] + few[right]


def random_rows(demo, real):
    """Yield ("", paths) for each row of the sheet beside real chips: half of it demo pairs, half real ones."""
    rng = np.random.default_rng(0)
    chosen = (rng.choice(len(pairs), (RANDOM_ROWS, PAIRS), replace=False) for pairs in (demo, real))
    for ours, theirs in zip(*chosen, strict=True):
        yield "", [*flat(demo[i] for i in ours), None, *flat(real[i] for i in theirs)]


def flat(pairs):
    return [path for pair in pairs for path in pair]


def draw_sheet(rows, label):
    """Rows of chips, all at the size of a SAR chip; None leaves a gap. `label`: width of the names, px."""
    rows, step = list(rows), SAR_PIXELS + GAP
    sheet = Image.new("L", (label + max(len(paths) for _, paths in rows) * step, len(rows) * step), 255)
    draw = ImageDraw.Draw(sheet)
    for y, (name, paths) in enumerate(rows):
        draw.text((4, y * step + SAR_PIXELS // 2 - 6), name, fill=0)
        for x, path in enumerate(paths):
            if path:
                with Image.open(path) as chip:
                    tile = chip.convert("L").resize((SAR_PIXELS, SAR_PIXELS), Image.Resampling.NEAREST)
                sheet.paste(tile, (label + x * step, y * step))
    return sheet.quantize(GREY_LEVELS)


def read_chips(paths, side):
    """The chips that are not empty, grey levels 0..1, cut to side x side: float64 (N, side, side)."""
    chips = []
    for path in paths:
        with Image.open(path) as chip:
            chips.append(np.asarray(chip.convert("L"))[:side, :side])
    return np.stack([chip for chip in chips if chip.any()]) / 255


def autocorrelation(chips, lag, axis):
    """Correlation of pixels `lag` apart along an axis (1 = y, 2 = x) of chips (N, H, W), mean over chips."""
    deviation = chips - chips.mean((1, 2), keepdims=True)
    size, variance = chips.shape[axis], deviation.var((1, 2))
    ahead = np.take(deviation, range(lag, size), axis)
    behind = np.take(deviation, range(size - lag), axis)
    return ((ahead * behind).mean((1, 2))[variance > 0] / variance[variance > 0]).mean()


def grey_statistics(chips):
    """{name: figure} of the grey levels of chips (N, H, W), 0..1; percentiles in 0..255."""
    figures = {
        "mean": chips.mean(), "standard deviation": chips.std(),
        "between chip means": chips.mean((1, 2)).std(), "within chips": chips.std((1, 2)).mean(),
    }  # fmt: skip
    figures |= {f"percentile {p}": np.percentile(255 * chips, p) for p in PERCENTILES}
    for axis, name in (2, "x"), (1, "y"):
        figures |= {f"autocorrelation {name}, {lag} px": autocorrelation(chips, lag, axis) for lag in LAGS}
    return figures


def print_statistics(demo, real):
    """Print the grey levels of the demo's training pairs and of the real ones as a Markdown table."""
    columns = []
    for sensor, side in enumerate((32, SAR_PIXELS)):
        columns += [grey_statistics(read_chips([pair[sensor] for pair in pairs], side)) for pairs in (demo, real)]
    print("| grey level | EO, demo | EO, real | SAR, demo | SAR, real |\n|---|---|---|---|---|")
    for name in columns[0]:
        form = ".0f" if name.startswith("percentile") else ".3f" if name in list(columns[0])[:4] else ".2f"
        print(f"| {name} | {' | '.join(format(column[name], form) for column in columns)} |")


def main(root=DEMO_ROOT, out="docs/figures/demo.png", real=REAL):
    ensure_demo(root)
    root, out, real = Path(root), Path(out), Path(real)
    sheets = {out: (class_rows(root), LABEL)}
    if real.is_dir():
        sheets[out.with_stem(f"{out.stem}_real")] = (random_rows(pairs_of(root), real_pairs(real)), 0)
    for path, (rows, label) in sheets.items():
        draw_sheet(rows, label).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    if real.is_dir():
        print_statistics(pairs_of(root), real_pairs(real))
    else:
        print(f"{real} is not there, so there is nothing to compare with")


if __name__ == "__main__":
    main(*sys.argv[1:])
