"""Files that are complete or not there at all."""

import contextlib
import os
import re
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path, mode="w", previous=None, **options):
    """Open a file for writing that takes the name `path` only when it is complete and on the disk.

    If anything fails before (full disk, end of the process), an earlier file of that name stays as it was.

    Args:
        path: file to write.
        previous: name for an earlier file of that name; None = it is replaced.
        mode, options: of open().

    Raises:
        OSError: with the file's name, if it cannot be written.
    """
    temporary = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        temporary.replace(path)
    except OSError as error:  # an error of a write does not name the file
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporary(folder):
    """Delete the temporary files that a killed `atomic_file` left in a folder."""
    for temporary in Path(folder).glob("*.part"):
        if re.fullmatch(r".+\.[0-9]+\.part", temporary.name) and temporary.is_file():
            temporary.unlink()
