"""What a killed run goes on from, and what may not be lost: last.pt, signals, the runs before."""

import contextlib
import os
import signal
from pathlib import Path

from utils.run.checkpoint import checksum, load_checkpoint
from utils.run.files import remove_parts
from utils.run.ranks import from_first, ranks
from utils.run.settings import CheckpointError, SettingError, check

# Settings that change where and how a run computes, not what. BATCH_SIZE goes by its sum over the ranks.
FREE = {"OUT_DIR", "STORE_DIR", "DEVICE", "CHIP_MEMORY_GB", "COMPILE", "RESUME", "SAVE_EVERY_MIN"}
FREE |= {"MAX_BAD_STEPS", "TENSORBOARD", "TEACHER", "STUDENT", "BATCH_SIZE"}


def chips_a_step(out_dir, settings):
    """Chips of a step on all ranks together: BATCH_SIZE on each, or those of the run that goes on.

    Args:
        out_dir: folder of the run; settings: of the script.

    Raises:
        SettingError: they are not enough for one on each rank.
    """

    def of_run():
        found = _newest(out_dir) if settings["RESUME"] else None
        stopped = found and found["run"]["step"] < found["run"]["steps"]
        same = stopped and not _changed(found["settings"], settings, FREE - {"BATCH_SIZE"})
        return found["run"]["batch"] if same else None

    batch = from_first(of_run) or settings["BATCH_SIZE"] * ranks()
    check(batch >= ranks(), f"the run in {out_dir} has {batch} chips a step, too few for {ranks()} ranks")
    return batch


def take_up(out_dir, checkpoint, batch, resume):
    """The checkpoint that a run goes on from, or None where it starts anew.

    An earlier run that this one does not go on from is kept: its folder takes another name.

    Args:
        out_dir: folder of the run.
        checkpoint: what the run's checkpoints hold: stage, settings, "made_from".
        batch: chips a step, on all ranks together.
        resume: False starts anew whatever is there.

    Raises:
        SettingError: an unfinished run with other settings is there.
    """
    remove_parts(out_dir)
    found = _newest(out_dir) if resume else None
    if found is None:
        if any(Path(out_dir).glob("last*.pt")):
            _set_aside(out_dir)
        return None
    changed = _differences(found, checkpoint, batch)
    if not changed:
        return found
    if found["run"]["step"] < found["run"]["steps"]:
        raise SettingError(
            f"{out_dir} holds an unfinished run with other settings: {'; '.join(changed)}. Set them as "
            "they were to go on, RESUME=False to start anew (the old run is kept), or another OUT_DIR"
        )
    _set_aside(out_dir)
    return None


def made_from(pairs, source=None):
    """A hash of what a run is made from: the labels of its pairs, and the checkpoint of the stage before."""
    return checksum([pairs.labels.tobytes(), source and source["checksum"]])


def _newest(out_dir):
    """The newest checkpoint that a run in out_dir can go on from; a damaged one takes another name."""
    for path in Path(out_dir, "last.pt"), Path(out_dir, "last.previous.pt"):
        if not path.exists():
            continue
        try:
            return load_checkpoint(path, "", whole=True)
        except CheckpointError as error:
            damaged = path.with_suffix(".damaged.pt")
            os.replace(path, damaged)  # or it would take the place of the one before
            wrong = str(error).partition(";")[0]
            print(f"{wrong}. Kept as {damaged}; the one before is taken", flush=True)
    return None


def _differences(found, checkpoint, batch):
    """What would make another run of it, in words."""
    if found["stage"] != checkpoint["stage"]:
        return [f"it is one of {found['stage']}.py"]
    changed = _changed(found["settings"], checkpoint["settings"], FREE)
    if found["run"]["batch"] != batch:
        changed.append(f"chips a step, BATCH_SIZE on every rank, were {found['run']['batch']}, are {batch}")
    if found.get("made_from") != checkpoint.get("made_from"):
        changed.append("it was made from other data or an other checkpoint")
    return changed


def _changed(then, now, free):
    """Which settings are other ones, in words."""
    names = [name for name in {**then, **now} if name not in free and then.get(name) != now.get(name)]
    return [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in names]


def _set_aside(out_dir):
    """Rename a folder to the first free of name.1, name.2, ..."""
    number = 1
    while os.path.lexists(old := f"{os.path.normpath(out_dir)}.{number}"):
        number += 1
    os.rename(out_dir, old)
    print(f"the earlier run in {out_dir} is kept as {old}", flush=True)


@contextlib.contextmanager
def stop_signals():
    """Within it the first SIGINT or SIGTERM only fills the list that it gives; the second ends at once."""
    received, before = [], {}

    def receive(number, frame):
        received.append(number)
        for other, handler in before.items():
            signal.signal(other, signal.SIG_DFL if other == signal.SIGTERM else handler)

    with contextlib.suppress(ValueError):  # not in the main thread: signals go elsewhere
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
