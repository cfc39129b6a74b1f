"""Kills, signals, full disks, damaged files, changed data and code, bad input: whether a run survives them.

python benchmarks/faults.py [SEED=0] [KILLS=30] [ROWS=SIGKILL,disk]

Every trial disturbs a real run of a script, starts the script again, and checks its output, its files, and
its weights, bit for bit against those of an undisturbed run. Prints a table as it goes and exits with 1 if
a row is below 100 %. About 30 minutes on two cores.
"""

import ctypes
import functools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.demo import write_demo
from utils.run.checkpoint import load_checkpoint
from utils.run.identity import NAMES
from utils.run.settings import read_settings
from utils.run.start import run as run_script

import torch
from PIL import Image, ImageOps

SEED = 0  # of the random moments
KILLS = 30  # of the three training scripts together
SIGNALS = 6  # of the three training scripts together
WRITES = 5  # kills of the demo set and of the store while they are written
STARTS = 6  # pairs of starts in one OUT_DIR, of the three training scripts together
BAD_INPUT = True  # False leaves out the cases of tests/test_bad_input.py
ROWS = ()  # first words of the rows to measure; empty: all

# What follows cannot be set, so the names are in lower case.
root = Path(__file__).resolve().parents[1]
train_counts = {"sedan": 60, "SUV": 30, "van": 12, "bus": 6}
stages = {
    "pretrain.py": ["DATA_ROOT=demo", "EPOCHS=3", "EMA=0.9"],
    "sar_feature.py": ["TEACHER=undisturbed/pretrain.py/best.pt", "EPOCHS=3", "FEATURE_WEIGHT=1"],
    "finetune.py": ["STUDENT=undisturbed/sar_feature.py/best.pt", "EPOCHS=8"],
}
often = ["BATCH_SIZE=16", "SAVE_EVERY_MIN=0"]  # a checkpoint is written at every step
results_settings = [
    "CHECKPOINT=undisturbed/finetune.py/best.pt", "OUT_DIR=undisturbed/results.py", "REPORT=False",
]  # fmt: skip
capbset_drop, dac_override = 24, 1  # numbers of Linux: PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
sentence = re.compile(r"^\S+\.py: .+$", re.MULTILINE)  # how a script ends that cannot go on
write_demo_code = (  # as ensure_demo does, but a small one
    "import os; from data.demo import write_demo; os.path.exists('datasets/demo') or "
    f"write_demo('datasets/demo', train_counts={train_counts}, val_scale=0.05, test_scale=0.05)"
)
write_store_code = (
    "from data.layouts import find_pairs; from data.store import open_store; "
    "open_store(find_pairs('demo').sar * 40, 'store')"
)
double_loss = """

_focal_loss = focal_loss


def focal_loss(*arguments, **options):
    return 2 * _focal_loss(*arguments, **options)
"""


