"""A lock between processes: one writes a file that several need, the others wait."""

import contextlib
import errno
import os
import tempfile
import warnings

from filelock import FileLock, Timeout

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(path, wait=True):
    """Hold the lock file `path`; a process that finds it locked waits until it is free.

    The operating system frees the lock when its process ends, also when it is killed. The file stays.
    If the file system has no locks, a sentence says so, and the work goes on without a lock.

    wait: False raises filelock's Timeout where another process holds it.

    Raises:
        OSError: the lock file cannot be written.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    if has_locks(folder):
        with FileLock(path, timeout=-1 if wait else 0):
            yield
    else:
        print(f"the file system of {folder} has no locks: do not start two runs that use it at the same time")
        yield


def has_locks(folder):
    """Whether the file system of `folder` has locks.

    It locks a new file, which no other process can hold. Without locks filelock raises, or finds the file
    locked, or warns and takes the existence of the file as the lock, which would outlive a killed process:
    that depends on its version and on the file system.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lock", ignore_cleanup_errors=True) as new:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                with FileLock(os.path.join(new, "lock"), timeout=0):
                    return True
        except (Timeout, NotImplementedError, UserWarning):
            return False
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            raise
