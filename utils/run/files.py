"""Files that are there whole or not at all."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def whole_file(path, mode="w", keep=None, **options):
    """A file to write that takes the name `path` when it is complete and on the disk.

    Whatever goes wrong before, a full disk or the end of the process, leaves an earlier file of
    that name as it was.

    Args:
        path: file to make.
        keep: name that an earlier file of that name takes; None = it is replaced.
        mode, options: of open().

    Raises:
        OSError: with the file's name, where it cannot be written.
    """
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        part.replace(path)
    except OSError as error:  # a file object that cannot be written to does not say which it is
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(folder):
    """Delete what `whole_file` could not finish, when its process was killed."""
    for part in Path(folder).glob("*.part"):
        part.unlink()
