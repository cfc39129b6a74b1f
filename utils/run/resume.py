"""Resuming a run: earlier checkpoints in its folder, signals, and keeping earlier runs."""

import contextlib
import os
import shlex
import signal
import time
from itertools import count
from pathlib import Path

from utils.run.checkpoint import load_checkpoint, save_checkpoint
from utils.run.files import remove_temporary
from utils.run.identity import NAMES
from utils.run.lock import refuse_second_start
from utils.run.ranks import on_rank_0, rank, world_size
from utils.run.rules import NO_EFFECT
from utils.run.settings import CheckpointError, SettingError, check

WRITTEN = "best.pt", "last*.pt", "history.csv", "curves.png", "events.out.tfevents.*"  # by a run, into its folder


class Run:
    """A training run in its folder OUT_DIR: what it goes on from, and what it saves.

    Args:
        stage: "pretrain", "sar_feature" or "finetune".
        settings: the script's constants.

    Attributes:
        batch_size: chips a step, on all ranks together: BATCH_SIZE for each rank, or that of the unfinished run
            with the same settings, which may have had another number of ranks.

    Raises:
        SettingError: another process runs in this folder; or fewer chips a step than ranks.
    """

    def __init__(self, stage, settings):
        self.stage, self.settings, self.set_aside = stage, settings, ""  # why an earlier run is set aside
        self.trained = False
        self.out_dir, self.save_every_min = Path(settings["OUT_DIR"]), settings["SAVE_EVERY_MIN"]
        on_rank_0(lambda: refuse_second_start(self.out_dir))
        self.earlier = on_rank_0(self._newest) if settings["RESUME"] else None
        self.batch_size = settings["BATCH_SIZE"] * world_size()
        same_size = self.earlier and self.earlier["settings"].get("BATCH_SIZE") == settings["BATCH_SIZE"]
        if same_size and not self._is_finished() and not self._changed_settings():
            self.batch_size = self.earlier["run"]["batch"]
        check(
            self.batch_size >= world_size(),
            f"the run in {self.out_dir} has {self.batch_size} chips a step, too few for {world_size()} ranks",
        )

    def begin(self, made_from):
        """Decide what becomes of an earlier run in the folder.

        An unfinished run is resumed if settings, data and the checkpoint before are the same. A finished one
        that differs will be kept under another name; nothing is renamed before this one saves.

        Args:
            made_from: of `utils.run.identity.made_from`.

        Returns:
            False if the folder holds this very run, finished: nothing is left to train.

        Raises:
            SettingError: the folder holds an unfinished run with other settings, data or checkpoint, or a finished
                one without best.pt.
        """
        self.made_from = made_from
        to_train, self.set_aside = on_rank_0(lambda: (self._begin(), self.set_aside))
        return to_train

    def _begin(self):
        remove_temporary(self.out_dir)
        if self.earlier is None:
            if any(self.out_dir.glob("last*.pt")):
                self.set_aside = "RESUME=False, or no readable checkpoint"
            return True
        changed, code_changed = self._changes()
        if self._is_finished():
            if changed or code_changed:
                self.set_aside = "; ".join(changed or [f"{NAMES['code']} has changed"])
                return True
            finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.earlier["run"]["saved_at"]))
            check(
                (self.out_dir / "best.pt").exists(),
                f"{self.out_dir} holds this run already, finished on {finished}, but its best.pt is gone; put it back, "
                "or train anew with RESUME=False",
            )
            print(
                f"nothing was trained: {self.out_dir} holds this run already, finished on {finished}. "
                "RESUME=False trains it anew and keeps the old one",
                flush=True,
            )
            return False
        if changed:
            raise SettingError(
                f"{self.out_dir} holds an unfinished run with other settings: {'; '.join(changed)}. Set them as "
                "they were to go on, RESUME=False to start anew (the old run is kept), or another OUT_DIR"
            )
        if code_changed:
            print(f"{NAMES['code']} has changed since this run was started; it goes on with the new code", flush=True)
        return True

    def restore(self, learner):
        """Load the earlier run's state into the learner.

        Returns:
            rows of the history, best validation value, and the step to go on from.
        """
        earlier, self.earlier, self.trained = self.earlier, None, True
        if self.set_aside and not rank():
            print(f"the run in {self.out_dir} is trained anew: {self.set_aside}", flush=True)
        if earlier is None or self.set_aside:
            return [], -1.0, 0
        state = earlier["run"]
        learner.load_state_dict(state["learner"])
        print(f"goes on from step {state['step']} of {state['steps']} of the run in {self.out_dir}", flush=True)
        best = state["best"] if (self.out_dir / "best.pt").exists() else -1.0  # the next epoch writes one
        return state["history"], best, state["step"]

    def save(self, name, contents, state=None):
        """Write a checkpoint; with `state`, a dict of what a run needs to go on, the one before is kept as well."""
        if rank():
            return
        if self.set_aside:
            _set_aside(self.out_dir)
            self.set_aside = ""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        contents = contents | {"settings": self.settings, "stage": self.stage, "made_from": self.made_from}
        if state is not None:
            contents["run"] = state | {"batch": self.batch_size, "saved_at": time.time()}
        save_checkpoint(self.out_dir / name, contents, keep_previous=state is not None)

    def announce(self, script, constant):
        """Print what was written, if anything was, and the command of the next stage.

        script: that stage's; constant: the one of its constants that takes this checkpoint.
        """
        path = f"{self.out_dir}/best.pt"
        default = {"TEACHER": "pretrain", "STUDENT": "sar_feature", "CHECKPOINT": "finetune"}[constant]
        setting = "" if path == f"runs/{default}/best.pt" else f" {constant}={shlex.quote(path)}"
        if self.trained:
            print(f"written: {path}, last.pt, history.csv, curves.png")
        print(f"next: python {script}{setting}", flush=True)

    def _newest(self):
        """The newest readable checkpoint to go on from, or None; a damaged one is renamed."""
        for path in self.out_dir / "last.pt", self.out_dir / "last.previous.pt":
            if not path.exists():
                continue
            try:
                return load_checkpoint(path, "", with_run=True)
            except CheckpointError as error:
                damaged = path.with_suffix(".damaged.pt")
                os.replace(path, damaged)  # or it would replace the one before
                reason = str(error).partition(";")[0]
                print(f"{reason}. Kept as {damaged}; the one before is taken", flush=True)
        return None

    def _is_finished(self):
        state = self.earlier["run"]
        return state["step"] >= state["steps"] and len(state["history"]) >= self.earlier["settings"].get("EPOCHS", 0)

    def _changed_settings(self):
        """Which settings that matter are other ones, in words."""
        before, now = self.earlier["settings"], self.settings
        names = [n for n in {**before, **now} if n not in NO_EFFECT and before.get(n) != now.get(n)]
        return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]

    def _changes(self):
        """What has changed since the earlier run, in words, and whether its source code has."""
        if self.earlier["stage"] != self.stage:
            return [f"it is one of {self.earlier['stage']}.py"], False
        changed, batch = self._changed_settings(), self.earlier["run"]["batch"]
        if batch != self.batch_size:
            changed.append(f"chips a step, BATCH_SIZE on every rank, were {batch}, are {self.batch_size}")
        before, now = self.earlier.get("made_from", {}), self.made_from
        differs = [name for name in NAMES if before.get(name) != now.get(name)]
        changed += [f"{NAMES[name]} has changed" for name in differs if name != "code"]
        return changed, "code" in differs


