"""Work on all cores: a function of each chunk of a list, in worker processes.

It does not import torch, so that a worker starts quickly.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor


def map_in_processes(function, chunks, fork, workers=None):
    """Yield function(chunk) of each chunk, in order; in worker processes if there are many chunks.

    Args:
        function: at the top level of a module.
        chunks: list of what the function takes.
        fork: whether workers may be forked, which starts them at once; see `may_fork`.
        workers: number of processes; None = one for each core, at most 32.

    Raises:
        OSError: a worker was killed.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    workers = workers or min(cores, 32)
    if workers < 2 or len(chunks) < 4:
        yield from map(function, chunks)
        return
    context = multiprocessing.get_context("fork" if fork else "spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            with contextlib.nullcontext() if fork else _without_main_module():
                results = pool.map(function, chunks)  # starts the workers
            yield from results
    except BrokenExecutor as error:
        raise OSError("a worker process was killed; memory may be short, try again") from error


def may_fork():
    """Whether workers may be forked. CUDA and the threads of torch.distributed do not survive a fork."""
    if sys.platform != "linux":
        return False
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not torch.cuda.is_initialized() and not distributed


@contextlib.contextmanager
def _without_main_module():
    """Workers that start here do not import the user's script.

    Python imports it in each worker that is not forked. That takes seconds, and would run a script that
    has no `if __name__ == "__main__"` once more.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_worker():
    """End this worker when its parent is killed; otherwise it waits for work forever and holds the lock.

    Ctrl-C reaches every process of a terminal: the parent alone acts on it, and stops the workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
