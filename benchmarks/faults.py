"""Kills, signals, full disks, damaged files, bad input: what of a run is left, in figures.

python benchmarks/faults.py [SEED=0] [KILLS=30]

Every trial hurts a real run of a script at a random moment, starts the script again, and compares
its weights bit for bit with those of a run that nothing happened to. Prints a table as it goes and
exits with 1 where a row is below 100 %. Under 15 minutes on two cores.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.demo.writer import write_demo  # noqa: E402
from utils.run.checkpoint import checksum, load_checkpoint  # noqa: E402
from utils.run.settings import read_settings, run  # noqa: E402

SEED = 0  # of the random moments
KILLS = 30  # of the three training scripts together
SIGNALS = 6  # likewise
WRITES = 5  # kills of the demo set and of the store while they are written
BAD_INPUT = True  # False leaves out the table of tests/test_bad_input.py

TRAIN = {"sedan": 60, "SUV": 30, "van": 12, "bus": 6}
STAGES = {
    "pretrain.py": ["DATA_ROOT=demo", "EPOCHS=3", "EMA=0.9"],
    "sar_feature.py": ["TEACHER=whole/pretrain.py/best.pt", "EPOCHS=3", "FEATURE_WEIGHT=1"],
    "finetune.py": ["STUDENT=whole/sar_feature.py/best.pt", "EPOCHS=8"],
}
RESULTS = ["CHECKPOINT=whole/finetune.py/best.pt", "OUT_DIR=whole/results.py", "REPORT=False"]
OFTEN = ["BATCH_SIZE=16", "SAVE_EVERY_MIN=0"]  # a checkpoint is written at every step
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux
SENTENCE = re.compile(r"^\S+\.py: .+$", re.MULTILINE)  # how scripts end that were refused something
WRITE_DEMO = (  # as ensure_demo does, but a small one
    "import os; from data.demo.writer import write_demo; os.path.exists('datasets/demo') or "
    f"write_demo('datasets/demo', train_counts={TRAIN}, val_scenes=4, test_scenes=4)"
)
WRITE_STORE = (
    "from data.layouts import find_pairs; from data.store import open_store; "
    "open_store(find_pairs('demo').sar * 40, 'store')"
)


def main():
    read_settings(globals())
    random.seed(SEED)
    print("\n| what happened | times | nothing lost |\n|---|---|---|", flush=True)
    short = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_demo("demo", train_counts=TRAIN, val_scenes=4, test_scenes=4)
        seconds = {script: whole(script) for script in STAGES}
        must(start("results.py", *RESULTS))
        for name, trials in (
            ("SIGKILL while training", kills(seconds)),
            ("SIGKILL while the demo set is written", writes(WRITE_DEMO, lambda: tree("datasets"))),
            ("SIGKILL while a store is written", writes(WRITE_STORE, lambda: tree("store"))),
            ("SIGTERM or SIGINT while training", signals(seconds)),
            ("last.pt cut at every tenth of its length", truncations()),
            ("disk full (limit of a file's size)", full_disks()),
            ("folder without permission to write", forbidden()),
            ("bad input refused with a sentence", bad_input()),
        ):
            done = list(trials)
            share = sum(done) / max(len(done), 1)
            print(f"| {name} | {len(done)} | {100 * share:.0f} % |", flush=True)
            short += [name] if share < 1 else []
    if short:
        raise SystemExit(f"below 100 %: {', '.join(short)}")


# Each of these yields, for every trial, whether all was as it has to be.


def kills(seconds):
    for script in STAGES:
        yield from hurt(script, KILLS // len(STAGES), [signal.SIGKILL], seconds[script])


def signals(seconds):
    for script in STAGES:
        yield from hurt(script, SIGNALS // len(STAGES), [signal.SIGTERM, signal.SIGINT], seconds[script])


def hurt(script, times, numbers, seconds):
    """Runs of a script that get signals at random moments, until so many have met one."""
    met, out = 0, Path("hurt", script)
    while met < times:
        shutil.rmtree(out, ignore_errors=True)
        here, sound, code = 0, True, None
        while sound and code != 0:
            process, number = start(script, f"OUT_DIR={out}"), random.choice(numbers)
            # Mostly amid steps and checkpoints; the imports, which take half of the time, know no signal.
            if number != signal.SIGKILL or random.random() < 0.8:
                written(process, out / "last.pt")
            if met + here < times and lasts(process, random.uniform(0, 0.15) * seconds):
                process.send_signal(number)
                here += 1
            _, said = process.communicate()
            code = process.returncode
            sound = code in (0, -number, 128 + number) and "Traceback" not in said
            if not sound:
                print(f"{script} ended with {code}:\n{said[-2000:]}", file=sys.stderr)
        yield from [sound and same(script, out)] * here
        met += here


def writes(code, result):
    must(start("-c", code))
    wanted = result()
    for _ in range(WRITES):
        for folder in ("datasets", "store"):
            shutil.rmtree(folder, ignore_errors=True)
        process = start("-c", code)
        if lasts(process, random.uniform(0.5, 6)):
            process.kill()
        process.communicate()
        must(start("-c", code))
        yield result() == wanted


def truncations():
    for tenth in range(10):
        script = random.choice(list(STAGES))
        out = stopped(script)
        last = Path(out, "last.pt")
        last.write_bytes(last.read_bytes()[: last.stat().st_size * tenth // 10])
        said = must(start(script, f"OUT_DIR={out}"))
        yield "goes on from step" in said and same(script, out)


def full_disks():
    for script in STAGES:
        out = stopped(script)
        before = Path(out, "last.pt").read_bytes()
        size = random.randrange(len(before))
        refused = sentence(start(script, f"OUT_DIR={out}", limit=size))
        intact = Path(out, "last.pt").read_bytes() == before
        must(start(script, f"OUT_DIR={out}"))
        yield refused and intact and same(script, out)
    before = tree("whole/results.py")
    yield sentence(start("results.py", *RESULTS, limit=500)) and tree("whole/results.py") == before
    refused = sentence(start("pretrain.py", "STORE_DIR=new", "OUT_DIR=new", limit=50_000))
    yield refused and not list(Path("new").glob("*.npy")) and not list(Path("new").glob("*.part"))


def forbidden():
    for script in STAGES:
        out = stopped(script)
        before = tree(out)
        os.chmod(out, 0o555)
        refused = sentence(start(script, f"OUT_DIR={out}", bound=True))
        os.chmod(out, 0o755)
        yield refused and tree(out) == before


def bad_input():
    """The table of cases in the tests; each checks the message, and that earlier outputs are untouched."""
    if BAD_INPUT:
        tests = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/test_bad_input.py")]
        said = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True).stdout
        good, bad = (int((re.search(rf"(\d+) {what}", said) or [0, 0])[1]) for what in ("passed", "failed"))
        yield from [True] * good + [False] * bad


# What they are made of.


def start(script, *settings, limit=None, bound=False):
    """The process of a script, or of Python code ("-c"); limit: bytes of a file, at most."""

    def restrict():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if bound:  # the superuser may write anywhere, unless CAP_DAC_OVERRIDE is dropped
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)

    settings = [*STAGES.get(script, []), *(OFTEN if script in STAGES else []), *settings]
    script = script if script == "-c" else ROOT / script
    return subprocess.Popen(
        [sys.executable, str(script), *settings], preexec_fn=restrict, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def lasts(process, seconds):
    """Whether a process still runs after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def written(process, path):
    """Wait until a process has written a file, or has ended."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None and not (path.exists() and path.stat().st_mtime_ns > before):
        time.sleep(0.01)


def must(process):
    """What a process printed that ended well."""
    said, wrong = process.communicate()
    if process.returncode:
        raise RuntimeError(wrong)
    return said


def sentence(process):
    """Whether a process ended as a script does that cannot go on."""
    _, wrong = process.communicate()
    return process.returncode == 1 and "Traceback" not in wrong and bool(SENTENCE.search(wrong))


def whole(script):
    """Seconds of a run that nothing happens to."""
    started = time.perf_counter()
    must(start(script, f"OUT_DIR=whole/{script}"))
    return time.perf_counter() - started


def stopped(script):
    """The folder of a run that was stopped after two checkpoints or more: a copy for each trial."""
    out = Path("again", script)
    shutil.rmtree(out, ignore_errors=True)
    return shutil.copytree(stopped_once(script), out)


@functools.cache
def stopped_once(script):
    out = Path("stopped", script)
    process = start(script, f"OUT_DIR={out}")
    written(process, out / "last.previous.pt")
    process.terminate()
    process.communicate()
    return out


def same(script, out):
    """Whether a run came to the weights of the one that nothing happened to."""
    for name in ("best.pt", "last.pt"):
        found, wanted = (load_checkpoint(f"{folder}/{name}", script) for folder in (out, f"whole/{script}"))
        if checksum(found["model"]) != checksum(wanted["model"]):
            print(f"{out}/{name} has other weights, after epoch {found['epoch']}", file=sys.stderr)
            return False
    return True


def tree(folder):
    """{file: content} of a folder; a store's name holds the times of its files, a lock nothing."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path): path.read_bytes() for path in files}


if __name__ == "__main__":
    run(main)
