"""What a killed run goes on from, and what may not be lost: last.pt, signals, the runs before."""

import contextlib
import os
import signal
from pathlib import Path

from utils.checkpoint import checksum, load_checkpoint
from utils.settings import CheckpointError, SettingError

# Settings that change where and how a run computes, not what.
FREE = {"OUT_DIR", "STORE_DIR", "DEVICE", "CHIP_MEMORY_GB", "COMPILE", "RESUME", "SAVE_EVERY_MIN"}
FREE |= {"MAX_BAD_STEPS", "TEACHER", "STUDENT"}


def take_up(out_dir, checkpoint, resume):
    """The checkpoint that a run goes on from, or None where it starts anew.

    An earlier run that this one does not go on from is kept: its folder takes another name.

    Args:
        out_dir: folder of the run.
        checkpoint: what the run's checkpoints hold: stage, settings, "made_from".
        resume: False starts anew whatever is there.

    Raises:
        SettingError: an unfinished run with other settings is there.
    """
    last, before = Path(out_dir, "last.pt"), Path(out_dir, "last.previous.pt")
    if not last.exists() and not before.exists():
        return None
    found = None
    for path in (last, before) if resume else ():
        if not path.exists():
            continue
        try:
            found = load_checkpoint(path, f"{checkpoint['stage']}.py", whole=True)
            break
        except CheckpointError as error:
            damaged = path.with_suffix(".damaged.pt")
            os.replace(path, damaged)  # or it would take the place of the one before
            print(f"{error}. Kept as {damaged}; the one before is taken", flush=True)
    if found is None or "run" not in found:
        _set_aside(out_dir)
        return None
    changed = _differences(found, checkpoint)
    if not changed:
        return found
    if found["run"]["step"] < found["run"]["steps"]:
        raise SettingError(
            f"{out_dir} holds an unfinished run with other settings: {'; '.join(changed)}. Set them as "
            "they were to go on, RESUME=False to start anew (the old run is kept), or another OUT_DIR"
        )
    _set_aside(out_dir)
    return None


def made_from(pairs, weights=None):
    """A hash of what a run is made from: the labels of its pairs, and the weights of the stage before."""
    return checksum([pairs.labels.tobytes(), weights])


def _differences(found, checkpoint):
    """What would make another run of it, in words."""
    if found["stage"] != checkpoint["stage"]:
        return [f"it is one of {found['stage']}.py"]
    then, now = found["settings"], checkpoint["settings"]
    names = [name for name in {**then, **now} if name not in FREE and then.get(name) != now.get(name)]
    changed = [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in names]
    if found.get("made_from") != checkpoint.get("made_from"):
        changed.append("it was made from other data or an other checkpoint")
    return changed


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
