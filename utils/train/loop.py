"""The training loop that the three stages share."""

import csv
import math
import os
import sys
import time
from pathlib import Path

from data.errors import named
from utils.predict.tta import autocast
from utils.report.page import event_writer, plot_history, write_events
from utils.run.checkpoint import save_checkpoint
from utils.run.files import whole_file
from utils.run.ranks import agreed, averaging, from_first, rank, ranks, summed
from utils.run.resume import stop_signals, take_up
from utils.run.settings import SettingError

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

READ_EVERY = 10  # steps between two readings of loss and accuracy for the progress bar


def choose_device(name):
    """The device of DEVICE: "auto" is CUDA where there is one, else the CPU; under torchrun each rank's own.

    On CUDA it also switches TF32 and the search for the fastest convolutions on.
    """
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            if ranks() > 1 and device.index is None:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if device.index is not None:
                torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"DEVICE {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def fit(
    model, loss_of, validate, *, epochs, steps, batch, out_dir, checkpoint, resume=True,
    save_every_min=10.0, max_bad_steps=20, chips_of=None, compiled=False, tensorboard=False, **learning,
):  # fmt: skip
    """Train a classifier; after every epoch validate it and write `best.pt` and `last.pt`.

    Writes history.csv and curves.png as well. A run that was stopped goes on from its `last.pt` and
    ends with the weights of one that was not. The first SIGINT or SIGTERM saves and leaves at the
    next step, the second one ends at once. Of several ranks the first writes and speaks.

    Args:
        model: Classifier on its device; parameters that require no gradient stay as they are.
        loss_of: step number -> (loss, logits [B, C], labels [B]), all on the device. Called in
            training mode, with the random state set for the step.
        validate: model in eval mode -> {name: value}; "mean per-class accuracy" chooses the best.
        epochs, steps: number of epochs, and of steps in each.
        batch: chips a step, on all ranks together.
        out_dir: folder of the outputs.
        checkpoint: what the checkpoints hold beside the weights.
        resume: False starts anew, and keeps an earlier run beside.
        save_every_min: minutes between two writings of `last.pt` within an epoch.
        max_bad_steps: so many steps in a row without a finite loss end the run.
        chips_of: step number -> names of its chips, told where such steps end the run.
        compiled: True runs the backbone through torch.compile.
        tensorboard: True writes the history as TensorBoard's event files, too.
        learning: of `Learner`.

    Returns:
        list of one dict per epoch: loss, accuracy, learning rate, images/s, and the validation.

    Raises:
        SettingError: another, unfinished run is in out_dir; or the loss is not finite any more.
        SystemExit: 128 + number of the signal that stopped it.
    """
    out_dir, total = Path(out_dir), epochs * steps
    learner = Learner(model, loss_of, total, steps, batch, **learning)
    history, best, begin = [], -1.0, 0
    if earlier := from_first(lambda: take_up(out_dir, checkpoint, batch, resume)):
        run = earlier["run"]
        learner.load_state_dict(run["learner"])
        history, best, begin = run["history"], run["best"], run["step"]
        print(f"goes on from step {begin} of {total} of the run in {out_dir}", flush=True)
    if compiled:
        model.backbone.compile()
    events = event_writer(out_dir, len(history)) if tensorboard and not rank() else None

    def save(name, step):
        if rank():
            return
        out_dir.mkdir(parents=True, exist_ok=True)
        saved = checkpoint | {"epoch": len(history), "model": learner.kept.state_dict()}
        if name == "last.pt":
            run = {"learner": learner.state_dict(), "history": history, "best": best}
            saved |= {"run": run | {"step": step, "steps": total, "batch": batch}}
        save_checkpoint(out_dir / name, saved, keep=name == "last.pt")

    def end_if_lost(in_a_row, step):
        if in_a_row >= max_bad_steps:
            save("last.pt", step)
            names = named(chips_of(step - 1)) if chips_of else "unknown"
            raise SettingError(
                f"{in_a_row} steps in a row gave no finite loss; the weights before them are in "
                f"{out_dir}/last.pt. Lower LEARNING_RATE. Chips of the last step: {names}"
            )

    with stop_signals() as received:
        # By the history: a run stopped at the last step of an epoch has yet to validate it.
        for epoch in range(len(history), epochs):
            first, end = max(begin, epoch * steps), (epoch + 1) * steps
            started, saved_at = time.perf_counter(), time.monotonic()
            learner.modules.train()
            with tqdm(
                range(first, end), initial=first - epoch * steps, total=steps,
                desc=f"epoch {epoch + 1}/{epochs}", unit=" steps", leave=False, disable=rank() > 0,
            ) as bar:  # fmt: skip
                for step in bar:
                    learner.step(step)
                    stop, in_a_row = max(received, default=0), 0
                    if step % READ_EVERY == 0:
                        if seen := learner.meter.read():
                            rate = (step + 1 - first) * batch / (time.perf_counter() - started)
                            bar.set_postfix_str(f"loss {seen[0]:.3f} acc {seen[1]:.3f} {rate:.0f} images/s")
                            in_a_row = seen[3]
                        stop, in_a_row = agreed(stop, in_a_row)
                    elif ranks() > 1:
                        stop = 0  # until all know of it
                    end_if_lost(in_a_row, step + 1)
                    if stop or time.monotonic() - saved_at > 60 * save_every_min:
                        save("last.pt", step + 1)
                        saved_at = time.monotonic()
                    if stop:
                        if not rank():
                            print(f"\nstopped at step {step + 1}; start again to go on", file=sys.stderr)
                        raise SystemExit(128 + stop)
            loss, accuracy, skipped, in_a_row = learner.meter.final()
            end_if_lost(in_a_row, end)
            rate = (end - first) * batch / (time.perf_counter() - started)
            row = {"epoch": epoch + 1, "loss": loss, "accuracy": accuracy}
            row |= {"learning rate": learner.schedule.get_last_lr()[0], "images/s": rate}
            found = validate(learner.kept.eval())
            history.append(row | {f"val {name}": value for name, value in found.items()})
            learner.meter.reset()
            if better := found["mean per-class accuracy"] >= best:  # of equals the later, better trained
                best = found["mean per-class accuracy"]
                save("best.pt", end)
            if not rank():
                _write_history(out_dir / "history.csv", history)
            if events:
                write_events(events, history[-1])
            save("last.pt", end)  # at the end: a run that goes on from it does not write the others again
            values = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(
                f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}, training accuracy {accuracy:.3f}, "
                f"{rate:.0f} images/s; validation: {values}{' (best)' if better else ''}"
                + (f"; {skipped} steps without a finite loss left out" if skipped else ""),
                flush=True,
            )
    if not rank():
        plot_history(out_dir / "curves.png", history)
    return history