def _set_aside(out_dir):
    """Rename a folder to the first free of name.1, name.2, ...; where that fails, move the run into earlier.1 in it."""
    old = _first_free(os.path.normpath(out_dir))
    try:
        if out_dir.is_symlink() or Path.cwd().is_relative_to(out_dir.resolve()):
            raise OSError("its path leads elsewhere afterwards")
        os.rename(out_dir, old)
    except OSError:  # also a mount point, or a folder that lies in one that is read-only
        old = Path(_first_free(out_dir / "earlier"))
        files = [path for pattern in WRITTEN for path in out_dir.glob(pattern)]
        old.mkdir()
        for path in files:
            path.rename(old / path.name)
    print(f"the earlier run in {out_dir} is kept as {old}", flush=True)


def _first_free(name):
    """The first of name.1, name.2, ... that does not exist."""
    return next(path for number in count(1) if not os.path.lexists(path := f"{name}.{number}"))


@contextlib.contextmanager
def stop_signals():
    """Collect the first SIGINT or SIGTERM in the list that this yields; the second one ends the process."""
    received, previous = [], {}

    def receive(number, frame):
        received.append(number)
        for other, handler in previous.items():
            signal.signal(other, signal.SIG_DFL if other == signal.SIGTERM else handler)

    with contextlib.suppress(ValueError):  # not in the main thread, which alone can receive signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
