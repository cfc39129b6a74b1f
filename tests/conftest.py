import multiprocessing
import os
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Of the processes that the tests start.
os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
# The tests compute on the CPU, where runs are equal bit for bit; only tests/test_cuda.py uses a GPU.
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if torch.cuda.device_count() else ""
os.environ["CUDA_VISIBLE_DEVICES"] = ""
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["data", "pretrain", "sar_feature", "finetune", "results", "torch._dynamo", "sklearn.manifold", "scipy.stats",
     "utils.predict.clusters", "utils.report.curves", "utils.report.page", "pytest", "tests.conftest"]
)  # fmt: skip
SHARED, DEMO, PIPELINE = pytest.StashKey(), pytest.StashKey(), pytest.StashKey()
AHEAD = ThreadPoolExecutor(1)  # makes what many tests share, on the second core, while the first tests run
TINY = {"sedan": 60, "SUV": 30, "van": 15, "bus": 9}  # a third of them is held out, one individual of each class


def run_script(script, cwd, *settings, threads=2, environment=None):
    """Run a script as a user would; returns the finished process with its output as text."""
    return run_python(cwd, ROOT / script, *settings, threads=threads, environment=environment)


def run_python(cwd, *arguments, threads=2, limit=None, environment=None):
    """Run Python with these arguments; returns the finished process with its output as text.

    The process is forked from one that has imported all that the scripts import and done nothing
    else, since that takes longer than most runs of the tests.

    limit: bytes that a file may grow to, as on a disk that is full.
    environment: variables that are set for the process.
    """
    arguments = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as folder:
        out, err = f"{folder}/out", f"{folder}/err"
        process = FORKED.Process(target=_run, args=(cwd, arguments, out, err, threads, limit, environment or {}))
        process.start()
        process.join(600)
        said = [Path(path).read_text(errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def _run(cwd, arguments, out, err, threads, limit, environment):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ |= environment
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=environment.get("PYTHONIOENCODING"))
    os.chdir(cwd)
    torch.set_num_threads(threads)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    code, *rest = arguments
    if code == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(code, {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(code, run_name="__main__")


def run_ranks(ranks, script, cwd, *settings):
    """Run a script on several ranks of one machine, as with torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launch, *map(str, (ROOT / script, *settings))], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
    )  # fmt: skip


def write_chip(path, level=100):
    """A grey image of 8 px, in folders that are made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)


def load(path):
    return torch.load(path, weights_only=True)


def same(one, two):
    """Whether two state dicts hold the same tensors, bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def must(process):
    """The output of a process that ended well."""
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def pytest_sessionstart(session):
    AHEAD.submit(run_python, ROOT, "-c", "")  # the imports of the process that the others are forked from


def pytest_collection_finish(session):
    wanted = {name for item in session.items for name in item.fixturenames}
    folder = session.config.stash[SHARED] = Path(tempfile.mkdtemp(prefix="tests-"))
    if wanted & {"tiny_demo", "pipeline"}:
        session.config.stash[DEMO] = AHEAD.submit(make_demo, folder / "demo")
    if "pipeline" in wanted:
        session.config.stash[PIPELINE] = AHEAD.submit(run_pipeline, folder / "demo", folder / "run")


def pytest_unconfigure(config):
    AHEAD.shutdown(cancel_futures=True)
    if SHARED in config.stash:
        shutil.rmtree(config.stash[SHARED], ignore_errors=True)


def make_demo(root):
    """A demo set of 114 pairs, with 57 validation and 71 test chips."""
    code = f"write_demo({str(root)!r}, train_counts={TINY}, val_scale=0.04, test_scale=0.05)"
    must(run_python(ROOT, "-c", f"from data.demo import write_demo; {code}"))
    return root


def run_pipeline(demo, cwd):
    """Run the four scripts on the tiny demo set; returns the folder they ran in, and what they printed."""
    cwd.mkdir()
    printed = {
        "pretrain": must(run_script("pretrain.py", cwd, f"DATA_ROOT={demo}", "EPOCHS=2")),
        "sar_feature": must(run_script("sar_feature.py", cwd, "EPOCHS=2")),
        "finetune": must(run_script("finetune.py", cwd, "EPOCHS=2")),
        "results": must(run_script("results.py", cwd, "ROTATIONS=0,90")),
    }
    return cwd, printed


@pytest.fixture(scope="session")
def tiny_demo(request):
    """The folder of the tiny demo set."""
    return request.config.stash[DEMO].result()


@pytest.fixture(scope="session")
def pipeline(request):
    """The folder of the four scripts' runs on the tiny demo set, and what they printed."""
    return request.config.stash[PIPELINE].result()


@pytest.fixture(scope="session")
def mstar():
    """EO/SAR pairs of MSTAR, in the layout of 2024."""
    return real_chips("mstar_pairs")


@pytest.fixture(scope="session")
def unicorn():
    """SAR chips of UNICORN without labels."""
    return real_chips("unicorn_sar")


def real_chips(name):
    """A folder of real chips beside the checkout; a test that asks for it is skipped without it."""
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"the real chips shared/{name} are not beside this checkout")
    return folder
