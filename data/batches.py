"""Batches on the device: drawn by a stream, gathered from the stores."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from data.store import to_device

import torch


class Feed:
    """The batches of a stream: step -> views [B], labels [B], and chips [B, S, S] of each store.

    Where chips are kept outside the device, a batch is gathered in a thread, and sent to a GPU on
    a second stream, while the device works on the batch before it.

    Args:
        stream: with `batch(step)`, such as WeightedStream.
        members: int64 array, the chips that the stream's indices mean.
        labels: int64 [N] array, of all chips.
        device: where the batches are wanted.
        stores: any number of ChipStores on that device.
        part: (i, n): of n processes that share each of the stream's batches, this is number i.

    `rows` is what they give of a batch: (slice, B of the stream).
    """

    def __init__(self, stream, members, labels, device, *stores, part=(0, 1)):
        self.stream, self.members, self.labels = stream, members, labels
        self.device, self.stores = device, stores
        whole, (i, n) = stream.batch_size, part
        self.rows = slice(whole * i // n, whole * (i + 1) // n), whole
        away = any(store.place != "device" for store in stores)
        self.thread = ThreadPoolExecutor(1) if away else None
        self.lane = torch.cuda.Stream(self.device) if away and self.device.type == "cuda" else None
        self.next = (None, None)
        self.draw = lru_cache(maxsize=4)(self._draw)  # a step is asked for more than once

    def _draw(self, step):
        """The chips and views of a step, int64 [B] arrays."""
        drawn, views = self.stream.batch(step)
        rows, _ = self.rows
        return self.members[drawn[rows]], views[rows]

    def names(self, paths, step):
        """The files of a step's chips, of all processes, among those of all chips."""
        return [paths[chip] for chip in self.members[self.stream.batch(step)[0]]]

    def __call__(self, step):
        """uint8 chips, int64 views and labels, on the device."""
        if self.thread is None:
            return self._gather(step)
        number, batch = self.next
        if number != step:
            batch = self.thread.submit(self._send, step)
        self.next = (step + 1, self.thread.submit(self._send, step + 1))
        tensors, sent = batch.result()
        if sent is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent)
            for tensor in tensors:
                tensor.record_stream(current)  # or its memory might be given away too early
        return tensors

    def _gather(self, step):
        chosen, views = self.draw(step)
        host = (torch.from_numpy(array) for array in (views, self.labels[chosen]))
        return [*(to_device(t, self.device) for t in host), *(store[chosen] for store in self.stores)]

    def _send(self, step):
        """The batch, and the event after which it is there."""
        if self.lane is None:
            return self._gather(step), None
        with torch.cuda.stream(self.lane):
            tensors = self._gather(step)
            return tensors, self.lane.record_event()
