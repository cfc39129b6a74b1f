"""The demo data set: simulated pairs and scenes, written in the layout of the 2024 release."""

import os
import shutil
from pathlib import Path

from data.demo.simulator import simulate_pair, simulate_scene
from data.layouts import OFFICIAL_CLASSES
from data.lock import locked

import numpy as np
from PIL import Image
from tqdm import tqdm

DEMO_ROOT = "datasets/demo"
TRAIN_COUNTS = dict(zip(OFFICIAL_CLASSES, (1600, 900, 600, 400, 200, 120, 75, 50, 30, 16), strict=True))
OOD_SHARE = 0.28  # of the objects in validation and test scenes
# Dealt round by round, so that each kind comes about as often as it stands here.
STRANGER_DECK = ("tank",) * 3 + ("aircraft",) * 3 + ("building",) * 3 + ("excavator",) * 2 + (
    "tractor", "containers", "clutter", "empty")


def _deal(rng, deck, count):
    """`count` names from `deck`, shuffled anew each round: nearly even, never the same order."""
    rounds = [rng.permutation(deck) for _ in range(-(-count // len(deck)))]
    return [str(name) for name in np.concatenate(rounds)[:count]] if count else []


def _plan_scenes(rng, names, scenes):
    """Cast the scenes: a list per scene with the kinds of its one, two or three objects."""
    sizes = rng.permutation([1 if 5 * i < 3 * scenes else 2 + i % 2 for i in range(scenes)])
    objects = int(sizes.sum())
    strangers = max(1, round(OOD_SHARE * objects)) if objects else 0
    kinds = _deal(rng, names, objects - strangers) + _deal(rng, STRANGER_DECK, strangers)
    kinds = iter(rng.permutation(kinds).tolist())
    return [[next(kinds) for _ in range(size)] for size in sizes]


def _write_train(root, seed, train_counts, progress):
    """Pairs, every one of an individual of its own."""
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
    """SAR chips numbered along the flight, and their reference CSV."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    number = int(rng.integers(100_000, 110_000))
    rows = ["image_id,class,OOD_flag"]
    # From 1 on, since numpy takes [seed, split, 0] for the same seed as [seed, split].
    for scene, kinds in enumerate(_plan_scenes(rng, names, scenes), start=1):
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
        root: folder to create, with train/, val/ and test/ below.
        seed: the same seed gives the same pixels.
        train_counts: class name -> number of training pairs; scenes hold these classes and OOD.
        val_scenes, test_scenes: number of scenes, of 6 to 24 chips each.
    Raises:
        FileExistsError: if root is there already.
    """
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists already; delete it to have it written anew.")
    # Renamed at the very end, so that an interrupted write is never taken for a complete set.
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # by a process that was killed
    try:
        steps = sum(train_counts.values()) + val_scenes + test_scenes
        with tqdm(desc=f"writing {root}", total=steps) as bar:
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
    """Write the demo set if root is DEMO_ROOT and is not there yet; otherwise do nothing."""
    if os.path.normpath(root) == os.path.normpath(DEMO_ROOT) and not Path(root).exists():
        with locked(f"{os.path.normpath(root)}.lock"):
            if not Path(root).exists():  # another process may have written it meanwhile
                write_demo(root)
