"""Runs that are stopped go on to the same weights, and nothing that was there is lost."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT, load, must, run_python, run_script, same
from utils.run.checkpoint import save_checkpoint
from utils.run.lock import held
from utils.run.resume import Run, _set_aside

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

# Runs a script that gets a signal at a step, or (signal 0) whose losses are not finite from there on.
STOPPED = """
import os, runpy, sys
from utils.train.learner import Learner
take, at, number = Learner.step, int(sys.argv[1]), int(sys.argv[2])
def step(self, batch):
    if batch.step == at and number:
        os.kill(os.getpid(), number)
    if batch.step == at and not number:
        loss_of = self.modules.loss_of
        def lost(batch):
            loss, logits, labels = loss_of(batch)
            return loss / 0, logits * float("nan"), labels
        self.modules.loss_of = lost
    return take(self, batch)
Learner.step = step
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def stopped(script, cwd, step, number, *settings):
    """The process of a script that is sent a signal at a step."""
    return run_python(cwd, "-c", STOPPED, step, int(number), ROOT / script, *settings)


def model(path):
    return load(path)["model"]


SETTINGS = {
    "pretrain.py": ["EPOCHS=3", "EMA=0.9", "BATCH_SIZE=16"],
    "sar_feature.py": ["EPOCHS=3", "FEATURE_WEIGHT=1", "BATCH_SIZE=16"],
    "finetune.py": ["EPOCHS=3", "BATCH_SIZE=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", list(SETTINGS))
def test_a_stopped_run_ends_with_the_same_weights(pipeline, tiny_demo, script):
    """Stopped by the scheduler within the first epoch, killed within the second, after a late start."""
    cwd, _ = pipeline
    settings = [*SETTINGS[script], f"DATA_ROOT={tiny_demo}", "SAVE_EVERY_MIN=0"]
    must(run_script(script, cwd, *settings, f"OUT_DIR=whole_{script}"))
    out = f"OUT_DIR=parts_{script}"
    first = stopped(script, cwd, 2, signal.SIGTERM, *settings, out)
    assert first.returncode == 128 + signal.SIGTERM and "stopped at step 3" in first.stderr
    second = stopped(script, cwd, 8, signal.SIGKILL, *settings, out)
    assert second.returncode == -signal.SIGKILL and "goes on from step 3" in second.stdout
    # At the last step of the second epoch, whose validation is then yet to come.
    last = load(cwd / f"whole_{script}/last.pt")["run"]["steps"] // 3 * 2
    third = stopped(script, cwd, last - 1, signal.SIGTERM, *settings, out)
    assert "goes on from step 8" in third.stdout and f"stopped at step {last};" in third.stderr
    assert f"goes on from step {last}" in must(run_script(script, cwd, *settings, out))
    for name in ("best.pt", "last.pt"):
        assert same(model(cwd / f"whole_{script}" / name), model(cwd / f"parts_{script}" / name)), name
    assert len((cwd / f"parts_{script}/history.csv").read_text().splitlines()) == 4


@pytest.mark.slow
def test_tensorboard_shows_the_history_of_a_stopped_run(pipeline, tiny_demo):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cwd, _ = pipeline
    settings = [f"DATA_ROOT={tiny_demo}", "EPOCHS=3", "BATCH_SIZE=16", "OUT_DIR=board", "TENSORBOARD=True"]
    assert stopped("pretrain.py", cwd, 12, signal.SIGTERM, *settings).returncode == 128 + signal.SIGTERM
    must(run_script("pretrain.py", cwd, *settings))
    events = reading.EventAccumulator(str(cwd / "board")).Reload()
    for row in csv.DictReader(open(cwd / "board/history.csv")):
        for name, value in row.items():
            if name != "epoch":
                shown = [x.value for x in events.Scalars(name) if x.step == int(row["epoch"])]
                assert shown == pytest.approx([float(value)]), name


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(pipeline, tiny_demo):
    cwd, _ = pipeline
    process = stopped("pretrain.py", cwd, 1, signal.SIGINT, f"DATA_ROOT={tiny_demo}", "OUT_DIR=ctrl_c")
    assert process.returncode == 130 and "Traceback" not in process.stderr
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, str(ROOT / "pretrain.py"), f"DATA_ROOT={tiny_demo}", "EPOCHS=500"]
    process = subprocess.Popen(
        [*arguments, "OUT_DIR=ctrl_c_twice"], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while "epoch 1/" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)  # so that the two do not arrive as one
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    assert load(cwd / "ctrl_c_twice/last.pt")["epoch"] >= 1


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_taken(pipeline, tmp_path, capsys):
    cwd, _ = pipeline
    for name in ("last.pt", "last.previous.pt"):
        shutil.copy(cwd / "runs/pretrain" / name, tmp_path)
    undamaged = (tmp_path / "last.pt").read_bytes()
    settings = load(tmp_path / "last.pt")["settings"] | {"OUT_DIR": str(tmp_path)}
    newest_step = load(tmp_path / "last.pt")["run"]["step"]

    def earlier():
        held.close()  # as at the end of a script
        return Run("pretrain", settings).earlier

    flipped = bytearray(undamaged)
    flipped[len(undamaged) // 2] ^= 1
    assert earlier()["run"]["step"] == newest_step
    for damaged in [bytes(flipped), *(undamaged[: len(undamaged) * tenth // 10] for tenth in range(10))]:
        (tmp_path / "last.pt").write_bytes(damaged)
        assert earlier()["run"]["step"] < newest_step
        assert "last.pt" in capsys.readouterr().out and (tmp_path / "last.damaged.pt").exists()
        assert not (tmp_path / "last.pt").exists()
    (tmp_path / "last.previous.pt").write_bytes(b"")
    held.close()
    run = Run("pretrain", settings)
    assert run.earlier is None and run.begin({})
    assert run.restore(None) == ([], -1.0, 0)
    run.save("best.pt", {})  # trained anew; the damaged files are kept
    assert (tmp_path.parent / f"{tmp_path.name}.1/last.previous.damaged.pt").exists()


SMALL = ["EPOCHS=2", "BATCH_SIZE=16", "IMAGE_SIZE=16", "TRAIN_SCALES=1"]


@pytest.mark.slow
def test_a_finished_run_is_what_it_was_made_from(tiny_demo, tmp_path):
    """The same one is not trained again, wherever its data lies; another one is, and the earlier one is kept."""
    shutil.copytree(tiny_demo, tmp_path / "here")
    first = must(run_script("pretrain.py", tmp_path, "DATA_ROOT=here", *SMALL))
    assert "written: runs/pretrain/best.pt" in first
    content = (tmp_path / "runs/pretrain/last.pt").read_bytes()

    def again(*settings):
        printed = must(run_script("pretrain.py", tmp_path, *SMALL, *settings))
        set_aside = [path for path in tmp_path.glob("runs/pretrain.*/last.pt") if path.read_bytes() == content]
        return printed, set_aside

    shutil.move(tmp_path / "here", tmp_path / "there")
    printed, set_aside = again("DATA_ROOT=there", "DEVICE=cpu")
    assert "nothing was trained: runs/pretrain holds this run already, finished on 20" in printed and not set_aside
    assert "written" not in printed and "RESUME=False trains it anew" in printed and "next: python sar" in printed
    for path in (tmp_path / "there/train/EO_Train").rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    printed, set_aside = again("DATA_ROOT=there")
    assert "runs/pretrain is trained anew: the data" in printed and "is kept as runs/pretrain.1" in printed
    assert "epoch 2/2" in printed and len(set_aside) == 1
    assert not same(model(set_aside[0]), model(tmp_path / "runs/pretrain/last.pt"))
    printed, _ = again("DATA_ROOT=there", "SEED=5")
    assert "anew: SEED was 0, is 5" in printed and "is kept as runs/pretrain.2" in printed
    printed, _ = again("DATA_ROOT=there", "SEED=5", "RESUME=False")
    assert "is kept as runs/pretrain.3" in printed and "epoch 2/2" in printed


@pytest.mark.slow
def test_an_unfinished_run_is_what_it_was_made_from(tiny_demo, tmp_path):
    shutil.copytree(tiny_demo, tmp_path / "here")
    stopped("pretrain.py", tmp_path, 3, signal.SIGTERM, "DATA_ROOT=here", *SMALL)
    before = (tmp_path / "runs/pretrain/last.pt").read_bytes()
    path = next((tmp_path / "here/train/EO_Train").rglob("*.png"))
    content = path.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    process = run_script("pretrain.py", tmp_path, "DATA_ROOT=here", *SMALL)
    assert process.returncode == 1 and "the data (pixels, labels or class names) has changed" in process.stderr
    assert (tmp_path / "runs/pretrain/last.pt").read_bytes() == before
    path.write_bytes(content)
    assert "goes on from step 4" in must(run_script("pretrain.py", tmp_path, "DATA_ROOT=here", *SMALL))


@pytest.mark.slow
def test_other_code_is_another_run(tiny_demo, tmp_path):
    """Of a copy of the project, whose focal loss changes: a finished run is trained anew, an unfinished one goes on."""
    project = tmp_path / "project"
    for folder in ("data", "models", "utils"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain.py", project)
    settings = [f"DATA_ROOT={tiny_demo}", *SMALL]

    def run(*settings, step=-1):
        code = STOPPED.replace("import os, runpy, sys", f"import os, runpy, sys\nsys.path.insert(0, {str(project)!r})")
        (tmp_path / "run.py").write_text(code)
        command = [sys.executable, "run.py", str(step), str(int(signal.SIGTERM)), str(project / "pretrain.py")]
        environment = os.environ | {"PYTHONPATH": str(project)}
        return subprocess.run(
            [*command, *settings], cwd=tmp_path, env=environment, capture_output=True, text=True
        )  # fmt: skip

    assert "written" in must(run(*settings, "OUT_DIR=finished"))
    assert run(*settings, "OUT_DIR=unfinished", step=3).returncode == 128 + signal.SIGTERM
    focal = project / "models/focal.py"
    text = focal.read_text()
    focal.write_text(text.replace("return loss.mean()", "return 2 * loss.mean()"))
    assert focal.read_text() != text
    before = (tmp_path / "finished/best.pt").read_bytes()
    focal.write_text(text.replace("return loss.mean()", "return unknown_name"))
    crashed = run(*settings, "OUT_DIR=finished")
    assert crashed.returncode == 1 and "finished holds best.pt" in crashed.stderr
    assert (tmp_path / "finished/best.pt").read_bytes() == before  # renamed when there is something to replace it
    focal.write_text(text.replace("return loss.mean()", "return 2 * loss.mean()"))
    printed = must(run(*settings, "OUT_DIR=finished"))
    assert "trained anew: the source code has changed" in printed and "is kept as finished.1" in printed
    printed = must(run(*settings, "OUT_DIR=unfinished"))
    assert "the source code has changed since this run was started" in printed and "goes on from step 4" in printed


@pytest.mark.slow
def test_a_second_start_in_one_folder_is_refused(tiny_demo, tmp_path):
    settings = [f"DATA_ROOT={tiny_demo}", *SMALL]
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs/pretrain.lock"):
        process = run_script("pretrain.py", tmp_path, *settings)
        assert process.returncode == 1 and "another process writes into OUT_DIR runs/pretrain" in process.stderr
        must(run_script("pretrain.py", tmp_path, *settings, "OUT_DIR=other"))
    must(run_script("pretrain.py", tmp_path, *settings))


@pytest.mark.slow
def test_the_next_command_takes_what_was_made(tiny_demo, tmp_path):
    settings = [f"DATA_ROOT={tiny_demo}", *SMALL]
    printed = must(run_script("pretrain.py", tmp_path, *settings, "OUT_DIR=my runs/a"))
    assert "next: python sar_feature.py TEACHER='my runs/a/best.pt'\n" in printed
    printed = must(run_script("pretrain.py", tmp_path, *settings, "SENSOR=SAR"))
    assert "next: python results.py CHECKPOINT=runs/pretrain/best.pt\n" in printed
    must(run_script("results.py", tmp_path, "CHECKPOINT=runs/pretrain/best.pt", "REPORT=False"))


@pytest.mark.slow
def test_a_run_from_another_checkpoint_is_another_run(pipeline, tiny_demo):
    cwd, _ = pipeline
    settings = [f"DATA_ROOT={tiny_demo}", "EPOCHS=1", "OUT_DIR=taught", "TEACHER=teacher.pt"]
    teacher = load(cwd / "runs/pretrain/best.pt")
    for kept in (0, 0, 1):
        if kept:
            teacher["model"]["head.bias"] += 1
        save_checkpoint(cwd / "teacher.pt", teacher)
        must(run_script("sar_feature.py", cwd, *settings))
        assert len(list(cwd.glob("taught.*/last.pt"))) == kept


@pytest.mark.slow
def test_an_unfinished_run_with_other_settings_ends_with_a_sentence(pipeline, tiny_demo):
    cwd, _ = pipeline
    settings = [f"DATA_ROOT={tiny_demo}", "OUT_DIR=unfinished"]
    stopped("pretrain.py", cwd, 1, signal.SIGTERM, *settings)
    before = (cwd / "unfinished/last.pt").read_bytes()
    process = run_script("pretrain.py", cwd, *settings, "LEARNING_RATE=1e-3")
    assert process.returncode == 1 and "LEARNING_RATE was 0.002, is 0.001" in process.stderr
    assert (cwd / "unfinished/last.pt").read_bytes() == before


@pytest.mark.slow
def test_steps_without_a_finite_loss_change_nothing_and_end_the_run(pipeline, tiny_demo):
    cwd, _ = pipeline
    settings = [f"DATA_ROOT={tiny_demo}", "BATCH_SIZE=16", "MAX_BAD_STEPS=5"]
    stopped("pretrain.py", cwd, 5, signal.SIGTERM, *settings, "OUT_DIR=wanted")
    process = stopped("pretrain.py", cwd, 6, 0, *settings, "OUT_DIR=lost")
    assert process.returncode == 1 and "steps in a row gave no finite loss" in process.stderr
    assert ".png" in process.stderr
    found, wanted = (model(cwd / out / "last.pt") for out in ("lost", "wanted"))
    assert same(found, wanted)


@pytest.mark.slow
def test_a_full_disk_ends_with_a_sentence_and_leaves_what_was_there(pipeline, tiny_demo):
    cwd, _ = pipeline
    settings = [f"DATA_ROOT={tiny_demo}", "OUT_DIR=full"]
    stopped("pretrain.py", cwd, 1, signal.SIGTERM, *settings)
    before = (cwd / "full/last.pt").read_bytes()
    process = run_python(cwd, ROOT / "pretrain.py", *settings, limit=100_000)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "pretrain.py: full/" in process.stderr and "File too large" in process.stderr
    assert (cwd / "full/last.pt").read_bytes() == before
    assert "goes on from step 2" in must(run_script("pretrain.py", cwd, *settings))
    # The store, and what results.py writes.
    process = run_python(cwd, ROOT / "pretrain.py", *settings, "STORE_DIR=full_store", limit=50_000)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert not list((cwd / "full_store").glob("*.*"))
    before = {path: path.read_bytes() for path in (cwd / "runs/results").iterdir()}
    process = run_python(cwd, ROOT / "results.py", "SCALES=1", limit=1000)  # above what it prints
    assert process.returncode == 1 and "runs/results/results.csv: File too large" in process.stderr
    assert {path: path.read_bytes() for path in (cwd / "runs/results").iterdir()} == before


def test_what_a_killed_process_left_unfinished_is_cleared_away(pipeline, tiny_demo):
    cwd, _ = pipeline
    left, others = cwd / "runs/pretrain/last.pt.77.part", cwd / "runs/pretrain/film.mp4.part"
    left.write_bytes(b"half"), others.write_bytes(b"half")
    must(run_script("pretrain.py", cwd, f"DATA_ROOT={tiny_demo}", "EPOCHS=2"))
    assert not left.exists() and others.exists()
    others.unlink()


@pytest.mark.parametrize("out_dir", [".", "link"])
def test_an_earlier_run_in_a_folder_that_cannot_be_renamed_is_kept_inside(tmp_path, monkeypatch, capsys, out_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir(), (tmp_path / "link").symlink_to("real")
    out = Path(out_dir)
    for number in (1, 2):
        for name in ("best.pt", "last.previous.pt", "history.csv", "notes.txt"):
            (out / name).write_text(str(number))
        _set_aside(out)
        assert f"is kept as {out / f'earlier.{number}'}" in capsys.readouterr().out
        assert (out / f"earlier.{number}/last.previous.pt").read_text() == str(number)
        assert not (out / "best.pt").exists() and (out / "notes.txt").read_text() == str(number)


@pytest.mark.slow
def test_a_run_whose_best_checkpoint_is_gone(tiny_demo, tmp_path):
    must(run_script("pretrain.py", tmp_path, f"DATA_ROOT={tiny_demo}", *SMALL))
    (tmp_path / "runs/pretrain/best.pt").rename(tmp_path / "teacher.pt")
    process = run_script("pretrain.py", tmp_path, f"DATA_ROOT={tiny_demo}", *SMALL)
    assert process.returncode == 1 and "but its best.pt is gone; put it back" in process.stderr
    # An unfinished run writes one after its next epoch, also if this one is worse.
    out = "OUT_DIR=part"
    stopped("pretrain.py", tmp_path, 3, signal.SIGTERM, f"DATA_ROOT={tiny_demo}", *SMALL, out)
    last = load(tmp_path / "part/last.pt")
    last["run"]["best"] = 2.0
    save_checkpoint(tmp_path / "part/last.pt", last)
    (tmp_path / "part/best.pt").unlink(missing_ok=True)
    must(run_script("pretrain.py", tmp_path, f"DATA_ROOT={tiny_demo}", *SMALL, out))
    assert (tmp_path / "part/best.pt").exists()
