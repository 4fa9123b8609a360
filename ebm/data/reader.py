"""The resumable reader: batches that are a pure function of (seed, stream, position), decoded in worker processes."""

import atexit
import fcntl
import math
import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm.config import DataConfig
from ebm.data.manifest import Manifest, check_files, load_manifest, prepare_cache
from ebm.data.samples import Decoded, Order, Request, SampleReader, Window, WindowDecoder
from ebm.data.transfer import Access
from ebm.errors import DataError
from ebm.runtime.process import init_worker, worker_context

PIPE = 1 << 20  # bytes that a pipe holds, where the system allows it: fewer switches between two processes


class Answer(NamedTuple):
    """What a worker sends: `value` with an array of this shape and type to follow, or an error."""

    value: Any
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    fault: str = ""  # the traceback of what should not happen


class Workers:
    """`count` processes. Each calls `decode(request) -> (value, array or None)` for its requests, one after the other,
    and sends the results in the same order."""

    def __init__(self, decode: Callable[[Any], tuple[Any, np.ndarray | None]], count: int):
        context = worker_context()
        self._processes, self._requests, self._answers = [], [], []
        for _ in range(count):
            requests, ours = context.Pipe(duplex=False)
            answers, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(decode, requests, theirs), daemon=True)
            process.start()
            requests.close()
            theirs.close()  # the last copy is the worker's, so the pipe ends with it
            self._processes.append(process)
            self._requests.append(ours)
            self._answers.append(answers)
        # A process that ends without close() would wait for ever for workers that ignore SIGTERM.
        atexit.register(self._kill)

    def ask(self, worker: int, request: Any) -> None:
        try:
            self._requests[worker].send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._lost(worker) from error

    def take(self, worker: int) -> tuple[Any, np.ndarray | None]:
        """The next result of a worker. Raises DataError where it is gone, RuntimeError where it failed."""
        try:
            answer: Answer = self._answers[worker].recv()
            if answer.fault:
                raise RuntimeError(f"data worker {worker} failed:\n{answer.fault}")
            if answer.shape is None:
                return answer.value, None
            array = np.empty(answer.shape, answer.dtype)
            _read_into(self._answers[worker].fileno(), array)
            return answer.value, array
        except (EOFError, ConnectionResetError) as error:
            raise self._lost(worker) from error

    def close(self) -> None:
        self._kill()
        for process in self._processes:
            process.join(timeout=5)
        for connection in (*self._requests, *self._answers):
            connection.close()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()

    def _lost(self, worker: int) -> DataError:
        process = self._processes[worker]
        process.join(timeout=5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return DataError(
            f"data worker {worker} (pid {process.pid}) {how}. Out of memory? Lower data.window or data.workers"
        )


def _read_into(fd: int, array: np.ndarray) -> None:
    """Fills an array from a pipe. Raises EOFError where the pipe ends before."""
    view = _bytes_of(array)
    while view.nbytes:
        count = os.readv(fd, [view])
        if count == 0:
            raise EOFError
        view = view[count:]


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _write_from(fd: int, array: np.ndarray) -> None:
    view = _bytes_of(np.ascontiguousarray(array))
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _serve(decode: Callable[[Any], tuple[Any, np.ndarray | None]], requests: Connection, answers: Connection) -> None:
    """A worker's life. A thread sends, so that the next request is decoded while this result waits for its reader."""
    init_worker()
    with suppress(OSError):  # the user may have used up their share of larger pipes
        fcntl.fcntl(answers.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
    results: queue.SimpleQueue[tuple[Answer, np.ndarray | None]] = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(results, answers), daemon=True).start()
    while True:
        try:
            request = requests.recv()
        except EOFError:  # the reader was closed
            os._exit(0)
        try:
            value, array = decode(request)
            shape, dtype = (None, "") if array is None else (array.shape, array.dtype.str)
            results.put((Answer(value, shape, dtype), array))
            del value, array  # the queue's copies are freed when they are sent
        except MemoryError:
            results.put((Answer(DataError("a data worker ran out of memory; lower data.window")), None))
        except Exception:  # raised in the main process
            results.put((Answer(None, fault=traceback.format_exc()), None))


def _send_all(results: "queue.SimpleQueue[tuple[Answer, np.ndarray | None]]", answers: Connection) -> None:
    try:
        while True:
            answer, array = results.get()
            answers.send(answer)
            if array is not None:
                _write_from(answers.fileno(), array)
            del answer, array
    except OSError:  # the reader is gone, and so is the reason to go on
        os._exit(0)


MAX_PIXELS = DataConfig.model_fields["max_pixels"].default
PART = 1 << 25  # bytes of decoded samples that travel together
MAX_SKIPPED = DataConfig.model_fields["max_skipped"].default


def reader_bytes(shape: Sequence[int], *, streams: int, per_stream: int, window: int, workers: int) -> int:
    """The most memory that a rank's reader and its workers take for `streams` of its own, beside what a process takes
    for itself: windows, encoded (which is at most as large as decoded), parts that wait, and the batch."""
    sample = math.prod(shape) * (1 if len(shape) == 3 else 4)
    part = min(max(PART, sample), window * sample)
    in_parts = window * sample > part
    encoded = window * sample * (streams if in_parts else max(workers, 1))
    return encoded + part * (streams + workers + 1) + 2 * streams * per_stream * sample


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
    `pin_memory`: batches in page-locked memory, from which copies to a GPU need no wait.

    The files are not looked for here (manifest.check_files does that, once for all ranks). A worker that is killed ends
    the iteration with a DataError.
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
        positions: Mapping[int, Sequence[int]] | None = None,
        on_error: Literal["fail", "skip"] = "fail",
        max_skipped: float = MAX_SKIPPED,
        max_pixels: int = MAX_PIXELS,
        num_classes: int | None = None,
        pin_memory: bool = False,
    ):
        prepare_cache(manifest)
        self.manifest, self.streams, self.per_stream = manifest, list(streams), per_stream
        self.order = Order([s.samples for s in manifest.shards], seed=seed, num_streams=num_streams, window=window)
        self.positions = {v: Position(*(positions or {}).get(v, ())) for v in self.streams}
        self.max_skipped = max_skipped
        self._ready: dict[int, deque[Decoded]] = {v: deque() for v in self.streams}
        reader = SampleReader(manifest, tuple(shape), max_pixels, num_classes)
        self.num_workers, self.pin_memory = workers, pin_memory
        self._decoder = WindowDecoder(reader, self.order, on_error)
        self._workers: Workers | None = None
        self._part_size = max(1, PART // reader.sample_bytes)
        # One more than the streams: where an epoch is shorter than a window, all need a new one at the same step.
        self._ahead = len(self.streams) + workers if workers else 1
        self._asked: deque[tuple[Request, int]] = deque()
        self._requests = self._plan()

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
        return Batch(self._joined(images), self._joined(labels), keys, errors)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """The one copy that a batch takes, to pinned memory where asked."""
        if not self.pin_memory:
            return torch.cat(parts)
        size = sum(len(part) for part in parts)
        return torch.cat(parts, out=torch.empty(size, *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=True))

    def close(self) -> None:
        """Ends the workers. The positions stay valid, unless `next` raised."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _plan(self) -> Iterator[tuple[Request, int]]:
        """Yields what to decode next, and the worker for it: a part of a window of the stream with the fewest samples
        ahead.

        It is asked as the reader goes, so that streams which skip samples get their windows sooner. The parts of a
        window are dealt to all workers, each of which reads all of it.
        """
        asked = {v: position.samples for v, position in self.positions.items()}
        parts: dict[int, Iterator[tuple[Request, int, int]]] = {v: iter(()) for v in self.streams}
        worker = 0
        while True:
            stream = min(self.streams, key=lambda v: (asked[v] - self.positions[v].samples, v))
            following = next(parts[stream], None)
            if following is None:
                window = self.order.window(stream, asked[stream])
                count, size = window.stop - window.start - window.first, self._part_size
                number = -(-count // size)
                step = min(max(self.num_workers, 1), number)
                parts[stream] = iter(_parts(window, number, size, step, worker))
                worker += step
                continue
            request, place, samples = following
            asked[stream] += samples
            yield request, place % max(self.num_workers, 1)

    def _receive(self) -> None:
        """Takes the oldest part that was asked for, and asks for another."""
        if self.num_workers and self._workers is None:
            self._workers = Workers(self._decoder, self.num_workers)
        while len(self._asked) < self._ahead:
            request, worker = next(self._requests)
            if self._workers is not None:
                self._workers.ask(worker, request)
            self._asked.append((request, worker))
        request, worker = self._asked.popleft()
        part, images = self._workers.take(worker) if self._workers is not None else self._decoder(request)
        if isinstance(part, DataError):
            raise part
        assert images is not None, "a part comes with its images"
        self._ready[part.stream].append(part._replace(images=images))

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


def _parts(window: Window, number: int, size: int, step: int, worker: int) -> Iterator[tuple[Request, int, int]]:
    """(request, worker, samples) of each part of a window."""
    count = window.stop - window.start - window.first
    for part in range(number):
        yield Request(window, part, size, step), worker + part % step, min(size, count - part * size)


def read_all(
    shards: str | Path | Manifest,
    shape: tuple[int, ...],
    *,
    batch: int = 1024,
    max_pixels: int = MAX_PIXELS,
    access: Access | None = None,
    check: bool = True,
) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Yields every sample once, in the shards' order: (images (m, C, H, W) uint8 or vectors (m, D) float32, labels
    (m,) int64, keys), m <= batch.

    `shards`: a directory, a manifest.json (a path or a URL, as `access` allows), or a Manifest. `check`: look first
    whether all files are there. Raises DataError at the first sample that can't be read.
    """
    manifest = shards if isinstance(shards, Manifest) else load_manifest(shards, access)
    if check:
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
