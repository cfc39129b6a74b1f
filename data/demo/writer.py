"""Write the demo set: PNG files and CSVs in the layout of the 2024 release, on all cores."""

import os
import shutil
from pathlib import Path

from data.demo.scenes import FLIGHT_SHIFT, group_chips, plan_groups, plan_survey, survey_pairs
from data.labelled import write_reference
from data.layouts import OFFICIAL_CLASSES
from data.lock import locked
from data.workers import map_in_processes, may_fork

import numpy as np
from PIL import Image
from tqdm import tqdm

DEMO_ROOT = "datasets/demo"
TRAIN_COUNTS = dict(zip(OFFICIAL_CLASSES, (1600, 900, 600, 400, 200, 120, 75, 50, 30, 16), strict=True))
TEST_SCALE = 2.8  # chips of the test set, relative to the validation set
TEST_GROUPS = 1.13  # groups a chip, likewise: the real test set has smaller groups
# Second number of the seeds. Objects count from 1, since numpy treats [seed, split, 0] as [seed, split].
TRAIN, VAL, TEST = 1, 2, 3


def write_demo(
    root, seed=0, train_counts=TRAIN_COUNTS, val_scale=1.0, test_scale=TEST_SCALE, flight_shift=FLIGHT_SHIFT,
    workers=None,
):  # fmt: skip
    """Write the demo set in the layout of the 2024 release.

    `entities.csv` names the individual that each training pair shows, to compare with what is found without it.

    Args:
        root: folder to create; it will hold train/, val/, test/ and entities.csv.
        seed: the same seed gives the same files, byte for byte.
        train_counts: class name -> number of training pairs; flights show these classes and all unknown kinds.
        val_scale, test_scale: chips of both sets, relative to the validation set of 2026.
        flight_shift: how much the radar of both differs from that of the survey, 0 = not at all.
        workers: number of processes; None = one for each core.

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
        jobs = _train_jobs(partial, seed, train_counts)
        for split, folder, reference, chips, groups in (
            (VAL, "val", "validation_reference.csv", val_scale, val_scale),
            (TEST, "test", "test_reference.csv", test_scale, TEST_GROUPS * test_scale),
        ):
            plan = plan_groups(np.random.default_rng([seed, split]), list(train_counts), chips, groups)
            jobs += _flight_jobs(partial / folder, reference, (seed, split), plan, flight_shift)
        chips = sum(len(what.numbers) for _, _, _, what, *_ in jobs)
        print(f"simulating the demo set, {chips} chips, once, into {root}", flush=True)
        with tqdm(desc=f"writing {root}", total=chips, disable=None) as bar:
            for written in map_in_processes(_run, jobs, may_fork(), workers):
                bar.update(written)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _train_jobs(root, seed, train_counts):
    """Make the training folders and entities.csv; returns a job for each individual."""
    plan = plan_survey(np.random.default_rng([seed, TRAIN]), train_counts)
    for kind in train_counts:
        for sensor in ("EO_Train", "SAR_Train"):
            (root / "train" / sensor / kind).mkdir(parents=True)
    names = sorted((number, visits.name) for visits in plan for number in visits.numbers)
    rows = ["chip,entity", *(f"{number:06d},{name}" for number, name in names)]
    (root / "entities.csv").write_text("\n".join(rows) + "\n")
    return [(_write_individual, root / "train", (seed, TRAIN, i), visits) for i, visits in enumerate(plan, 1)]


def _flight_jobs(folder, reference, seed, plan, shift):
    """Make the folder of a validation or test set and its reference; returns a job for each group."""
    folder.mkdir(parents=True)
    kinds = [(f"Gotcha{number}", group.kind) for group in plan for number in group.numbers]
    write_reference(folder / reference, ((name, kind, kind not in OFFICIAL_CLASSES) for name, kind in kinds))
    return [(_write_group, folder, (*seed, i), group, shift) for i, group in enumerate(plan, 1)]


def _run(job):
    function, *arguments = job
    return function(*arguments)


def _write_individual(folder, seed, visits):
    """Write the pairs of an individual of the survey; returns their number."""
    for number, pair in zip(visits.numbers, survey_pairs(np.random.default_rng(seed), visits), strict=True):
        for sensor, chip in zip(("EO_Train", "SAR_Train"), pair, strict=True):
            Image.fromarray(chip).save(folder / sensor / visits.kind / f"{number:06d}.png")
    return len(visits.numbers)


def _write_group(folder, seed, group, shift):
    """Write the SAR chips of a group; returns their number."""
    for number, chip in zip(group.numbers, group_chips(np.random.default_rng(seed), group, shift), strict=True):
        Image.fromarray(chip).save(folder / f"Gotcha{number}.png")
    return len(group.numbers)


def ensure_demo(root):
    """Write the demo set if `root` is DEMO_ROOT and does not exist yet; otherwise do nothing."""
    if os.path.normpath(root) == os.path.normpath(DEMO_ROOT) and not Path(root).exists():
        with locked(f"{os.path.normpath(root)}.lock"):
            if not Path(root).exists():  # another process may have written it in the meantime
                write_demo(root)
