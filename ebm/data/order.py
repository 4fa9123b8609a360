"""The order in which samples are seen: a pure function of (seed, epoch), cut into streams and windows.

The shards of epoch e are permuted and laid end to end: N samples. Stream v of V has [N v // V, N (v + 1) // V) of
them, shuffled inside windows of consecutive samples. A stream's length is the same every epoch, so its position is
one integer, the samples it has gone through over all epochs.
"""

from itertools import accumulate
from typing import NamedTuple

import torch

from ebm.errors import DataError
from ebm.streams import generator


class Window(NamedTuple):
    """Samples [start, stop) of a stream's part of an epoch, from the `first`-th of their shuffled order on."""

    stream: int
    epoch: int
    number: int
    start: int
    stop: int
    first: int


class Order:
    """`sizes`: samples a shard. Raises DataError where there are fewer samples than streams."""

    def __init__(self, sizes: list[int], *, seed: int, num_streams: int, window: int):
        self.sizes, self.seed, self.num_streams, self.window_size = sizes, seed, num_streams, window
        self.total = sum(sizes)
        if self.total < num_streams:
            raise DataError(
                f"the shards hold {self.total} samples, fewer than data.streams={num_streams}; set data.streams lower"
            )

    def begin(self, stream: int) -> int:
        return self.total * stream // self.num_streams

    def length(self, stream: int) -> int:
        """Samples a stream goes through in an epoch."""
        return self.begin(stream + 1) - self.begin(stream)

    def window(self, stream: int, position: int) -> Window:
        """The window that holds a stream's `position`."""
        epoch, offset = divmod(position, self.length(stream))
        # First windows of different lengths: else all streams would need a new window at the same step, and wait.
        lead = self.window_size * stream // self.num_streams
        number = (offset + lead) // self.window_size
        start = max(0, number * self.window_size - lead)
        stop = min((number + 1) * self.window_size - lead, self.length(stream))
        return Window(stream, epoch, number, start, stop, offset - start)

    def end(self, window: Window) -> int:
        """The stream's position after a window."""
        return window.epoch * self.length(window.stream) + window.stop

    def ranks(self, window: Window) -> list[int]:
        """For each sample of a window, in file order, its place in the shuffled order."""
        gen = generator(self.seed, f"order/{window.epoch}", window.stream, window.number)
        return torch.randperm(window.stop - window.start, generator=gen).tolist()

    def segments(self, window: Window) -> list[tuple[int, int, int]]:
        """The window as (shard, start, stop) with samples counted inside the shard, in file order."""
        begin = self.begin(window.stream)
        start, stop = begin + window.start, begin + window.stop
        shards = torch.randperm(len(self.sizes), generator=generator(self.seed, "shards", 0, window.epoch)).tolist()
        ends = list(accumulate(self.sizes[shard] for shard in shards))
        segments = []
        for shard, end in zip(shards, ends, strict=True):
            low = end - self.sizes[shard]
            if low < stop and end > start:
                segments.append((shard, max(start - low, 0), min(stop - low, self.sizes[shard])))
        return segments
