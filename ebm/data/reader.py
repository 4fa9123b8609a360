"""The resumable reader: batches that are a pure function of (seed, stream, position), decoded in worker processes."""

import atexit
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ebm.config import DataConfig
from ebm.data.manifest import Manifest, check_files, load_manifest
from ebm.data.order import Order, Window
from ebm.data.samples import Decoded, SampleReader, WindowDataset
from ebm.data.transfer import Access
from ebm.errors import DataError
from ebm.runtime.process import init_worker, worker_context

MAX_PIXELS = DataConfig.model_fields["max_pixels"].default
MAX_SKIPPED = DataConfig.model_fields["max_skipped"].default


class Position(NamedTuple):
    """How far a stream is. `samples`: gone through over all epochs; `skipped`: how many of the last one's epoch were
    passed over so far."""

    samples: int = 0
    skipped: int = 0


class Batch(NamedTuple):
    """S streams times n samples, stream by stream in the order of the reader's `streams`."""

    images: Tensor  # (S * n, C, H, W) uint8, or vectors (S * n, D) float32
    labels: Tensor  # (S * n,) int64, -1 where there is none
    keys: list[tuple[int, str]]  # (stream, key)
    errors: list[str]  # one for each unreadable sample passed over to fill this batch: shard, key and reason

    @property
    def skipped(self) -> int:
        return len(self.errors)


class ShardReader:
    """An endless iterator of batches over the streams that one rank owns.

    After `next` returns, `positions` (a Position a stream) is the state after that batch; a reader built with it, or
    with its values as JSON has them, goes on exactly there, whatever its workers and world size. `per_stream`: samples
    of each stream a batch. `on_error="skip"` passes over unreadable samples and tells of each, and raises DataError
    where they are more than `max_skipped` of a stream's epoch; `"fail"` raises at the first, naming shard and key.
    """

    def __init__(
        self,
        manifest: Manifest,
        shape: tuple[int, ...],
        *,
        seed: int,
        num_streams: int,
        streams: list[int],
        per_stream: int,
        window: int,
        workers: int,
        positions: dict[int, Sequence[int]] | None = None,
        on_error: Literal["fail", "skip"] = "fail",
        max_skipped: float = MAX_SKIPPED,
        max_pixels: int = MAX_PIXELS,
        num_classes: int | None = None,
    ):
        self.manifest, self.streams, self.per_stream = manifest, list(streams), per_stream
        self.order = Order([s.samples for s in manifest.shards], seed=seed, num_streams=num_streams, window=window)
        self.positions = {v: Position(*(positions or {}).get(v, ())) for v in self.streams}
        self.max_skipped = max_skipped
        # Up to where windows were given to the workers.
        self._asked = {v: position.samples for v, position in self.positions.items()}
        self._ready: dict[int, deque[Decoded]] = {v: deque() for v in self.streams}
        reader = SampleReader(manifest, tuple(shape), max_pixels, num_classes)
        self._loader = make_loader(
            WindowDataset(reader, self.order, on_error), self._windows(), workers, len(self.streams) + 1
        )
        self._decoded: Iterator[Decoded | DataError] | None = None
        self._kill = partial(_kill, [])

    @property
    def epoch(self) -> float:
        """Epochs that the first owned stream has gone through, with its fraction."""
        return self.positions[self.streams[0]].samples / self.order.length(self.streams[0])

    def __iter__(self) -> "ShardReader":
        return self

    def __next__(self) -> Batch:
        images, labels, keys, errors = [], [], [], []
        for stream in self.streams:
            for part, end in self._take(stream):
                errors += self._advance(part, end)
                images.append(torch.from_numpy(part.images))
                labels.append(torch.from_numpy(part.labels))
                keys += [(stream, key) for key in part.keys]
        return Batch(torch.cat(images), torch.cat(labels), keys, errors)

    def close(self) -> None:
        """End the workers. The positions stay valid, unless `next` raised."""
        self._decoded = self._loader = None
        self._kill()
        atexit.unregister(self._kill)

    def _windows(self) -> Iterator[Window]:
        """What to decode next: a window of the stream that has the fewest samples ahead.

        Drawn by the loader as it goes, so streams that skip samples, and need their windows sooner, get them.
        """
        while True:
            stream = min(self.streams, key=lambda v: (self._asked[v] - self.positions[v].samples, v))
            window = self.order.window(stream, self._asked[stream])
            self._asked[stream] = self.order.end(window)
            yield window

    def _start(self) -> None:
        others = set(multiprocessing.active_children())
        self._decoded = iter(self._loader)
        # A process that ends without close() would wait for ever for workers that ignore SIGTERM.
        self._kill = partial(_kill, list(set(multiprocessing.active_children()) - others))
        atexit.register(self._kill)

    def _receive(self) -> None:
        if self._decoded is None:
            self._start()
        try:
            part = next(self._decoded)
        except RuntimeError as error:
            if "worker" not in str(error) or "exited unexpectedly" not in str(error):
                raise
            raise DataError(f"{error}. Out of memory? Lower data.window or data.workers") from error
        if isinstance(part, DataError):
            raise part
        self._ready[part.stream].append(part)

    def _take(self, stream: int) -> Iterator[tuple[Decoded, int]]:
        """The stream's next `per_stream` samples, in parts, each with the stream's position after it."""
        queue, wanted = self._ready[stream], self.per_stream
        while wanted:
            while not queue:
                self._receive()
            part, rest = _split(queue.popleft(), wanted)
            wanted -= len(part.keys)
            if wanted:
                yield part, part.end
            else:  # what was skipped after the last sample belongs to the next batch, as it does after a resume
                queue.appendleft(rest)
                yield part, int(part.ends[-1])

    def _advance(self, part: Decoded, end: int) -> list[str]:
        """Move a stream on to `end`, inside a part. Returns the errors of the samples that were passed over."""
        start, skipped = self.positions[part.stream]
        errors = [part.errors[i] for i in range(start + 1, end + 1) if i in part.errors] if part.errors else []
        length = self.order.length(part.stream)
        skipped = len(errors) + (skipped if start % length else 0)  # an epoch's count begins with it
        if errors and skipped > self.max_skipped * length:
            higher = f"data.max_skipped={min(10 * skipped / length, 0.9):.1g}"
            raise DataError(
                f"stream {part.stream} of data.streams={self.order.num_streams} has passed over {skipped} of its "
                f"{length} samples in an epoch, more than the share data.max_skipped={self.max_skipped}. Copy or write "
                f"the shards again, or, if so many can be spared, set {higher}. The error now: {errors[0]}"
            )
        self.positions[part.stream] = Position(end, skipped)
        return errors


