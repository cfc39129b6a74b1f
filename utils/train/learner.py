"""One step of training, and all that it changes: weights, optimizer, schedule, average of the weights, meter."""

import difflib
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from utils.predict.tta import autocast
from utils.run.ranks import sum_over_ranks, synchronised, world_size
from utils.run.settings import SettingError

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

FUSED = ("adam", "adamw")  # their fused step leaves everything as it is if found_inf is 1; fused SGD's does not
LONGEST_WARMUP = 0.2  # of a run, whatever WARMUP_EPOCHS says


@dataclass
class Optimization:
    """How the weights are optimised.

    learning_rate: at the peak of the schedule, a cosine after a linear warm-up.
    warmup_epochs: epochs of the warm-up, may be a fraction.
    clip: largest norm of the gradient; 0 = no limit.
    ema: decay of a moving average of the weights, which is then validated and saved; 0 = none.
    seed: with the step's number it fixes all that is random in a step.
    optimizer: a name that timm's `create_optimizer_v2` knows. Weight decay spares biases, norms, and what the
        backbone's `no_weight_decay` names, such as position embeddings.
    """

    learning_rate: float
    weight_decay: float
    warmup_epochs: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    seed: int = 0
    optimizer: str = "adamw"


class Learner:
    """Takes training steps. A step whose loss or gradient is not finite leaves the weights as they are.

    It counts for the schedule, and for the counters that some of timm's optimizers (such as nadamw) keep for
    themselves; adamw goes on as if there had been no such step.

    Args:
        model: Classifier on its device; parameters that require no gradient stay as they are.
        loss_of: `data.batches.Batch` -> (loss, logits [B, C], labels [B]), all on the device. Called in training
            mode, with the random state set for the step.
        batches: `data.batches.Batches` of the run; only its sizes are used.
        optimization: Optimization.
        also_trained: further modules whose parameters are trained but not saved in "model".

    Attributes:
        saved_model: the model that is validated and saved: the average of the weights if there is one.
    """

    def __init__(self, model, loss_of, batches, optimization, also_trained=()):
        self.model, self.batch_size = model, batches.size
        self.seed, self.clip = optimization.seed, optimization.clip or math.inf
        self.device = next(model.parameters()).device
        self.modules = _Trained(loss_of, [model, *also_trained])
        self.optimizer = _optimizer(self.modules, optimization)
        groups = self.optimizer.param_groups
        self.parameters = [p for group in groups for p in group["params"] if p.requires_grad]
        total = batches.total_steps
        warmup = min(optimization.warmup_epochs * batches.steps, LONGEST_WARMUP * total)
        factor = warmup_cosine(total, round(warmup))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.meter, self.average = Meter(self.device, self.batch_size), None
        self.forward = synchronised(self.modules)
        if optimization.ema:
            self.average = ModelEmaV3(model, decay=optimization.ema, use_warmup=True)
        self.saved_model = self.average.module if optimization.ema else model
        # What a step changes beside the parameters: the statistics of batch norms that are not frozen, and the average.
        training = (module for module in self.modules.train().modules() if module.training)
        self.changing = [buffer for module in training for buffer in module.buffers(recurse=False)]
        self.changing += self.average.module.state_dict().values() if self.average else ()
        names = ("modules", "optimizer", "schedule", "meter") + (("average",) if optimization.ema else ())
        self.stateful = {name: getattr(self, name) for name in names}

    def step(self, batch):
        """Take the step of a batch.

        Raises:
            SettingError: the device's memory is too small for it, a batch norm needs a larger batch, or `loss_of`
                returns something else.
        """
        try:
            self._step(batch)
        except torch.OutOfMemoryError as error:
            raise SettingError(
                f"the memory of {self.device} is too small for a step of {len(batch.labels)} chips; lower BATCH_SIZE, "
                "IMAGE_SIZE or CHIP_MEMORY_GB (GiB of it that chips and caches take)"
            ) from error

    def _step(self, batch):
        # Each step has its own random numbers, so that a resumed run draws the same ones.
        _set_seed(self.device, self.seed * 1_000_003 + batch.step)
        before = _Values(self.changing)
        loss, logits, labels = self._forward(batch)
        self.optimizer.zero_grad(set_to_none=True)
        share = len(labels) / self.batch_size  # of this rank; gradients are averaged over the ranks
        (loss * (share * world_size())).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        correct = (logits.detach().argmax(1) == labels).sum()
        totals = sum_over_ranks(torch.stack([loss.detach().float() * share, correct.float()]))
        bad = ~(totals[0].isfinite() & norm.isfinite())
        self._update(bad)
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.model, step=batch.step + 1)
        before.restore_if(bad)
        self.meter.add(totals, bad)

    def _forward(self, batch):
        try:
            with autocast(self.device):
                result = self.forward(batch)
            if not isinstance(result, tuple) or len(result) != 3 or result[0].ndim:
                raise SettingError("loss_of has to return (loss, logits, labels), and the loss has to be one number")
            return result
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise SettingError(
                f"a batch norm needs more than one value a channel, but this step has {len(batch.labels)} chips on "
                "each rank; set a larger BATCH_SIZE, or another IMAGE_SIZE or BACKBONE"
            ) from error

    def _update(self, bad):
        """The optimizer's step, which leaves weights and state as they are if `bad`, bool [] on the device, is true."""
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = bad.float()  # 1 makes a fused step leave everything as it is
            self.optimizer.step()
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(bad, 0.0)  # or the state that a first step creates would not be finite
        states = (value for state in self.optimizer.state.values() for value in state.values())
        before = _Values(t for t in chain(self.parameters, states) if torch.is_tensor(t))
        self.optimizer.step()
        before.restore_if(bad)

    def state_dict(self):
        return {name: item.state_dict() for name, item in self.stateful.items()}

    def load_state_dict(self, state):
        for name, item in self.stateful.items():
            item.load_state_dict(state[name])


