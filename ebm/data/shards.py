"""Writing shards: samples of a source to webdataset tars and their manifest, a shard a task of a process pool."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from ebm.data.decode import VECTOR_SUFFIX, check_finite, encode, encode_vector, show, to_array, to_pillow
from ebm.data.manifest import FILE_NAME, Manifest, assemble, is_remote, manifest_path
from ebm.data.sources import Item, Source, open_source
from ebm.data.tars import Scan, scan_shard
from ebm.errors import DataError
from ebm.runtime.files import locked, sync_directory
from ebm.runtime.process import init_worker, worker_context

TEMPORARY = ".tmp"
LOCK = ".lock"


@dataclass(frozen=True)
class Conversion:
    """What is done to an image. `size`: shorter side resized to it, then the centre square; `mode`: L or RGB;
    `format`: None keeps PNG and JPEG files as they are where nothing else changes them, and writes PNG otherwise."""

    size: int | None = None
    mode: Literal["L", "RGB"] | None = None
    format: Literal["png", "jpg"] | None = None

    def image(self, image: np.ndarray) -> np.ndarray:
        if self.size is None and self.mode is None:
            return image
        picture = to_pillow(image)
        if self.mode is not None:
            picture = picture.convert(self.mode)
        if self.size is not None and picture.size != (self.size, self.size):
            picture = _centre_square(picture, self.size)
        return to_array(picture)

    def encoded(self, item: Item, image: np.ndarray) -> tuple[bytes, str]:
        kept = item.encoded
        if kept is not None and image is item.array and self.format in (None, kept[1]):
            return kept
        suffix = self.format or "png"
        return encode(image, suffix), suffix


def _centre_square(picture: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing, of the largest centred square."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def write_shards(
    source: Source,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    workers: int | None = None,
    format: Literal["png", "jpg"] | None = None,
    size: int | None = None,
    mode: Literal["L", "RGB"] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Write `source` to `out` as shard-000000.tar ... and manifest.json, last. Returns the manifest.

    The bytes depend on the source and the conversion alone, not on `workers` (default: the CPUs; vectors and a few
    shards are written in this process). Raises DataError where `out` has shards already (unless `overwrite`), where
    the samples differ in shape, and at a vector that is not finite.
    """
    out = Path(out)
    try:
        prepare(out, overwrite)
        starts = range(0, len(source), samples_per_shard)
        writer = ShardWriter(source, Conversion(size, mode, format), str(out), samples_per_shard)
        with tqdm(total=len(source), desc=f"writing {out}", unit="sample", disable=None if progress else True) as bar:
            scans = []
            for scan in _run(writer, len(starts), workers or default_workers(source, len(starts))):
                scans.append(scan)
                bar.update(scan.samples)
        return _publish(out, scans)
    except (OSError, BrokenProcessPool) as error:
        raise DataError(f"{out}: shards can't be written ({error})") from error


def ensure_shards(shards: str, source: str | None, split: str) -> None:
    """Write `shards`, a local directory, from `source` where one is given and there is no manifest yet. Raises
    DataError. Of several jobs that begin together one writes them, and the others wait."""
    if source is None or is_remote(shards):
        return
    path = manifest_path(shards)
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent / LOCK):
            if not path.exists():
                write_shards(open_source(source, split), path.parent)
    except OSError as error:
        raise DataError(f"{path.parent}: shards can't be written ({error})") from error


@dataclass(frozen=True)
class ShardWriter:
    """Writes shard i of a source under a temporary name. Called in worker processes."""

    source: Source
    conversion: Conversion
    out: str
    samples_per_shard: int

    def __call__(self, shard: int) -> Scan:
        first = self.source.item(0)
        shape = self._converted(first).shape
        path = Path(self.out) / (shard_name(shard) + TEMPORARY)
        start = shard * self.samples_per_shard
        with open(path, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
                for i in range(start, min(start + self.samples_per_shard, len(self.source))):
                    item = self.source.item(i)
                    tar.write(self._sample(item, shape, first.name))
            file.flush()
            os.fsync(file.fileno())
        return scan_shard(path)

    def _converted(self, item: Item) -> np.ndarray:
        if item.array.ndim > 1:
            return self.conversion.image(item.array)
        if self.conversion != Conversion():
            raise DataError(
                f"{item.name} is a vector of {len(item.array)} values; --size, --grayscale, --rgb and --format are for "
                "images"
            )
        return item.array

    def _sample(self, item: Item, shape: tuple[int, ...], first: str) -> dict[str, bytes]:
        array = self._converted(item)
        if array.shape != shape:
            raise DataError(
                f"{item.name} is {show(array.shape)} (height, width, channels), {first} is {show(shape)}: all images "
                "must have one shape; give --size N, and --rgb or --grayscale where channels differ"
            )
        if array.ndim == 1:
            data, suffix = _encoded_vector(item), VECTOR_SUFFIX
        else:
            data, suffix = self.conversion.encoded(item, array)
        label = {} if item.label is None else {"cls": str(item.label).encode()}
        return {"__key__": item.key, suffix: data} | label


def _encoded_vector(item: Item) -> bytes:
    try:
        check_finite(item.array)
    except ValueError as error:
        raise DataError(f"{item.name}: {error}") from error
    return encode_vector(item.array)


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}.tar"


def prepare(out: Path, overwrite: bool) -> None:
    """An empty place for shards; what is there is removed only with `overwrite`, the manifest first."""
    out.mkdir(parents=True, exist_ok=True)
    there = [path for path in (out / FILE_NAME, *sorted(out.glob("*.tar"))) if path.exists()]
    if there and not overwrite:
        raise DataError(
            f"{there[0]} exists already; give --overwrite to replace it, or another --out"
            + ("" if there[0].name == FILE_NAME else f" (or use these shards: `python -m ebm index {out}`)")
        )
    for path in (*there[:1], *out.glob("shard-*.tar"), *out.glob(f"shard-*.tar{TEMPORARY}")):
        path.unlink(missing_ok=True)


def default_workers(source: Source, shards: int) -> int:
    """A worker needs seconds to start: as long as a few shards of images take, or many of vectors."""
    return len(os.sched_getaffinity(0)) if shards >= 4 and source.item(0).array.ndim > 1 else 1


def _run(writer: ShardWriter, shards: int, workers: int):
    """Scans in the order of the shards."""
    workers = min(workers, shards)
    if workers <= 1:
        yield from map(writer, range(shards))
        return
    with ProcessPoolExecutor(workers, worker_context(), initializer=_set_writer, initargs=(writer,)) as pool:
        try:
            yield from pool.map(_write, range(shards))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_writer: ShardWriter | None = None  # a worker process's, sent once and not with every shard


def _set_writer(writer: ShardWriter) -> None:
    global _writer
    _writer = writer
    init_worker()


def _write(shard: int) -> Scan:
    return _writer(shard)


def _publish(out: Path, scans: list[Scan]) -> Manifest:
    names = [shard_name(i) for i in range(len(scans))]
    manifest = assemble(out, names, scans)
    for name in names:
        os.replace(out / (name + TEMPORARY), out / name)
    sync_directory(out)
    manifest.save()
    return manifest
