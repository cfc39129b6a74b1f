"""One process at a time writes what several read."""

import contextlib
import os

try:
    import fcntl
except ImportError:  # not on Windows, where two processes may do the same work twice
    fcntl = None


@contextlib.contextmanager
def locked(path):
    """Hold the lock file `path`; another process waits here until it is free. It ends with its holder."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