def _split(part: Decoded, n: int) -> tuple[Decoded, Decoded]:
    """The first n samples and the others, as views."""
    fields = ("images", "labels", "keys", "ends")
    head = part._replace(**{name: getattr(part, name)[:n] for name in fields})
    return head, part._replace(**{name: getattr(part, name)[n:] for name in fields})


def make_loader(dataset: WindowDataset, windows: Iterator[Window], workers: int, ahead: int) -> DataLoader:
    """Decodes `windows` in order, `ahead` of them before they are asked for: where an epoch is shorter than a window,
    all streams need one at the same step. Arrays travel through pipes: /dev/shm is 64 MiB in many containers."""
    options = {}
    if workers:
        options = {
            "multiprocessing_context": worker_context(),
            "prefetch_factor": -(-ahead // workers),
            "worker_init_fn": init_worker,
        }
    return DataLoader(
        dataset,
        sampler=windows,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the global generator
        **options,
    )


def _kill(workers: list) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _as_it_is(value):
    return value


def read_all(
    shards, shape: tuple[int, ...], *, batch: int = 1024, max_pixels: int = MAX_PIXELS, access: Access | None = None
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Every sample once, in the shards' order: (images (m, C, H, W) uint8 or vectors (m, D) float32, labels (m,) int64,
    keys), m <= batch.

    `shards`: a directory, a manifest.json (a path or a URL, as `access` allows), or a Manifest. Raises DataError at the
    first sample that can't be read.
    """
    manifest = shards if isinstance(shards, Manifest) else load_manifest(shards, access)
    check_files(manifest)
    reader = SampleReader(manifest, tuple(shape), max_pixels)
    for shard, entry in enumerate(manifest.shards):
        for start in range(0, entry.samples, batch):
            images, labels, keys = [], [], []
            for sample in reader.samples(shard, start, min(start + batch, entry.samples)):
                image, label, key = reader.decode(shard, sample)
                images.append(image)
                labels.append(label)
                keys.append(key)
            yield torch.from_numpy(np.stack(images)), torch.tensor(labels), keys
