import errno
import multiprocessing
import os
import subprocess
import sys
import time

from data.lock import locked
from data.workers import map_in_processes
from tests.conftest import ROOT

import pytest

fcntl = pytest.importorskip("fcntl")
# Prints "held" once it holds the lock, then keeps it until it is killed.
HOLD = """
import sys, time
from data.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def is_free(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_killed_holder_does_not_block_the_next_process(tmp_path, capsys):
    path = str(tmp_path / "folder" / "lock")
    process = hold(path)
    try:
        assert not is_free(path)
    finally:
        process.kill()
        process.wait()
    started = time.monotonic()
    with locked(path):
        assert not is_free(path)
    assert is_free(path) and time.monotonic() - started < 5
    assert capsys.readouterr().out == "" and os.listdir(tmp_path / "folder") == ["lock"]


@pytest.mark.parametrize("fork", [True, False])
def test_worker_processes_do_not_free_the_lock_of_their_parent(tmp_path, fork):
    path = str(tmp_path / "lock")
    if fork and "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork here")
    with locked(path):
        assert list(map_in_processes(time.sleep, [0.02] * 8, fork)) == [None] * 8
        assert not is_free(path)
    assert is_free(path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named_and_the_work_goes_on(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    done = []
    with locked(tmp_path / "lock"):
        done.append(True)
    printed = capsys.readouterr().out
    assert done and f"the file system of {tmp_path} has no locks" in printed and "two runs" in printed
    assert printed.count("\n") == 1


def test_other_errors_of_the_folder_are_raised(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        with locked(tmp_path / "file" / "lock"):
            pass