def main():
    read_settings(globals())
    random.seed(SEED)
    print("\n| what happened | times | nothing lost |\n|---|---|---|", flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_demo("demo", train_counts=train_counts, val_scale=0.05, test_scale=0.05)
        seconds = {script: undisturbed(script) for script in stages}
        output_of(start("results.py", *results_settings))
        for name, trials in (
            ("SIGKILL while training", kills(seconds)),
            ("SIGKILL while the demo set is written", writes(write_demo_code, "datasets")),
            ("SIGKILL while a store is written", writes(write_store_code, "store")),
            ("SIGTERM or SIGINT while training", signals(seconds)),
            ("last.pt cut at every tenth of its length", truncations()),
            ("disk full (limit of a file's size)", full_disks()),
            ("folder without permission to write", no_permission()),
            ("training data replaced", replaced_data()),
            ("data and project moved to other folders", moved()),
            ("code changed", changed_code()),
            ("two starts at once in one OUT_DIR", two_starts()),
            ("bad input refused with a sentence", bad_input()),
        ):
            if ROWS and not name.startswith(tuple(ROWS)):
                continue
            passed = list(trials)
            share = sum(passed) / max(len(passed), 1)
            print(f"| {name} | {len(passed)} | {100 * share:.0f} % |", flush=True)
            failed += [name] if share < 1 else []
    if failed:
        raise SystemExit(f"below 100 %: {', '.join(failed)}")


# Each of these yields, for every trial, whether all was as it has to be.


def kills(seconds):
    for script in stages:
        yield from disturbed(script, KILLS // len(stages), [signal.SIGKILL], seconds[script])


def signals(seconds):
    for script in stages:
        yield from disturbed(script, SIGNALS // len(stages), [signal.SIGTERM, signal.SIGINT], seconds[script])


def disturbed(script, times, numbers, seconds):
    """Runs of a script that get signals at random moments, until `times` signals have met one."""
    total, out = 0, Path("disturbed", script)
    while total < times:
        shutil.rmtree(out, ignore_errors=True)
        in_this_run, allowed, code = 0, True, None
        while allowed and code != 0:
            process, number = start(script, f"OUT_DIR={out}"), random.choice(numbers)
            # Mostly during training: the imports take half of the time, and no signal is handled there.
            if number != signal.SIGKILL or random.random() < 0.8:
                wait_for_file(process, out / "last.pt")
            if total + in_this_run < times and still_runs(process, random.uniform(0, 0.15) * seconds):
                process.send_signal(number)
                in_this_run += 1
            _, errors = process.communicate()
            code = process.returncode
            allowed = code in (0, -number, 128 + number) and "Traceback" not in errors
            if not allowed:
                print(f"{script} ended with {code}:\n{errors[-2000:]}", file=sys.stderr)
        yield from [allowed and as_undisturbed(script, out)] * in_this_run
        total += in_this_run


def writes(code, folder):
    """Kills of Python code that writes a folder."""
    output_of(start("-c", code))
    expected = contents(folder)
    for _ in range(WRITES):
        shutil.rmtree(folder)
        process = start("-c", code)
        if still_runs(process, random.uniform(0.5, 6)):
            process.kill()
        process.communicate()
        output_of(start("-c", code))
        yield contents(folder) == expected


def truncations():
    for tenth in range(10):
        script = random.choice(list(stages))
        out = stopped(script)
        last = Path(out, "last.pt")
        last.write_bytes(last.read_bytes()[: last.stat().st_size * tenth // 10])
        printed = output_of(start(script, f"OUT_DIR={out}"))
        yield "goes on from step" in printed and as_undisturbed(script, out)


def full_disks():
    for script in stages:
        out = stopped(script)
        before = Path(out, "last.pt").read_bytes()
        size = random.randrange(len(before))
        is_refused = refused(start(script, f"OUT_DIR={out}", limit=size))
        intact = Path(out, "last.pt").read_bytes() == before
        output_of(start(script, f"OUT_DIR={out}"))
        yield is_refused and intact and as_undisturbed(script, out)
    before = contents("undisturbed/results.py")
    is_refused = refused(start("results.py", *results_settings, limit=1000))
    yield is_refused and contents("undisturbed/results.py") == before
    is_refused = refused(start("pretrain.py", "STORE_DIR=new", "OUT_DIR=new", limit=50_000))
    yield is_refused and not list(Path("new").glob("*.npy")) and not list(Path("new").glob("*.part"))


def no_permission():
    for script in stages:
        out = stopped(script)
        before = contents(out)
        os.chmod(out, 0o555)
        is_refused = refused(start(script, f"OUT_DIR={out}", restricted=True))
        os.chmod(out, 0o755)
        yield is_refused and contents(out) == before


def replaced_data():
    """All training chips of a sensor are inverted in place, after a finished and after an unfinished run."""
    for script in stages:
        shutil.rmtree("replaced", ignore_errors=True)
        shutil.copytree("demo", "replaced")
        out = finished(script)
        before = contents(out)
        again = functools.partial(start, script, f"OUT_DIR={out}", "DATA_ROOT=replaced")
        nothing_new = output_of(again())
        sensor = "SAR_Train" if script == "finetune.py" else "EO_Train"
        for path in Path("replaced", "train", sensor).rglob("*.png"):
            with Image.open(path) as image:
                inverted = ImageOps.invert(image.convert("L"))
            inverted.save(path)
        printed = output_of(again())
        shutil.rmtree("new", ignore_errors=True)
        output_of(start(script, "OUT_DIR=new", "DATA_ROOT=replaced"))
        yield (
            "nothing was trained" in nothing_new
            and f"{NAMES['data']} has changed" in printed
            and contents(f"{out}.1") == before
            and same_weights(out, "new")
            and not same_weights(out, f"{out}.1")
        )
        out = stopped(script)
        before = contents(out)
        is_refused = refused(again(), f"{NAMES['data']} has changed")
        yield is_refused and contents(out) == before


def moved():
    """Data set and project are in other folders when a finished and an unfinished run are started again."""
    project = copied_project("project")
    for script in stages:
        for earlier, message in ((finished, "nothing was trained"), (stopped, "goes on from step")):
            out = earlier(script)
            os.rename("demo", "moved")
            printed = output_of(start(script, f"OUT_DIR={out}", "DATA_ROOT=moved", project=project))
            os.rename("moved", "demo")
            yield message in printed and NAMES["code"] not in printed and as_undisturbed(script, out)


def changed_code():
    """The focal loss is doubled, after a finished and after an unfinished run."""
    project = copied_project("edited")
    with open(project / "models/focal.py", "a") as file:
        file.write(double_loss)
    for script in stages:
        for earlier in (finished, stopped):
            out = earlier(script)
            before = contents(out)
            printed = output_of(start(script, f"OUT_DIR={out}", project=project))
            if earlier is finished:
                as_told = contents(f"{out}.1") == before and "goes on" not in printed
            else:
                as_told = "goes on from step" in printed
            is_named = f"{NAMES['code']} has changed" in printed
            yield as_told and is_named and not same_weights(out, f"undisturbed/{script}")


def two_starts():
    """A second process starts in the OUT_DIR of one that is training."""
    for script in [*stages] * (STARTS // len(stages)):
        out = Path("twice", script)
        shutil.rmtree(out, ignore_errors=True)
        first = start(script, f"OUT_DIR={out}")
        wait_for_file(first, out / "last.pt")
        time.sleep(random.uniform(0, 0.2))
        first.send_signal(signal.SIGSTOP)  # or it could end before the second one has imported its packages
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # a write may end before it stops
        before = contents(out)
        is_refused = refused(start(script, f"OUT_DIR={out}"), "another process")
        intact = contents(out) == before
        first.send_signal(signal.SIGCONT)
        output_of(first)
        yield is_refused and intact and as_undisturbed(script, out)


def bad_input():
    """The cases of tests/test_bad_input.py: the message, and that earlier outputs stay as they are."""
    if BAD_INPUT:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", str(root / "tests/test_bad_input.py")]
        printed = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
        passed, failed = (int((re.search(rf"(\d+) {x}", printed) or [0, 0])[1]) for x in ("passed", "failed"))
        yield from [True] * passed + [False] * failed


# What the trials are made of.


def start(script, *settings, limit=None, restricted=False, project=root):
    """The process of a script, or of Python code ("-c").

    limit: largest size of a file, bytes; restricted: True = a superuser has to obey permissions, too;
    project: folder of the scripts.
    """

    def restrict():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if restricted:
            ctypes.CDLL(None).prctl(capbset_drop, dac_override, 0, 0, 0)

    settings = [*stages.get(script, []), *(often if script in stages else []), *settings]
    project = Path(project).absolute()
    script = script if script == "-c" else project / script
    return subprocess.Popen(
        [sys.executable, str(script), *settings], preexec_fn=restrict, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(project)},
    )  # fmt: skip


def still_runs(process, seconds):
    """Whether a process still runs after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def wait_for_file(process, path):
    """Wait until a process has written a file, or has ended."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
        time.sleep(0.01)


def output_of(process):
    """What a process prints that ends well."""
    printed, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors)
    return printed


def refused(process, words=""):
    """Whether a process ends with a sentence that contains these words."""
    _, errors = process.communicate()
    is_sentence = "Traceback" not in errors and sentence.search(errors) and words in errors
    return process.returncode == 1 and bool(is_sentence)


def undisturbed(script):
    """Seconds of an undisturbed run."""
    started = time.perf_counter()
    output_of(start(script, f"OUT_DIR=undisturbed/{script}"))
    return time.perf_counter() - started


def finished(script):
    """Folder of a copy of the undisturbed run."""
    return copied_run(f"undisturbed/{script}")


def stopped(script):
    """Folder of a copy of a run that was stopped after two checkpoints or more."""
    return copied_run(stopped_once(script))


@functools.cache
def stopped_once(script):
    out = Path("stopped", script)
    process = start(script, f"OUT_DIR={out}")
    wait_for_file(process, out / "last.previous.pt")
    process.terminate()
    process.communicate()
    return out


def copied_run(folder):
    """A copy of a run's folder for one trial, without the folders that an earlier trial kept beside it."""
    out = Path("again", Path(folder).name)
    for old in (out, Path(f"{out}.1")):
        shutil.rmtree(old, ignore_errors=True)
    return shutil.copytree(folder, out)


def copied_project(folder):
    """A copy of the scripts and their packages."""
    shutil.rmtree(folder, ignore_errors=True)
    for package in ("data", "models", "utils"):
        shutil.copytree(root / package, Path(folder, package), ignore=shutil.ignore_patterns("__pycache__"))
    for script in stages:
        shutil.copy(root / script, folder)
    return Path(folder)


def same_weights(out, other):
    """Whether two runs have the same weights, bit for bit, in best.pt and in last.pt."""
    for name in ("best.pt", "last.pt"):
        one, two = (load_checkpoint(f"{folder}/{name}", "")["model"] for folder in (out, other))
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            return False
    return True


def as_undisturbed(script, out):
    """Whether a run ended with the weights of the undisturbed one."""
    same = same_weights(out, f"undisturbed/{script}")
    if not same:
        print(f"{out} has other weights than the undisturbed run", file=sys.stderr)
    return same


def contents(folder):
    """{file: bytes} of a folder, without lock files."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    run_script(main)
