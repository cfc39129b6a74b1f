"""One process at a time writes into an output folder."""

import contextlib
import os

from data.lock import locked
from utils.run.settings import SettingError

from filelock import Timeout

held = contextlib.ExitStack()  # locks until the script ends; closed by `utils.run.start.run`
out_dirs = []  # output folders of this script


def refuse_second_start(out_dir):
    """Hold OUT_DIR.lock until this script ends.

    Raises:
        SettingError: another process holds it.
    """
    out_dirs.append(out_dir)
    try:
        held.enter_context(locked(f"{os.path.normpath(out_dir)}.lock", wait=False))
    except PermissionError:  # the folder above may be closed, and OUT_DIR itself open
        pass
    except Timeout:
        raise SettingError(
            f"another process writes into OUT_DIR {out_dir} at this moment; wait for it, or set another OUT_DIR"
        ) from None
