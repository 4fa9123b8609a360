"""Which samples come when, and how they are decoded.

The order is a pure function of (seed, epoch). The shards of epoch e are permuted and laid end to end: N samples.
Stream v of V has [N v // V, N (v + 1) // V) of them, shuffled inside windows of consecutive samples. A stream's
length is the same every epoch, so its position is one integer, the samples it has gone through over all epochs.
Every sample is either decoded or accounted for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch

from ebm.data.cache import Prefetch, Wanted
from ebm.data.decode import decode, decode_vector, read_header, show
from ebm.data.manifest import Manifest
from ebm.data.tars import BLOCK, crc32, main_suffixes, parse_label, read_block, read_range
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


KEPT = 1 << 26  # bytes of decoded samples that a worker keeps, where they are all samples of the manifest
OVERHEAD = 512  # bytes of the objects around a kept sample
NOTHING = np.empty(0, np.uint8)


class Decoded(NamedTuple):
    """The readable samples of a part of a window, in shuffled order. `ends`: the stream's position after each;
    `errors`: why a sample was passed over, by the position after it."""

    stream: int
    images: np.ndarray  # (m, C, H, W) uint8, or vectors (m, D) float32
    labels: np.ndarray  # (m,) int64, -1 where there is none
    keys: list[str]
    ends: np.ndarray  # (m,) int64
    errors: dict[int, str]
    end: int  # the stream's position after the part


class Request(NamedTuple):
    """Part `number` of a window: `size` samples of its shuffled order, counted from `window.first`. Whoever is asked
    for it is also asked for each `step`-th part after it, and for no others."""

    window: Window
    number: int
    size: int
    step: int


class WrongManifest(DataError):
    """The manifest contradicts the shards' own contents, which passing over samples can't mend."""


class Sample(NamedTuple):
    array: np.ndarray  # image or vector of the reader's shape
    label: int  # -1 where there is none
    key: str


@dataclass(frozen=True)
class SampleReader:
    """Reads and checks samples of one shape, (C, H, W) of images or (D,) of vectors. Its errors name shard, key and
    reason. `kept`: decoded blocks of 64 samples by (shard, block), where `keeps`: a small set is decoded once."""

    manifest: Manifest
    shape: tuple[int, ...]
    max_pixels: int
    num_classes: int | None = None
    kept: dict[tuple[int, int], list[Sample | DataError]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def dtype(self) -> type[np.generic]:
        return np.float32 if len(self.shape) == 1 else np.uint8

    @property
    def sample_bytes(self) -> int:
        """Of a decoded sample."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def keeps(self) -> bool:
        return self.manifest.samples * (self.sample_bytes + OVERHEAD) <= KEPT

    def samples(
        self, shard: int, start: int, stop: int, on_error: Literal["fail", "skip"] = "fail"
    ) -> Iterator[dict[str, Any] | Sample | DataError]:
        """Yields samples [start, stop) of a shard, encoded or decoded; a DataError in the place of each that can't be
        had. A local shard that can't be opened is such a case with `on_error="skip"`. Else it raises DataError: what
        can't be fetched now may be had later."""
        done = start
        try:
            for found in self._blocks(shard, start, stop):
                yield from found
                done += len(found)
        except DataError as error:
            if on_error == "fail" or self.manifest.remote or isinstance(error, WrongManifest):
                raise
            yield from [error] * (stop - done)

    def _blocks(self, shard: int, start: int, stop: int) -> Iterator[list[Any]]:
        """The samples by blocks, cut to [start, stop). Raises DataError where the shard can't be read."""
        entry = self.manifest.shards[shard]
        try:
            with self.manifest.open(entry) as file:
                for block in range(start // BLOCK, -(-stop // BLOCK)):
                    low = block * BLOCK
                    found = self._kept_block(file, shard, block) if self.keeps else self._block(file, shard, block)
                    yield found[max(start - low, 0) : stop - low]
        except OSError as error:
            raise DataError(f"{self.manifest.path(entry)}: can't be read ({error})") from error

    def _kept_block(self, file: BinaryIO, shard: int, block: int) -> list[Sample | DataError]:
        if (shard, block) not in self.kept:
            self.kept[shard, block] = [self._tried(shard, sample) for sample in self._block(file, shard, block)]
        return self.kept[shard, block]

    def _tried(self, shard: int, sample: dict[str, Any] | DataError) -> Sample | DataError:
        try:
            return self.decode(shard, sample)
        except DataError as error:
            return error

    def _block(self, file: BinaryIO, shard: int, block: int) -> list[dict[str, Any] | DataError]:
        entry = self.manifest.shards[shard]
        path = self.manifest.path(entry)
        first, stop = block * BLOCK, min((block + 1) * BLOCK, entry.samples)
        begin, end = (*entry.offsets, entry.bytes)[block : block + 2]
        data = read_range(file, begin, end)
        if crc32(data) != entry.crc32[block] and self.manifest.remote:
            with self.manifest.reopen(entry) as again:
                data = read_range(again, begin, end)
        if crc32(data) != entry.crc32[block]:
            lost = DataError(
                f"{path}: changed since the manifest was made: samples {first} to {stop - 1} (bytes {begin} to "
                f"{end - 1}) have another crc32, so none of them can be trusted{self._damage(data, stop - first)}. "
                "Copy or write the shard again, or set data.on_error=skip"
            )
            return [lost] * (stop - first)
        try:
            found = [self._needed(sample) for sample in read_block(data, self.manifest.dots)]
            if len(found) != stop - first:
                raise ValueError(f"there are {len(found)} samples where it says {stop - first}, from {first} on")
        except ValueError as error:
            raise WrongManifest(
                f"{path}: is not what the manifest says: {error}; write the manifest anew with "
                f"`python -m ebm index{'' if self.manifest.remote else f' {self.manifest.directory}'}`"
            ) from error
        if entry.labels is not None:
            for sample, label in zip(found, entry.labels[first:stop], strict=True):
                sample["__label__"] = label
        return list(found)

    def _needed(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Without members that are not decoded, which may take much memory."""
        wanted = {"__key__", "cls", *main_suffixes(tuple(sample), self.manifest.image)}
        return {name: value for name, value in sample.items() if name in wanted}

    def _damage(self, data: bytes, expected: int) -> str:
        """For the message: the first sample of a changed block that shows it. A change need not show."""
        place, found = "at the first header", 0
        try:
            for found, sample in enumerate(read_block(data, self.manifest.dots), 1):  # noqa: B007
                place = f"key {sample['__key__']}"
                self._decode(sample)
                place = f"after key {sample['__key__']}"
            if found < expected:
                raise ValueError("the tar ends, or a header is damaged")
        except ValueError as error:
            return f" ({place}: {error})"
        return ""

    def decode(self, shard: int, sample: dict[str, Any] | Sample | DataError) -> Sample:
        """Decodes what `samples` gave. Raises DataError."""
        if isinstance(sample, Sample):
            return sample
        if isinstance(sample, DataError):
            raise sample
        key = sample["__key__"]
        try:
            return Sample(*self._decode(sample), key)
        except ValueError as error:
            path = self.manifest.path(self.manifest.shards[shard])
            raise DataError(f"{path}: key {key}: {error}") from error

    def _decode(self, sample: dict[str, Any]) -> tuple[np.ndarray, int]:
        image, vector = main_suffixes(tuple(sample), self.manifest.image)
        if len(self.shape) == 1:
            if vector is None:
                shown = "; set data.shape=[C,H,W], as the images have it" if image else ""
                raise ValueError(f"has no vector (.npy), and data.shape is {list(self.shape)}{shown}")
            return decode_vector(sample[vector], *self.shape), self._label(sample)
        if image is None:
            shown = f", but a vector, and data.shape is {list(self.shape)}; set data.shape=[D]" if vector else ""
            raise ValueError(f"has no image{shown}")
        return self._image(sample[image]), self._label(sample)

    def _image(self, data: bytes) -> np.ndarray:
        header = read_header(data)
        if header.height * header.width > self.max_pixels:
            raise ValueError(f"image has {header.width}x{header.height} pixels, more than {self.max_pixels}")
        if header.shape != tuple(self.shape):
            raise ValueError(
                f"image is {show(header.shape)}, data.shape is {list(self.shape)}; set data.shape="
                f"[{','.join(map(str, header.shape))}], or write the shards with --size, --grayscale or --rgb"
            )
        return decode(data, header)

    def _label(self, sample: dict[str, Any]) -> int:
        if "__label__" in sample:
            where, label = "the manifest's label", int(sample["__label__"])
        else:
            where, label = ".cls", parse_label(sample["cls"]) if "cls" in sample else -1
        if label < 0:
            # Where samples were labelled when the manifest was made, one without has lost its label to damage.
            if self.num_classes is not None or self.manifest.num_classes is not None:
                raise ValueError("has no .cls" if where == ".cls" else "has no label in the manifest")
            return -1
        if self.num_classes is not None and label >= self.num_classes:
            raise ValueError(f"{where} is {label}, not below num_classes={self.num_classes}")
        return label


Found = tuple[int, dict[str, Any] | Sample | DataError]  # a shard, and what it has in the place of a sample


@dataclass
class WindowDecoder:
    """Decodes parts of windows. A window is read once and kept encoded until its parts are decoded: it takes the memory
    of its files, not that of their pixels."""

    reader: SampleReader
    order: Order
    on_error: Literal["fail", "skip"]
    prefetch: Prefetch = field(default_factory=Prefetch)
    _open: dict[Window, dict[int, Found]] = field(default_factory=dict)  # samples by their place in shuffled order

    def __call__(self, request: Request) -> tuple[Decoded | DataError, np.ndarray | None]:
        """(what was decoded without its images, the images), or a DataError as a value: raised in a worker, it would
        arrive with a traceback."""
        try:
            part = self.part(request)
        except DataError as error:
            return error, None
        return part._replace(images=NOTHING), part.images

    def part(self, request: Request) -> Decoded:
        """Raises DataError."""
        window = request.window
        found = self._open.get(window)
        if found is None:
            found = self._open[window] = self._read(request)
        total = window.stop - window.start
        begin = window.first + request.number * request.size
        end = min(begin + request.size, total)
        places = [place for place in found if begin <= place < end]  # in file order
        taken = {place: found.pop(place) for place in places}
        if not found:
            del self._open[window]
        return self._decoded(window, taken, begin, end)

    def _read(self, request: Request) -> dict[int, Found]:
        """The samples of the parts that this decoder is asked for."""
        window = request.window
        if self.reader.manifest.remote:
            self._ask_ahead(window)
        ours, found = request.number % request.step, {}
        for place, sample in zip(self.order.ranks(window), self._samples(window), strict=True):
            part = (place - window.first) // request.size
            if place >= window.first and part % request.step == ours and part >= request.number:
                found[place] = sample
        return found

    def _decoded(self, window: Window, found: dict[int, Found], begin: int, end: int) -> Decoded:
        count, errors = end - begin, {}
        images = np.empty((count, *self.reader.shape), self.reader.dtype)
        labels, keys, good = np.empty(count, np.int64), [""] * count, np.zeros(count, bool)
        first = self.order.end(window) - (window.stop - window.start) + begin  # the stream's position before the part
        ends = np.arange(first + 1, first + count + 1)
        for place, (shard, sample) in found.items():
            at = place - begin
            try:
                images[at], labels[at], keys[at] = self.reader.decode(shard, sample)
                good[at] = True
            except DataError as error:
                if self.on_error == "fail":
                    raise
                errors[int(ends[at])] = str(error)
        if not errors:
            return Decoded(window.stream, images, labels, keys, ends, errors, first + count)
        kept = [key for key, ok in zip(keys, good, strict=True) if ok]
        return Decoded(window.stream, images[good], labels[good], kept, ends[good], errors, first + count)

    def _ask_ahead(self, window: Window) -> None:
        """Prefetches the shards that this window ends in, and those that the stream's next window needs."""
        remote = self.reader.manifest.remote
        assert remote is not None
        following = self.order.window(window.stream, self.order.end(window))
        segments = self.order.segments(window)[1:] + self.order.segments(following)
        shards = [self.reader.manifest.shards[i] for i in dict.fromkeys(shard for shard, _, _ in segments)]
        self.prefetch(remote, [Wanted(shard.name, shard.bytes, shard.sha256) for shard in shards])

    def _samples(self, window: Window) -> Iterator[Found]:
        for shard, start, stop in self.order.segments(window):
            for sample in self.reader.samples(shard, start, stop, self.on_error):
                yield shard, sample