class Learner:
    """A step of training, and all that it changes: weights, optimizer, schedule, average, meter.

    AdamW, cosine schedule with linear warm-up. A step whose loss or gradient is not finite changes
    nothing but the place in the schedule.

    Args:
        model, loss_of: as in `fit`.
        total, steps: number of steps, and of those in an epoch.
        batch: chips a step, on all ranks together.
        learning_rate: at the peak of the schedule.
        weight_decay: of AdamW.
        warmup_epochs: epochs of linear rise, may be a fraction.
        clip: largest norm of the gradient; 0 = no limit.
        ema: decay of the moving average of the weights, which is then validated and saved; 0 = none.
        seed: of the run; with the step number it fixes all that is random in a step.
        also_trained: further modules whose parameters are trained but not saved in "model".
    """

    def __init__(
        self, model, loss_of, total, steps, batch, *, learning_rate, weight_decay, seed,
        warmup_epochs=0.0, clip=0.0, ema=0.0, also_trained=(),
    ):  # fmt: skip
        self.model, self.batch, self.seed, self.clip = model, batch, seed, clip or math.inf
        self.device = next(model.parameters()).device
        self.modules = _Trained(loss_of, [model, *also_trained])
        groups = param_groups_weight_decay(self.modules, weight_decay)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
        rise = _warmup_cosine(total, round(warmup_epochs * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rise)
        self.meter, self.average = _Meter(self.device, batch), None
        self.forward = averaging(self.modules)
        if ema:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
        self.kept = self.average.module if ema else model  # what is validated and saved
        # What a forward pass in training changes: the statistics of batch norms that are not frozen.
        learning = (module for module in self.modules.train().modules() if module.training)
        self.buffers = [buffer for module in learning for buffer in module.buffers(recurse=False)]
        names = ("modules", "optimizer", "schedule", "meter") + (("average",) if ema else ())
        self.parts = {name: getattr(self, name) for name in names}

    def step(self, number):
        """Take the step of this number."""
        # Own random numbers for each step, so that a run goes on the same wherever it was stopped.
        _seed(self.device, self.seed * 1_000_003 + number)
        before = [buffer.clone() for buffer in self.buffers]
        with autocast(self.device):
            loss, logits, labels = self.forward(number)
        self.optimizer.zero_grad(set_to_none=True)
        share = len(labels) / self.batch  # of this rank; the gradient is the ranks' mean
        (loss * (share * ranks())).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        right = (logits.detach().argmax(1) == labels).sum()
        seen = summed(torch.stack([loss.detach().float() * share, right.float()]))
        bad = ~(seen[0].isfinite() & norm.isfinite())
        self.optimizer.found_inf = bad.float()  # with 1 the fused step leaves all as it is
        self.optimizer.step()
        for buffer, old in zip(self.buffers, before, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.meter.add(seen, bad)

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class _Trained(nn.ModuleList):
    """The trained modules; called with the number of a step it gives what loss_of does."""

    def __init__(self, loss_of, modules):
        super().__init__(modules)
        self.loss_of = loss_of

    def forward(self, number):
        return self.loss_of(number)


def announce(out_dir, then):
    """Where a stage's outputs are, and what to run next."""
    print(f"written: {out_dir}/best.pt, last.pt, history.csv, curves.png\nnext: {then}", flush=True)


def _seed(device, number):
    """As torch.manual_seed, which without CUDA writes a traceback each time (1.6 ms)."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def _warmup_cosine(total, warmup):
    """Factor of the learning rate at each step: linear rise, then half a cosine down to 0."""

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


class _Meter:
    """Loss, accuracy and bad steps of an epoch, summed on the device and read without waiting for it."""

    def __init__(self, device, batch):
        self.sums = torch.zeros(4, device=device)  # loss, right, good steps, bad steps in a row
        self.batch = batch
        self.reset()

    def reset(self):
        """Start over; the bad steps in a row go on."""
        self.sums[:3] = 0
        self.steps, self.copy = 0, None

    def add(self, seen, bad):
        """Of a step: loss and number of right chips, [2]; whether it was left out, []."""
        self.sums[:2] += torch.where(bad, 0.0, seen)
        self.sums[2] += ~bad
        self.sums[3] = (self.sums[3] + 1) * bad
        self.steps += 1

    def read(self):
        """As `final`, of an earlier step; None the first time; starts the next copy to the host."""
        ready = None
        if self.copy is not None and (self.copy[2] is None or self.copy[2].query()):
            ready = self._means(*self.copy[:2])
            self.copy = None
        if self.copy is None:
            host = self.sums.to("cpu", non_blocking=True, copy=True)
            sent = torch.cuda.current_stream().record_event() if self.sums.is_cuda else None
            self.copy = (host, self.steps, sent)
        return ready

    def final(self):
        """Mean loss, accuracy, number of bad steps, and of those in a row."""
        return self._means(self.sums, self.steps)

    def state_dict(self):
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state):
        self.sums.copy_(state["sums"])
        self.steps = state["steps"]

    def _means(self, sums, steps):
        loss, right, good, in_a_row = sums.tolist()
        good = max(good, 1)
        return loss / good, right / (good * self.batch), steps - int(good), int(in_a_row)


def _write_history(path, history):
    with whole_file(path, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
