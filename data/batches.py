"""Training batches on the device: a stream draws the indices, the store gives the chips."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data.augment import Share
from data.store import to_device

import numpy as np
import torch


@dataclass
class Batch:
    """One training step's chips, B on this rank.

    step: number of the step, from 0.
    indices, host_views: int64 [B] arrays in host memory: which chips, and in which view 0..7 (`data.augment.turn`).
    chips: uint8 [B, S, S] on the device, not yet turned; None if the batches have no store.
    views, labels: int64 [B] on the device.
    share: the rows that this rank has of the batch of all ranks.
    """

    step: int
    indices: np.ndarray
    host_views: np.ndarray
    chips: torch.Tensor | None
    views: torch.Tensor
    labels: torch.Tensor
    share: Share


class Batches:
    """The batches of a training run: EPOCHS times as many steps as it takes to draw as many chips as there are.

    A batch depends only on its step, so that a run can start at any step. If the chips are outside the device's
    memory, the next batch is gathered in a thread, and copied to a GPU on a second stream, while the device
    works on the current one.

    Args:
        stream: index stream over the N chips, with `batch(step)` and `batch_size` (of all ranks together).
        labels: int64 [N] array.
        device: where the batches are needed.
        epochs: number of epochs.
        store: ChipStore of the N chips on that device; None for batches without chips.
        paths: N file names, for error messages.
        ranks: (number of this rank, number of ranks) that share each batch.
    """

    def __init__(self, stream, labels, device, epochs, store=None, paths=(), ranks=(0, 1)):
        self.stream, self.labels, self.device, self.epochs = stream, labels, device, epochs
        self.store, self.paths = store, paths
        self.size, self.steps = stream.batch_size, math.ceil(len(labels) / stream.batch_size)
        rank, world_size = ranks
        rows = slice(self.size * rank // world_size, self.size * (rank + 1) // world_size)
        self.share = Share(rows, self.size)

    @property
    def total_steps(self):
        """Of the whole run."""
        return self.epochs * self.steps

    def draw(self, step):
        """Indices and views, int64 [B] arrays, of this rank's chips in a step."""
        indices, views = self.stream.batch(step)
        return indices[self.share.rows], views[self.share.rows]

    def draws(self, first=0, stride=1):
        """What `draw` gives for the steps first, first + stride, ... of the run."""
        return map(self.draw, range(first, self.total_steps, stride))

    def names(self, step):
        """File names of the chips of a step, of all ranks."""
        return [self.paths[index] for index in self.stream.batch(step)[0]] if self.paths else ["unknown"]

    def between(self, first, end):
        """The batches of the steps first .. end - 1."""
        if self.store is None or self.store.memory == "device":
            yield from map(self._gather, range(first, end))
            return
        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(1) as thread:
            following = thread.submit(self._copy, first, copies) if first < end else None
            for step in range(first, end):
                batch, copied = following.result()
                if step + 1 < end:
                    following = thread.submit(self._copy, step + 1, copies)
                if copied is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(copied)
                    for tensor in (batch.chips, batch.views, batch.labels):
                        tensor.record_stream(current)  # or its memory could be reused too early
                yield batch

    def _gather(self, step):
        indices, views = self.draw(step)
        on_device = [to_device(torch.from_numpy(array), self.device) for array in (views, self.labels[indices])]
        chips = None if self.store is None else self.store[indices]
        return Batch(step, indices, views, chips, *on_device, self.share)

    def _copy(self, step, copies):
        """The batch, and on CUDA the event after which its copy is complete."""
        if copies is None:
            return self._gather(step), None
        with torch.cuda.stream(copies):
            return self._gather(step), copies.record_event()
