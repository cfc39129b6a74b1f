"""The training loop that the three stages share."""

import csv
import math
import time
from pathlib import Path

from utils.checkpoint import save_checkpoint
from utils.predict import autocast
from utils.report import plot_history
from utils.settings import SettingError

import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

READ_EVERY = 10  # steps between two readings of loss and accuracy for the progress bar


def choose_device(name):
    """The device of DEVICE: "auto" is CUDA where there is one, else the CPU.

    On CUDA it also switches TF32 and the search for the fastest convolutions on.
    """
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"DEVICE {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def fit(
    model, loss_of, validate, *, epochs, steps, learning_rate, weight_decay, warmup_epochs=0.0,
    clip=0.0, ema=0.0, seed, out_dir, checkpoint, also_trained=(), compiled=False,
):  # fmt: skip
    """Train a classifier; after every epoch validate it and write `last.pt`, and `best.pt`.

    AdamW, cosine schedule with linear warm-up. Writes history.csv and curves.png as well.

    Args:
        model: Classifier on its device; parameters that require no gradient stay as they are.
        loss_of: step number -> (loss, logits [B, C], labels [B]), all on the device. Called in
            training mode, with the random state set for the step.
        validate: model in eval mode -> {name: value}; "mean per-class accuracy" chooses the best.
        epochs, steps: number of epochs, and of steps in each.
        learning_rate: at the peak of the schedule.
        warmup_epochs: epochs of linear rise, may be a fraction.
        clip: largest norm of the gradient; 0 = no limit.
        ema: decay of the moving average of the weights, which is then validated and saved; 0 = none.
        seed: of the run; with the step number it fixes all that is random in a step.
        out_dir: folder of the outputs.
        checkpoint: what the checkpoints hold beside the weights.
        compiled: True runs the backbone through torch.compile.
        also_trained: further modules whose parameters are trained but not saved in "model".

    Returns:
        list of one dict per epoch: loss, accuracy, learning rate, images/s, and the validation.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    trained = nn.ModuleList([model, *also_trained])
    if compiled:
        model.backbone.compile()
    groups = param_groups_weight_decay(trained, weight_decay)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    rise = _warmup_cosine(epochs * steps, round(warmup_epochs * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rise)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    history, best = [], -1.0
    for epoch in range(epochs):
        trained.train()
        meter, started = _Meter(device), time.perf_counter()
        with tqdm(range(steps), desc=f"epoch {epoch + 1}/{epochs}", unit=" steps", leave=False) as bar:
            for step in bar:
                number = epoch * steps + step
                _seed(device, seed * 1_000_003 + number)
                with autocast(device):
                    loss, logits, labels = loss_of(number)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                optimizer.step()
                schedule.step()
                if average is not None:
                    average.update_parameters(model)
                meter.add(loss, logits, labels)
                if step % READ_EVERY == 0 and (seen := meter.read()):
                    rate = (step + 1) * len(labels) / (time.perf_counter() - started)
                    bar.set_postfix_str(f"loss {seen[0]:.3f} acc {seen[1]:.3f} {rate:.0f} images/s")
        loss, accuracy = meter.final()
        rate = steps * len(labels) / (time.perf_counter() - started)
        row = {"epoch": epoch + 1, "loss": loss, "accuracy": accuracy}
        row |= {"learning rate": schedule.get_last_lr()[0], "images/s": rate}
        kept = average.module if average is not None else model
        found = validate(kept.eval())
        history.append(row | {f"val {name}": value for name, value in found.items()})
        _write_history(out_dir / "history.csv", history)
        state = {name: value.cpu() for name, value in kept.state_dict().items()}
        saved = checkpoint | {"epoch": epoch + 1, "validation": found, "model": state}
        save_checkpoint(out_dir / "last.pt", saved)
        better = found["mean per-class accuracy"] >= best  # of equals the later, better trained
        if better:
            best = found["mean per-class accuracy"]
            save_checkpoint(out_dir / "best.pt", saved)
        values = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(
            f"epoch {epoch + 1}/{epochs}: loss {loss:.4f}, accuracy {accuracy:.3f}, "
            f"{rate:.0f} images/s; validation: {values}{' (best)' if better else ''}",
            flush=True,
        )
    plot_history(out_dir / "curves.png", history)
    return history


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
    """Loss and accuracy over an epoch, summed on the device and read without waiting for it."""

    def __init__(self, device):
        self.sums, self.chips = torch.zeros(2, device=device), 0
        self.copy = None

    def add(self, loss, logits, labels):
        right = (logits.detach().argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach().float() * len(labels), right.float()])
        self.chips += len(labels)

    def read(self):
        """Means as of the last reading, None the first time; starts the next copy to the host."""
        ready = None
        if self.copy is not None and (self.copy[2] is None or self.copy[2].query()):
            sums, chips, _ = self.copy
            ready = [value / chips for value in sums.tolist()]
            self.copy = None
        if self.copy is None:
            host = self.sums.to("cpu", non_blocking=True, copy=True)
            sent = torch.cuda.current_stream().record_event() if self.sums.is_cuda else None
            self.copy = (host, self.chips, sent)
        return ready

    def final(self):
        return [value / self.chips for value in self.sums.tolist()]


def _write_history(path, history):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
