import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TINY = {"sedan": 48, "SUV": 24, "van": 12, "bus": 6}


def run_script(script, cwd, *settings, threads=2):
    """Run a script as a user would; returns the finished process with its output as text."""
    return run_python(cwd, ROOT / script, *settings, threads=threads)


def run_python(cwd, *arguments, threads=2, limit=None):
    """Run Python with these arguments; returns the finished process with its output as text.

    limit: bytes that a file may grow to, as on a disk that is full.
    """
    restrict = limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, preexec_fn=restrict,
    )  # fmt: skip


def run_ranks(ranks, script, cwd, *settings):
    """Run a script on several ranks of one machine, as with torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run_python(cwd, *launch, ROOT / script, *settings, threads=1)


def load(path):
    return torch.load(path, weights_only=True)


def same(one, two):
    """Whether two state dicts hold the same tensors, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def must(process):
    """The output of a process that ended well."""
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory):
    """A demo set of 90 pairs, 4 validation and 6 test scenes."""
    from data.demo import write_demo

    root = tmp_path_factory.mktemp("data") / "demo"
    write_demo(root, train_counts=TINY, val_scenes=4, test_scenes=6)
    return root


@pytest.fixture(scope="session")
def pipeline(tiny_demo, tmp_path_factory):
    """The four scripts on the tiny demo set: the folder they ran in, and what they printed."""
    cwd = tmp_path_factory.mktemp("run")
    printed = {
        "pretrain": must(run_script("pretrain.py", cwd, f"DATA_ROOT={tiny_demo}", "EPOCHS=2")),
        "sar_feature": must(run_script("sar_feature.py", cwd, "EPOCHS=2")),
        "finetune": must(run_script("finetune.py", cwd, "EPOCHS=2")),
        "results": must(run_script("results.py", cwd, "ROTATIONS=0,90")),
    }
    return cwd, printed


@pytest.fixture(scope="session")
def shared():
    """The folder of real chips beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with real chips is not beside this checkout")
    return SHARED
