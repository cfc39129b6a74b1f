"""What a frozen network says of a chip is the same in every epoch: it is computed once."""

from data.augment import VIEWS
from data.store import choose_place, to_device

import numpy as np
import torch


class FrozenCache:
    """The answers of a frozen network to chips in views, each computed when it is first needed.

    Who asks says beforehand what will be asked, in which order. From that follow the rows of the
    cache and the batches in which they are computed: full ones, and the same in every run.

    Args:
        answer: (indices [B], views [B], int64 arrays) -> [B, D] on the device.
        requests: iterable of all (indices, views) to come, in their order.
        chips: number of chips, N; indices are 0..N-1, views 0..7.
        batch_size: chips that `answer` is given at a time.
        device: where the answers are wanted.
        dtype: in which they are kept; None = as they come.
        memory_gb: of `data.store.choose_place`; what does not fit the device is kept by the host.
    """

    def __init__(self, answer, requests, chips, batch_size, device, dtype=None, memory_gb=0.0):
        self.answer, self.chips, self.batch_size = answer, chips, batch_size
        self.device, self.dtype, self.memory_gb = device, dtype, memory_gb
        self.row = np.full(VIEWS * chips, -1, np.int32)
        keys, count = [], 0
        for indices, views in requests:
            asked = views * chips + indices
            new = np.unique(asked[self.row[asked] < 0])
            self.row[new] = np.arange(count, count + len(new))
            keys.append(new)
            count += len(new)
        self.keys = np.concatenate(keys)
        self.computed = np.zeros(-(-count // batch_size), bool)
        self.values = None

    def __call__(self, indices, views):
        """[B, D] on the device: the answers to requested chips, int64 [B] arrays."""
        rows = self.row[views * self.chips + indices]
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
        found = self.answer(indices, views)
        if self.values is None:
            dtype = self.dtype or found.dtype
            size = len(self.keys) * found.shape[1] * dtype.itemsize
            near = choose_place(size, self.device, self.memory_gb) == "device"
            self.values = torch.empty(
                len(self.keys), found.shape[1], dtype=dtype,
                device=self.device if near else "cpu", pin_memory=not near and torch.cuda.is_available(),
            )  # fmt: skip
        self.values[start : start + len(found)] = found.to(self.values.dtype)
        self.computed[block] = True
