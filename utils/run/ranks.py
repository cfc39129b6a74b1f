"""One process alone, or several under torchrun: which part of the work is whose.

All ranks take the same steps in the same order; the first one alone writes and speaks. In a
process alone every function here gives back what it was given.
"""

import contextlib
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce


@contextlib.contextmanager
def joined():
    """Within it this process works with the others that torchrun started, if it did.

    Of several ranks that fail the first one to do so raises; the others end without a word.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group()  # gloo for tensors in host memory, NCCL for those on GPUs
    told = dist.distributed_c10d._get_default_store()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    except Exception:
        first = None  # stays so where the one that keeps the store is gone
        with contextlib.suppress(Exception):
            first = told.compare_set("failed", "", str(rank()))
        if first != str(rank()).encode():
            os._exit(1)  # what went wrong here is only that the other is gone
        raise
    except SystemExit:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank():
    """Number of this process, 0 = the first."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part():
    """(number of this process, number of all)."""
    return rank(), ranks()


def equal_share(count):
    """Indices, int64, of this rank's part of `count` items; parts are equally long, and follow each other.

    Where they do not divide, the last item comes again at the end; `gathered` leaves that out.
    """
    each = -(-count // ranks())
    return np.arange(rank() * each, (rank() + 1) * each).clip(max=count - 1)


def gathered(part, count):
    """[count, ...] on all ranks, of the answers [count / ranks, ...] of each to its `equal_share`."""
    if ranks() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(ranks())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)[:count]


def summed(tensor):
    """A tensor summed over the ranks, in place."""
    if ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def agreed(*numbers):
    """The largest that any rank gives, number by number; the ranks wait for each other."""
    if ranks() == 1:
        return numbers
    told = torch.tensor(numbers)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return tuple(told.tolist())


def from_first(work):
    """What work() gives on the first rank, which does it alone."""
    if ranks() == 1:
        return work()
    found = [None if rank() else work()]
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def averaging(module):
    """The module as one whose gradients and batch statistics are those of all ranks together."""
    if ranks() == 1:
        return module
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine and norm.track_running_stats:
            norm.__class__ = type(type(norm).__name__, (_OverRanks, type(norm)), {})
    # The statistics need no broadcast: they are the same on all ranks.
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


class _OverRanks:
    """Batch norm, timm's with activation too, over the chips of all ranks.

    As torch.nn.SyncBatchNorm, which is for GPUs alone and so could not be tested without.
    """

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide = (1, -1, *[1] * (x.ndim - 2))
        # Measured from the running mean, to lose fewer digits in E[x^2] - E[x]^2.
        origin = self.running_mean.clone()
        centred = x.float() - origin.view(wide)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = torch.full_like(origin[:1], x.numel() // x.shape[1])
        sums = all_reduce(torch.cat([centred.sum(axes), centred.square().sum(axes), count]))
        count = sums[-1]
        mean, square = (sums[:-1] / count).view(2, -1)
        variance = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = self.momentum or 1 / self.num_batches_tracked
            self.running_mean.lerp_(origin + mean, share)
            self.running_var.lerp_(variance * count / (count - 1), share)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        x = torch.addcmul((self.bias - mean * scale).view(wide), centred, scale.view(wide)).to(x.dtype)
        for then in ("drop", "act"):
            x = getattr(self, then)(x) if hasattr(self, then) else x
        return x
