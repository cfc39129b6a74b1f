"""Several processes (ranks) under torchrun, or one process without it.

All ranks take the same steps in the same order; only rank 0 writes files and prints. Without torchrun
the functions below return their input.
"""

import contextlib
import os
import sys
import time

from utils.run.settings import SettingError

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.distributed.nn.functional import all_reduce


@contextlib.contextmanager
def distributed():
    """Set up the process group if torchrun started this process, and shut it down at the end.

    If several ranks fail, the first to fail raises its error; the others exit without a message.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SettingError(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} but not {', '.join(missing)}; start several "
            "ranks with torchrun, or unset WORLD_SIZE for one process"
        )
    dist.init_process_group()  # gloo for tensors in host memory, NCCL for those on GPUs
    store = dist.distributed_c10d._get_default_store()
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null if rank() else sys.stdout):
            yield
    except Exception:
        first_failed = None  # stays None if the rank that hosts the store has exited
        with contextlib.suppress(Exception):
            first_failed = store.compare_set("failed", "", str(rank()))
        if first_failed != str(rank()).encode():
            os._exit(1)  # this error only follows from the other rank's exit
        raise
    except SystemExit:
        _leave()
        raise
    _leave()


def _leave():
    """Leave the group of ranks.

    A thread of gloo may be about to free the tensors of the last exchange, for which it needs Python's lock. torch 2.4
    keeps that lock while it waits for the thread, forever; a pause before lets the thread end.
    """
    time.sleep(0.1)
    dist.destroy_process_group()


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share_of_rank(count):
    """Indices, int64, of the items that this rank computes, of `count` in all; every rank gets equally many.

    If they do not divide evenly, the last item is repeated at the end; `gather_over_ranks` drops the copies.
    """
    each = -(-count // world_size())
    return np.arange(rank() * each, (rank() + 1) * each).clip(max=count - 1)


def gather_over_ranks(tensor, count):
    """[count, ...] on all ranks, from each rank's results [count / ranks, ...] for its `share_of_rank`."""
    if world_size() == 1:
        return tensor
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return torch.cat(tensors)[:count]


def sum_over_ranks(tensor):
    """A tensor summed over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def total_weight(weights, size):
    """What a rank divides the weighted sum of its chips' losses by, so that the ranks together give the whole batch's.

    The learner weighs a rank's loss by its share of the batch, so this is that share of the weights of all ranks.

    Args:
        weights: [B] of the rank's chips; size: chips of all ranks.
    """
    return sum_over_ranks(weights.sum()) * (len(weights) / size)


def max_over_ranks(*numbers):
    """The largest value of each number over the ranks; the ranks wait for each other."""
    if world_size() == 1:
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def on_rank_0(work):
    """The result of work(), which runs on rank 0 only, on all ranks."""
    if world_size() == 1:
        return work()
    result = [None if rank() else work()]
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def synchronised(module):
    """The module with gradients and batch-norm statistics computed over the batches of all ranks."""
    if world_size() == 1:
        return module
    if any(parameter.is_cuda for parameter in module.parameters()):
        module = convert_sync_batchnorm(module)
    else:
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and norm.track_running_stats:
                norm.__class__ = type(type(norm).__name__, (_CPUSyncBatchNorm, type(norm)), {})
    # The running statistics are equal on all ranks and need no broadcast.
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


class _CPUSyncBatchNorm:
    """Batch norm (also timm's with activation) over the chips of all ranks, for CPUs.

    torch.nn.SyncBatchNorm runs on GPUs only, so training on several ranks could not be tested without them.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        shape = (1, -1, *[1] * (x.ndim - 2))
        # Measured from the running mean, to lose fewer digits in E[x^2] - E[x]^2.
        origin = self.running_mean.clone()
        centred = x.float() - origin.view(shape)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = torch.full_like(origin[:1], x.numel() // x.shape[1])
        sums = all_reduce(torch.cat([centred.sum(axes), centred.square().sum(axes), count]))
        count = sums[-1]
        mean, square = (sums[:-1] / count).view(2, -1)
        variance = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = self.momentum or 1 / self.num_batches_tracked
            self.running_mean.lerp_(origin + mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        x = torch.addcmul((self.bias - mean * scale).view(shape), centred, scale.view(shape)).to(x.dtype)
        for layer in ("drop", "act"):
            x = getattr(self, layer)(x) if hasattr(self, layer) else x
        return x
