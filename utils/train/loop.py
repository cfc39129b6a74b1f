"""The training loop that the three training scripts share."""

import math
import sys
import time
from dataclasses import dataclass, field

from data.errors import named
from utils.run.ranks import max_over_ranks, rank, world_size
from utils.run.resume import stop_signals
from utils.run.settings import SettingError
from utils.train.history import History

from tqdm import tqdm

READ_EVERY = 10  # steps between two readings of loss and accuracy for the progress bar
CHOOSES = "mean per-class accuracy"  # the validation value by which best.pt is chosen
FEW_STEPS, ENOUGH_STEPS = 300, 1000  # of a whole network; measured on 175 pairs: docs/results.md, places of UNICORN


def fit(learner, batches, validate, run, contents):
    """Train; after every epoch validate and write best.pt, last.pt, history.csv, and at the end curves.png.

    A run that was stopped goes on from its last.pt and ends with the weights of one that was not. The first SIGINT or
    SIGTERM saves and stops at the next step, the second one ends the process. Only rank 0 writes and prints.

    Args:
        learner: `utils.train.learner.Learner`.
        batches: `data.batches.Batches`.
        validate: model in eval mode -> {name: value}; "mean per-class accuracy" chooses the best epoch.
        run: `utils.run.resume.Run`, begun.
        contents: dict, what the checkpoints hold besides the weights.

    Returns:
        list of one dict per epoch: loss, accuracy, learning rate, images/s, and the validation values.

    Raises:
        SettingError: the loss is not finite any more.
        SystemExit: 128 + number of the signal that stopped it.
    """
    rows, best, step = run.restore(learner)
    history = History(run.out_dir, rows, run.settings["TENSORBOARD"])
    training = _Training(learner, batches, run, contents, history, best)
    total = batches.total_steps
    if total < FEW_STEPS and not learner.model.frozen and not step and not rank():
        enough = math.ceil(ENOUGH_STEPS / batches.steps)
        print(f"{total} steps in all are few to train a network with; EPOCHS={enough} takes {enough * batches.steps}")
    with stop_signals() as training.signals:
        # Counted by the history: a run stopped at the last step of an epoch has yet to validate it.
        for epoch in range(len(rows), batches.epochs):
            figures, images_per_second = training.epoch(epoch, max(step, epoch * batches.steps))
            training.stop_if_lost(figures.bad_in_a_row, (epoch + 1) * batches.steps)
            values = validate(learner.saved_model.eval())
            training.end_epoch(epoch, figures, images_per_second, values)
    history.plot()
    return history.rows


@dataclass
class _Training:
    """The state of `fit`."""

    learner: object
    batches: object
    run: object
    contents: dict
    history: History
    best: float
    signals: list = field(default_factory=list)

    def epoch(self, epoch, first):
        """Take the steps of an epoch from `first` on; returns the figures of the epoch and images/s."""
        learner, batches, steps = self.learner, self.batches, self.batches.steps
        end, started, saved_at = (epoch + 1) * steps, time.perf_counter(), time.monotonic()
        learner.modules.train()
        with tqdm(
            batches.between(first, end), initial=first - epoch * steps, total=steps, leave=False, unit=" steps",
            desc=f"epoch {epoch + 1}/{batches.epochs}", disable=rank() > 0 or None,  # None: shown on a terminal only
        ) as bar:  # fmt: skip
            for batch in bar:
                learner.step(batch)
                done, stop, bad_in_a_row = batch.step + 1, max(self.signals, default=0), 0
                if batch.step % READ_EVERY == 0:
                    if figures := learner.meter.read():
                        rate = (done - first) * batches.size / (time.perf_counter() - started)
                        bar.set_postfix_str(
                            f"loss {figures.loss:.3f} acc {figures.accuracy:.3f} {rate:.0f} images/s"
                        )
                        bad_in_a_row = figures.bad_in_a_row
                    stop, bad_in_a_row = max_over_ranks(stop, bad_in_a_row)
                elif world_size() > 1:
                    stop = 0  # until all ranks know of it
                self.stop_if_lost(bad_in_a_row, done)
                if stop or time.monotonic() - saved_at > 60 * self.run.save_every_min:
                    self.save_last(done)
                    saved_at = time.monotonic()
                if stop:
                    if not rank():
                        print(f"\nstopped at step {done}; start again to go on", file=sys.stderr)
                    raise SystemExit(128 + stop)
        figures = learner.meter.final()  # waits for the device
        return figures, (end - first) * batches.size / (time.perf_counter() - started)

    def end_epoch(self, epoch, figures, images_per_second, values):
        """Record, print and save an epoch with its validation values."""
        row = {"epoch": epoch + 1, "loss": figures.loss, "accuracy": figures.accuracy}
        row |= {"learning rate": self.learner.schedule.get_last_lr()[0], "images/s": images_per_second}
        self.learner.meter.reset()
        end = (epoch + 1) * self.batches.steps
        is_best = values[CHOOSES] >= self.best  # of equal ones the later, better trained one
        self.history.rows.append(row | {f"val {name}": value for name, value in values.items()})
        if is_best:
            self.best = values[CHOOSES]
            self.run.save("best.pt", self._contents())
        self.history.write()
        self.save_last(end)  # last, since a resumed run does not write the other files again
        printed = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(
            f"epoch {epoch + 1}/{self.batches.epochs}: loss {figures.loss:.4f}, "
            f"training accuracy {figures.accuracy:.3f}, {images_per_second:.0f} images/s; "
            f"validation: {printed}{' (best)' if is_best else ''}"
            + (f"; {figures.bad_steps} steps without a finite loss left out" if figures.bad_steps else ""),
            flush=True,
        )

    def save_last(self, step):
        state = {"learner": self.learner.state_dict(), "history": self.history.rows, "best": self.best}
        self.run.save("last.pt", self._contents(), state | {"step": step, "steps": self.batches.total_steps})

    def _contents(self):
        model = self.learner.saved_model.state_dict()
        return self.contents | {"epoch": len(self.history.rows), "model": model}

    def stop_if_lost(self, bad_in_a_row, step):
        """End the run after too many steps in a row without a finite loss."""
        if bad_in_a_row >= self.run.settings["MAX_BAD_STEPS"]:
            self.save_last(step)
            raise SettingError(
                f"{bad_in_a_row} steps in a row gave no finite loss; the weights before them are in "
                f"{self.run.out_dir}/last.pt. Lower LEARNING_RATE. Chips of the last step: "
                f"{named(self.batches.names(step - 1))}"
            )