class _Trained(nn.ModuleList):
    """The trained modules as one, which DistributedDataParallel can wrap; called with a batch it gives its loss."""

    def __init__(self, loss_of, modules):
        super().__init__(modules)
        self.loss_of = loss_of

    def forward(self, batch):
        return self.loss_of(batch)

    def no_weight_decay(self):
        """Names of parameters without weight decay, as timm asks for them."""
        named = ((i, module) for i, module in enumerate(self) if hasattr(module, "no_weight_decay"))
        return {f"{i}.{name}" for i, module in named for name in module.no_weight_decay()}


class Figures(NamedTuple):
    """loss, accuracy: means over the steps with a finite loss; bad_steps: the other ones; bad_in_a_row: at the end."""

    loss: float
    accuracy: float
    bad_steps: int
    bad_in_a_row: int


class Meter:
    """Loss, accuracy and bad steps of an epoch, summed on the device and read without waiting for it."""

    def __init__(self, device, batch_size):
        self.sums = torch.zeros(4, device=device)  # loss, correct chips, good steps, bad steps in a row
        self.batch_size = batch_size
        self.reset()

    def reset(self):
        """Start an epoch; the bad steps in a row go on."""
        self.sums[:3] = 0
        self.steps, self.copy = 0, None

    def add(self, totals, bad):
        """Add a step: loss and number of correct chips, [2]; whether the step was bad, []."""
        self.sums[:2] += torch.where(bad, 0.0, totals)
        self.sums[2] += ~bad
        self.sums[3] = (self.sums[3] + 1) * bad
        self.steps += 1

    def read(self):
        """Figures of the last call's step, or None if they are not there yet; starts the next copy to the host."""
        figures = None
        if self.copy is not None and (self.copy[2] is None or self.copy[2].query()):
            figures = self._figures(*self.copy[:2])
            self.copy = None
        if self.copy is None:
            host = self.sums.to("cpu", non_blocking=True, copy=True)
            copied = torch.cuda.current_stream().record_event() if self.sums.is_cuda else None
            self.copy = (host, self.steps, copied)
        return figures

    def final(self):
        """Figures of all steps; waits for the device."""
        return self._figures(self.sums, self.steps)

    def state_dict(self):
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state):
        self.sums.copy_(state["sums"])
        self.steps = state["steps"]

    def _figures(self, sums, steps):
        loss, correct, good, bad_in_a_row = sums.tolist()
        divisor = max(good, 1)
        accuracy = correct / (divisor * self.batch_size)
        return Figures(loss / divisor, accuracy, steps - int(good), int(bad_in_a_row))


def _optimizer(modules, optimization):
    """The optimizer of a name that timm knows."""
    name, options = optimization.optimizer, {"lr": optimization.learning_rate}
    if name not in list_optimizers():
        near = difflib.get_close_matches(name, list_optimizers(), n=3, cutoff=0)
        raise SettingError(f"timm knows no OPTIMIZER {name!r}; near: {', '.join(near)}")
    if get_optimizer_info(name).second_order:
        raise SettingError(f"OPTIMIZER {name} needs second derivatives, which a step does not compute; set another")
    options |= {"weight_decay": optimization.weight_decay} | ({"fused": True} if name in FUSED else {})
    try:
        return create_optimizer_v2(modules, name, **options)
    except (AssertionError, ImportError) as error:  # a package or a GPU that it needs
        raise SettingError(f"OPTIMIZER {name} cannot be used: {error}; set another") from error


class _Values:
    """The values that tensors have now, to be put back.

    All tensors of one type are copied at once: a step of a small network waits for the number of kernels it starts.
    """

    @torch.no_grad()
    def __init__(self, tensors):
        self.of_type = defaultdict(list)
        for tensor in tensors:
            self.of_type[tensor.dtype, tensor.device].append(tensor)
        self.flat = {kind: _joined(alike) for kind, alike in self.of_type.items()}

    @torch.no_grad()
    def restore_if(self, bad):
        """Put the values back if `bad`, bool [] on the device, is true."""
        for (dtype, device), tensors in self.of_type.items():
            values = torch.where(bad.to(device), self.flat[dtype, device], _joined(tensors))
            values = values.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [v.view(t.shape) for v, t in zip(values, tensors, strict=True)])


def _joined(tensors):
    """All values of tensors one after the other, [N]."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def warmup_cosine(total, warmup):
    """Factor of the learning rate at each of `total` steps: linear rise over `warmup`, then half a cosine to 0."""

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    return factor


def _set_seed(device, number):
    """As torch.manual_seed, which without CUDA records a traceback each time (1.6 ms)."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
