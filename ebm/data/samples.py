"""From shards to decoded samples: what the reader's workers run. Every sample is either decoded or accounted for."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from ebm.data.cache import Prefetch
from ebm.data.decode import decode, decode_vector, read_header, show
from ebm.data.manifest import Manifest
from ebm.data.order import Order, Window
from ebm.data.tars import BLOCK, crc32, main_suffixes, parse_label, read_block, read_range
from ebm.errors import DataError

KEPT = 1 << 26  # bytes of decoded samples that a worker keeps, where they are all samples of the manifest
OVERHEAD = 512  # bytes of the objects around a kept sample


class Decoded(NamedTuple):
    """A window's readable samples in shuffled order. `ends`: the stream's position after each; `errors`: why a sample
    was passed over, by the position after it."""

    stream: int
    images: np.ndarray  # (m, C, H, W) uint8, or vectors (m, D) float32
    labels: np.ndarray  # (m,) int64, -1 where there is none
    keys: list[str]
    ends: np.ndarray  # (m,) int64
    errors: dict[int, str]
    end: int  # the stream's position after the window


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
    kept: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def dtype(self) -> type:
        return np.float32 if len(self.shape) == 1 else np.uint8

    @cached_property
    def keeps(self) -> bool:
        size = math.prod(self.shape) * np.dtype(self.dtype).itemsize + OVERHEAD
        return self.manifest.samples * size <= KEPT

    def samples(self, shard: int, start: int, stop: int) -> Iterator[dict | Sample | DataError]:
        """Samples [start, stop) of a shard, encoded or decoded; a DataError in the place of each that can't be had."""
        entry = self.manifest.shards[shard]
        path = self.manifest.path(entry)
        try:
            with self.manifest.open(entry) as file:
                for block in range(start // BLOCK, -(-stop // BLOCK)):
                    low = block * BLOCK
                    found = self._kept_block(file, shard, block) if self.keeps else self._block(file, shard, block)
                    yield from found[max(start - low, 0) : stop - low]
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error})") from error

    def _kept_block(self, file, shard: int, block: int) -> list[Sample | DataError]:
        if (shard, block) not in self.kept:
            self.kept[shard, block] = [self._tried(shard, sample) for sample in self._block(file, shard, block)]
        return self.kept[shard, block]

    def _tried(self, shard: int, sample: dict | DataError) -> Sample | DataError:
        try:
            return self.decode(shard, sample)
        except DataError as error:
            return error

    def _block(self, file, shard: int, block: int) -> list[dict | DataError]:
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
            found = list(read_block(data))
            if len(found) != stop - first:
                raise ValueError(f"there are {len(found)} samples where it says {stop - first}, from {first} on")
        except ValueError as error:
            raise DataError(
                f"{path}: is not what the manifest says: {error}; write the manifest anew with "
                f"`python -m ebm index{'' if self.manifest.remote else f' {self.manifest.directory}'}`"
            ) from error
        return found

    def _damage(self, data: bytes, expected: int) -> str:
        """For the message: the first sample of a changed block that shows it. A change need not show."""
        place, found = "at the first header", 0
        try:
            for found, sample in enumerate(read_block(data), 1):  # noqa: B007
                place = f"key {sample['__key__']}"
                self._decode(sample)
                place = f"after key {sample['__key__']}"
            if found < expected:
                raise ValueError("the tar ends, or a header is damaged")
        except ValueError as error:
            return f" ({place}: {error})"
        return ""

    def decode(self, shard: int, sample: dict | Sample | DataError) -> Sample:
        """What `samples` gave, decoded. Raises DataError."""
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

    def _decode(self, sample: dict) -> tuple[np.ndarray, int]:
        image, vector = main_suffixes(tuple(sample))
        if len(self.shape) == 1:
            if vector is None:
                shown = "; set data.shape=[C,H,W], as the images have it" if image else ""
                raise ValueError(f"has no vector (.npy), and data.shape is {list(self.shape)}{shown}")
            return decode_vector(sample[vector], *self.shape), self._label(sample.get("cls"))
        if image is None:
            shown = f", but a vector, and data.shape is {list(self.shape)}; set data.shape=[D]" if vector else ""
            raise ValueError(f"has no image{shown}")
        return self._image(sample[image]), self._label(sample.get("cls"))

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

    def _label(self, data: bytes | None) -> int:
        if data is None:
            # Where all were labelled when the manifest was made, one without has lost its .cls to damage.
            if self.num_classes is not None or self.manifest.num_classes is not None:
                raise ValueError("has no .cls")
            return -1
        label = parse_label(data)
        if self.num_classes is not None and label >= self.num_classes:
            raise ValueError(f".cls is {label}, not below num_classes={self.num_classes}")
        return label


@dataclass(frozen=True)
class WindowDataset:
    """A map from windows to their decoded samples, for a DataLoader. Returns a DataError as a value: raised in a
    worker, it would arrive as another type and with a traceback."""

    reader: SampleReader
    order: Order
    on_error: Literal["fail", "skip"]
    prefetch: Prefetch = field(default_factory=Prefetch)

    def __getitem__(self, window: Window) -> Decoded | DataError:
        try:
            if self.reader.manifest.remote:
                self._ask_ahead(window)
            return self._read(window)
        except DataError as error:
            return error

    def _read(self, window: Window) -> Decoded:
        ranks = self.order.ranks(window)
        count = len(ranks) - window.first
        images = np.empty((count, *self.reader.shape), self.reader.dtype)
        labels, keys, good = np.empty(count, np.int64), [""] * count, np.zeros(count, bool)
        end, errors = self.order.end(window), {}
        ends = np.arange(end - count + 1, end + 1)
        for rank, (shard, sample) in zip(ranks, self._samples(window), strict=True):
            place = rank - window.first
            if place < 0:
                continue
            try:
                images[place], labels[place], keys[place] = self.reader.decode(shard, sample)
                good[place] = True
            except DataError as error:
                if self.on_error == "fail":
                    raise
                errors[int(ends[place])] = str(error)
        if not errors:
            return Decoded(window.stream, images, labels, keys, ends, errors, end)
        kept = [key for key, ok in zip(keys, good, strict=True) if ok]
        return Decoded(window.stream, images[good], labels[good], kept, ends[good], errors, end)

    def _ask_ahead(self, window: Window) -> None:
        """For the shards that this window ends in, and that the stream's next window needs."""
        following = self.order.window(window.stream, self.order.end(window))
        segments = self.order.segments(window)[1:] + self.order.segments(following)
        self.prefetch(self.reader.manifest, dict.fromkeys(shard for shard, _, _ in segments))

    def _samples(self, window: Window) -> Iterator[tuple[int, dict | Sample | DataError]]:
        for shard, start, stop in self.order.segments(window):
            for sample in self.reader.samples(shard, start, stop):
                yield shard, sample
