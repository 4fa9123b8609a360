"""What a user points at (shards, a folder, a picture, an array, a data set by its name) as data of a run's shape."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm.config import Config
from ebm.data import Access, load_manifest
from ebm.data.decode import IMAGE_SUFFIXES, show, to_uint8
from ebm.data.folders import FileSource
from ebm.data.items import Conversion, Source
from ebm.data.manifest import is_remote
from ebm.data.reader import read_all
from ebm.data.sources import open_source
from ebm.errors import DataError
from ebm.inference.images import load_array

log = logging.getLogger(__name__)


class Block(NamedTuple):
    """Some samples in the input's order."""

    names: list[str]  # of files, or keys of shards; the number of a row of an array
    data: Tensor  # uint8 images (n, C, H, W), or float32 vectors (n, D)
    labels: Tensor  # (n,) int64, -1 where there is none


def read_inputs(place: str, config: Config, split: str = "", batch: int = 1024) -> Iterator[Block]:
    """The samples of `place`: a directory or URL of shards, a manifest.json, a folder of images, an image file, a .npy
    file, or a source as `python -m ebm shard --source` has them. Of a source `split` is read; "": its test split where
    it has one, else all of it.

    Images of another size or with other channels than the run's are made to fit: the centre square, resized; that is
    logged. A .npy file must have the run's shape, `npy:FILE` need not. Raises DataError where something can't be read,
    or can't be made to fit. Nothing is written.
    """
    shape, path = tuple(config.data.shape), Path(place)
    if ":" in place and not is_remote(place) and not path.exists():
        yield from _of_source(_open(place, split), shape, batch)
    elif is_remote(place) or path.name == "manifest.json" or (path / "manifest.json").is_file():
        yield from _of_shards(place, config, batch)
    elif path.suffix == ".npy":
        rows = load_array(path, shape)
        for start in range(0, len(rows), batch):
            part = torch.from_numpy(np.array(rows[start : start + batch]))
            data = part.permute(0, 3, 1, 2) if part.ndim == 4 else part
            yield Block([str(start + i) for i in range(len(part))], data, torch.full((len(part),), -1))
    elif path.is_dir():
        yield from _of_source(_open(f"folder:{path}", split), shape, batch)
    elif path.suffix[1:].lower() in IMAGE_SUFFIXES:
        yield from _of_source(FileSource(str(path.parent), [(path.name, path.stem, None)]), shape, batch)
    else:
        yield from _of_source(_open(place, split), shape, batch)


def read_states(place: str, config: Config, split: str = "", most: int | None = None) -> tuple[Tensor, Tensor]:
    """The first `most` samples of `read_inputs` (all of them without), and their labels."""
    data, labels, found = [], [], 0
    for block in read_inputs(place, config, split):
        data.append(block.data)
        labels.append(block.labels)
        found += len(block.data)
        if most is not None and found >= most:
            break
    if not data:
        raise DataError(f"{place}: holds no samples; give one that does")
    return torch.cat(data)[:most], torch.cat(labels)[:most]


def _open(spec: str, split: str) -> Source:
    if split or ":" not in spec:
        return open_source(spec, split or "test")
    try:
        source = open_source(spec, "test")
    except DataError:  # most folders and arrays have no splits, and "train" stands for all of them
        return open_source(spec, "train")
    if spec.startswith("folder:"):
        log.warning("%s: the images of its split test alone are read", spec)
    return source


def _of_shards(place: str, config: Config, batch: int) -> Iterator[Block]:
    manifest = load_manifest(place, Access.of(config.data))
    if len(manifest.shape) != len(config.data.shape):
        raise DataError(f"{place}: samples of shape {list(manifest.shape)}, the run's are {list(config.data.shape)}")
    convert = Fitting(tuple(config.data.shape))
    for data, labels, keys in read_all(manifest, manifest.shape, batch=batch, max_pixels=config.data.max_pixels):
        if tuple(manifest.shape) != convert.shape:
            if data.ndim == 2:
                raise DataError(f"{place}: vectors of {data.shape[1]} values, the run's have {convert.shape[0]}")
            fitted = [convert(image.permute(1, 2, 0).numpy(), key) for image, key in zip(data, keys, strict=True)]
            data = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2)
        yield Block(keys, data, labels)
    convert.tell(place)


def _of_source(source: Source, shape: tuple[int, ...], batch: int) -> Iterator[Block]:
    convert = Fitting(shape)
    for start in range(0, len(source), batch):
        items = [source.item(i) for i in range(start, min(start + batch, len(source)))]
        arrays = [convert(item.array, item.name) for item in items]
        data = torch.from_numpy(np.stack(arrays))
        labels = torch.tensor([-1 if item.label is None else item.label for item in items])
        yield Block([item.name for item in items], data.permute(0, 3, 1, 2) if data.ndim == 4 else data, labels)
    convert.tell("the data")


class Fitting:
    """Makes arrays, uint8 images (H, W, C) or float32 vectors (D,), fit a run's `shape`, and counts what it changed."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        self.changed: Counter[str] = Counter()

    def __call__(self, array: np.ndarray, name: str) -> np.ndarray:
        array, found = to_uint8(array), (array.shape[-1], *array.shape[:-1])
        if found == self.shape:
            return array
        if array.ndim != 3 or len(self.shape) != 3 or self.shape[0] not in (1, 3) or self.shape[1] != self.shape[2]:
            raise DataError(f"{name}: has the shape {show(found)}, and the run's data {show(self.shape)}")
        mode = None if found[0] == self.shape[0] else ("L" if self.shape[0] == 1 else "RGB")
        fitted = Conversion(size=self.shape[1], mode=mode).image(array)  # type: ignore[arg-type]
        self.changed[show(found)] += 1
        return fitted

    def tell(self, place: str) -> None:
        """Log how many images were changed."""
        for found, count in self.changed.items():
            log.warning("%s: %d images of shape %s made to fit the run's %s", place, count, found, show(self.shape))
