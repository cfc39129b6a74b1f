"""Cache of a frozen network's outputs, which are the same in every epoch."""

from data.augment import VIEWS
from data.store import choose_memory, to_device

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
        device: where the outputs are needed.
        dtype: in which they are stored; None = that of the network's output.
        memory_gb: of `data.store.choose_memory`; outputs that do not fit the device are stored in host memory.
    """

    def __init__(self, network, requests, chips, batch_size, device, dtype=None, memory_gb=0.0):
        self.network, self.chips, self.batch_size = network, chips, batch_size
        self.device, self.dtype, self.memory_gb = device, dtype, memory_gb
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
        rows = torch.from_numpy(rows.astype(np.int64))
        if self.values.device.type == self.device.type:
            return self.values.index_select(0, to_device(rows, self.device))
        return to_device(self.values.index_select(0, rows), self.device)

    @torch.no_grad()
    def _compute(self, block):
        start = block * self.batch_size
        views, indices = np.divmod(self.keys[start : start + self.batch_size], self.chips)
        outputs = self.network(indices, views)
        if self.values is None:
            dtype = self.dtype or outputs.dtype
            size = len(self.keys) * outputs.shape[1] * dtype.itemsize
            on_device = choose_memory(size, self.device, self.memory_gb) == "device"
            self.values = torch.empty(
                len(self.keys), outputs.shape[1], dtype=dtype, device=self.device if on_device else "cpu",
                pin_memory=not on_device and torch.cuda.is_available(),
            )  # fmt: skip
        self.values[start : start + len(outputs)] = outputs.to(self.values.dtype)
        self.computed[block] = True
