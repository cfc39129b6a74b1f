"""One process at a time writes into an output folder."""

import contextlib
import os

from data.lock import has_locks
from utils.run.settings import SettingError

import filelock

held = contextlib.ExitStack()  # locks until the script ends; closed by `utils.run.start.run`
out_dirs = []  # output folders of this script


def refuse_second_start(out_dir):
    """Hold OUT_DIR.lock until this script ends.

    Raises:
        SettingError: another process holds it.
    """
    out_dirs.append(out_dir)
    path = f"{os.path.normpath(out_dir)}.lock"
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    try:
        if has_locks(folder):
            held.enter_context(filelock.FileLock(path, timeout=0))
    except PermissionError:  # the folder above may be closed, and OUT_DIR itself open
        pass
    except filelock.Timeout:
        raise SettingError(
            f"another process writes into OUT_DIR {out_dir} at this moment; wait for it, or set another OUT_DIR"
        ) from None
