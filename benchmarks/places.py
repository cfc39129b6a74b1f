"""A data set of real UNICORN pairs, labelled by place, since no public pairs of that survey have vehicle labels.

python benchmarks/places.py [SOURCE=../shared/unicorn_pairs] [OUT_DIR=datasets/places]

The 826 pairs of the 2022 test show the same places again and again. Each of the six largest sets of alike EO chips
(data/entities.py) is a class. Half of its pairs, drawn at random, are the training pairs; the SAR chips of the others
are in val/, and those of all further pairs stand beside them as unknown chips. In the challenge's layout of 2024.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.entities import discover
from data.labelled import write_reference
from data.store import open_store
from utils.run.settings import check, read_settings
from utils.run.start import run

import numpy as np

SOURCE = "../shared/unicorn_pairs"  # folder with test_images_EO/EO_<number>.png and test_images/SAR_<number>.png
OUT_DIR = "datasets/places"  # folder of the new data set
PLACES = 6  # classes


def main():
    read_settings(globals())
    root, source = Path(OUT_DIR), Path(SOURCE)
    check(not root.exists(), f"{root} exists; delete it, or set OUT_DIR to another folder")
    numbers = sorted(int(path.stem.removeprefix("EO_")) for path in source.glob("test_images_EO/EO_*.png"))
    check(numbers, f"{source} holds no test_images_EO/EO_<number>.png; set SOURCE")
    paths = {
        "EO": [source / f"test_images_EO/EO_{number}.png" for number in numbers],
        "SAR": [source / f"test_images/SAR_{number}.png" for number in numbers],
    }
    with tempfile.TemporaryDirectory() as folder:
        entities = discover(open_store(paths["EO"], folder, report=False), np.zeros(len(numbers), int))
    entities, sizes = np.unique(entities, return_inverse=True, return_counts=True)[1:]
    largest = np.argsort(-sizes, kind="stable")[:PLACES]
    place = np.full(len(numbers), -1)
    for label, entity in enumerate(largest):
        place[entities == entity] = label
    train = place >= 0
    train[train] = np.random.default_rng(0).random(train.sum()) < 0.5

    (root / "val").mkdir(parents=True)
    for i in np.flatnonzero(train):
        for sensor in paths:
            folder = root / f"train/{sensor}_Train/place{place[i]}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(paths[sensor][i], folder / f"{numbers[i]}.png")
    rows = []
    for i in np.flatnonzero(~train):
        name, known = f"Gotcha{numbers[i]}", place[i] >= 0
        shutil.copy(paths["SAR"][i], root / f"val/{name}.png")
        rows.append((name, f"place{place[i]}" if known else "elsewhere", not known))
    write_reference(root / "val/validation_reference.csv", rows)
    known = int((place >= 0).sum())
    print(
        f"{root}: places of {', '.join(map(str, sizes[largest]))} pairs; {train.sum()} training pairs, "
        f"{known - train.sum()} known and {len(numbers) - known} unknown chips in val/"
    )


if __name__ == "__main__":
    run(main)
