"""Write the demo set: PNG files and reference CSVs in the layout of the 2024 release."""

import os
import shutil
from pathlib import Path

from data.demo.scenes import plan_scenes, simulate_scene
from data.demo.simulator import simulate_pair
from data.layouts import OFFICIAL_CLASSES
from data.lock import locked

import numpy as np
from PIL import Image
from tqdm import tqdm

DEMO_ROOT = "datasets/demo"
TRAIN_COUNTS = dict(zip(OFFICIAL_CLASSES, (1600, 900, 600, 400, 200, 120, 75, 50, 30, 16), strict=True))


def _write_train(root, seed, train_counts, progress):
    """Training pairs, each of another individual."""
    number = 0
    for kind, count in train_counts.items():
        folders = [root / "train" / sensor / kind for sensor in ("EO_Train", "SAR_Train")]
        for folder in folders:
            folder.mkdir(parents=True)
        for _ in range(count):
            chips = simulate_pair(np.random.default_rng([seed, 0, number]), kind)
            for folder, chip in zip(folders, chips, strict=True):
                Image.fromarray(chip).save(folder / f"{number:06d}.png")
            number += 1
            progress.update(1)


def _write_scenes(folder, reference, seed, names, scenes, progress):
    """SAR chips, numbered along the flight, and their reference CSV."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    number = int(rng.integers(100_000, 110_000))
    rows = ["image_id,class,OOD_flag"]
    # Scenes count from 1, since numpy treats [seed, split, 0] as the same seed as [seed, split].
    for scene, kinds in enumerate(plan_scenes(rng, names, scenes), start=1):
        number += int(rng.integers(150, 901))
        for frame, (kind, chip) in enumerate(
                simulate_scene(np.random.default_rng([*seed, scene]), kinds)):
            number += int(rng.integers(1, 6)) if frame else 0
            known = kind in OFFICIAL_CLASSES
            rows.append(f"Gotcha{number},{kind if known else 'unknown'},{int(not known)}")
            Image.fromarray(chip).save(folder / f"Gotcha{number}.png")
        progress.update(1)
    (folder / reference).write_text("\n".join(rows) + "\n")


def write_demo(root, seed=0, train_counts=TRAIN_COUNTS, val_scenes=50, test_scenes=100):
    """Write the demo set in the layout of the 2024 release.

    Args:
        root: folder to create; it will hold train/, val/ and test/.
        seed: the same seed gives the same files, byte for byte.
        train_counts: class name -> number of training pairs; scenes hold these classes and OOD.
        val_scenes, test_scenes: number of scenes, of 6 to 24 chips each.

    Raises:
        FileExistsError: root exists.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists already; delete it to write the demo set again")
    # Renamed at the very end, so that an interrupted write never looks like a complete set.
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        steps = sum(train_counts.values()) + val_scenes + test_scenes
        with tqdm(desc=f"writing {root}", total=steps, disable=None) as bar:
            _write_train(partial, seed, train_counts, bar)
            names = list(train_counts)
            for split, (folder, reference, scenes) in enumerate(
                    (("val", "validation_reference.csv", val_scenes),
                     ("test", "test_reference.csv", test_scenes)), start=1):
                _write_scenes(partial / folder, reference, (seed, split), names, scenes, bar)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def ensure_demo(root):
    """Write the demo set if `root` is DEMO_ROOT and does not exist yet; otherwise do nothing."""
    if os.path.normpath(root) == os.path.normpath(DEMO_ROOT) and not Path(root).exists():
        with locked(f"{os.path.normpath(root)}.lock"):
            if not Path(root).exists():  # another process may have written it in the meantime
                write_demo(root)
