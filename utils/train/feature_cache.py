"""Cache of a frozen network's outputs, which are the same in every epoch."""

import os
import tempfile

from data.augment import VIEWS
from data.store import gather

import numpy as np
import torch


class FrozenCache:
    """The outputs of a frozen network for chips in views, each computed once, when it is first needed.

    The caller lists all requests in advance; the cache lays out its rows in that order. So they are computed in
    full batches, which are the same in every run, also in one that is resumed.

    Args:
        network: (indices [B], views [B], int64 arrays) -> [B, D] on the device.
        requests: iterable of all (indices, views) that will be asked for, in their order.
        chips: number of chips, N; indices are 0..N-1, views 0..7.
        batch_size: chips in one call of `network`.
        budget: `data.store.MemoryBudget` of the device where the outputs are needed. Outputs that fit neither the
            device's memory nor the host's are stored in a file.
        folder: where that file is kept; it has no name there and ends with the process.
        dtype: in which they are stored; None = that of the network's output.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, network, requests, chips, batch_size, budget, folder, dtype=None):
        self.network, self.chips, self.batch_size = network, chips, batch_size
        self.budget, self.folder, self.dtype = budget, folder, dtype
        self.row_of = np.full(VIEWS * chips, -1, np.int32)
        keys, count = [], 0
        for indices, views in requests:
            requested = views * chips + indices
            new = np.unique(requested[self.row_of[requested] < 0])
            self.row_of[new] = np.arange(count, count + len(new))
            keys.append(new)
            count += len(new)
        self.keys = np.concatenate(keys)
        self.computed = np.zeros(-(-count // batch_size), bool)
        self.values = None

    def __call__(self, indices, views):
        """The outputs [B, D] on the device for requested chips, int64 [B] arrays."""
        rows = self.row_of[views * self.chips + indices]
        blocks = rows // self.batch_size
        for block in np.unique(blocks[~self.computed[blocks]]):
            self._compute(block)
        return gather(self.values, rows.astype(np.int64), self.budget.device)

    @torch.no_grad()
    def _compute(self, block):
        start = block * self.batch_size
        views, indices = np.divmod(self.keys[start : start + self.batch_size], self.chips)
        outputs = self.network(indices, views)
        if self.values is None:
            self.values = self._empty((len(self.keys), outputs.shape[1]), self.dtype or outputs.dtype)
        self.values[start : start + len(outputs)] = outputs.to(self.values.dtype)
        self.computed[block] = True

    def _empty(self, shape, dtype):
        """A tensor for the outputs, in the fastest memory that has room for it."""
        size = shape[0] * shape[1] * dtype.itemsize
        memory = self.budget.choose(size)
        if memory != "disk":
            return torch.empty(shape, dtype=dtype, device=self.budget.device if memory == "device" else "cpu")
        os.makedirs(self.folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk raises an error here, and kills no process later
                os.posix_fallocate(file.fileno(), 0, size)
            mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
        return torch.from_numpy(mapped).view(dtype).view(shape)
