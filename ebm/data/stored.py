"""Sources in files that hold encoded samples: parquet tables, and shards that are to be written anew."""

import glob
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ebm.data.arrays import fingerprint
from ebm.data.decode import decode_vector, read_vector_shape
from ebm.data.indexing import find_shards
from ebm.data.items import Item, image_item
from ebm.data.labels import Label, LabelTable, numbered
from ebm.data.manifest import LeftOut, Origin, load_manifest, manifest_path
from ebm.data.scanning import scan_shard
from ebm.data.tars import (
    BLOCK,
    Grouping,
    crc32,
    image_suffixes,
    main_suffixes,
    parse_label,
    read_block,
    read_range,
)
from ebm.errors import DataError

LABEL_COLUMNS = ("label", "labels", "class", "fine_label")


@dataclass(frozen=True)
class ParquetSource:
    """Images in a column of parquet files, as Hugging Face's datasets write them: bytes, or a struct with `bytes`."""

    paths: tuple[str, ...]
    ends: tuple[int, ...]  # rows up to the end of each file
    image: str
    labels: tuple[int | None, ...]
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        return f"{i:08d}", self.labels[i]

    def item(self, i: int) -> Item:
        file = bisect_right(self.ends, i)
        row = i - (self.ends[file - 1] if file else 0)
        name = f"{self.paths[file]}, row {row}"
        try:
            value = _parquet_rows(self.paths[file], self.image, row)
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                raise ValueError(f"column {self.image} has no bytes")
            return image_item(f"{i:08d}", name, data, self.labels[i])
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: can't be read as an image ({error})") from error


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("parquet: needs pyarrow; install it: pip install 'ebm[parquet]'") from error
    return parquet


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int) -> list[Any]:
    rows: list[Any] = _pyarrow().ParquetFile(path).read_row_group(group, columns=[column]).column(column).to_pylist()
    return rows


@lru_cache(maxsize=64)
def _group_ends(path: str) -> tuple[int, ...]:
    metadata = _pyarrow().ParquetFile(path).metadata
    return tuple(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))


def _parquet_rows(path: str, column: str, row: int) -> Any:
    ends = _group_ends(path)
    group = bisect_right(ends, row)
    return _row_group(path, column, group)[row - (ends[group - 1] if group else 0)]


def open_parquet(pattern: str, split: str) -> ParquetSource:
    """Parquet files by a path, a pattern or a directory, of which those with the split in their names are taken if any
    file has a split in its name (`data/train-00000-of-00002.parquet`). Columns are found by type and name. Raises
    DataError."""
    parquet = _pyarrow()
    inside = f"{glob.escape(pattern)}/**/*.parquet" if os.path.isdir(pattern) else pattern
    every = sorted(glob.glob(inside, recursive=True))
    named = any(word in Path(path).name.lower() for path in every for word in ("train", "valid", "test"))
    paths = [path for path in every if split in Path(path).name.lower()] if named else every
    if not paths or (not named and split != "train"):
        raise DataError(f"parquet:{pattern}: no files of the split {split!r} ({len(every)} files match)")
    try:
        first = parquet.ParquetFile(paths[0])
        image, label = _columns(pattern, first.schema_arrow)
        names = _feature_names(first.schema_arrow, label)
        labels: list[Label | None] = []
        counts = []
        for path in paths:
            file = parquet.ParquetFile(path)
            counts.append(file.metadata.num_rows)
            labels += file.read(columns=[label]).column(label).to_pylist() if label else [None] * counts[-1]
        numbers, classes = numbered(labels, None)
        source = f"parquet:{os.path.abspath(pattern)}"
        origin = Origin(source=source, split=split, samples=sum(counts), fingerprint=fingerprint(paths))
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise DataError(f"parquet:{pattern}: {error}") from error
    return ParquetSource(
        tuple(paths), tuple(accumulate(counts)), image, tuple(numbers), names or classes, origin=origin
    )


def _columns(pattern: str, schema: Any) -> tuple[str, str | None]:
    """(image, label): the only column with bytes, or the one called image or img; the one called label or the like."""
    kinds = {field.name: str(field.type) for field in schema}
    images = [name for name, kind in kinds.items() if "binary" in kind]
    images = images if len(images) == 1 else [name for name in images if name in ("image", "img")]
    if len(images) != 1:
        raise DataError(f"parquet:{pattern}: no single column of image bytes, or one called image; it has {kinds}")
    labels = [name for name in LABEL_COLUMNS if kinds.get(name, "").startswith(("int", "uint", "string"))]
    return images[0], labels[0] if labels else None


def _feature_names(schema: Any, label: str | None) -> tuple[str, ...] | None:
    """Class names that Hugging Face's datasets keep in the schema's metadata."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None or label is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][label].get("names")
    except (ValueError, KeyError, TypeError, AttributeError):  # other versions' metadata: then labels are numbers
        return None
    return tuple(str(name) for name in names) if isinstance(names, list) else None


class _Shard(NamedTuple):
    """A tar to read from. `crc32`: None where it is in no manifest; `labels`: None where they are in .cls members."""

    path: str
    samples: int
    bytes: int
    offsets: tuple[int, ...]
    crc32: tuple[int, ...] | None
    labels: tuple[int | None, ...] | None


@dataclass(frozen=True)
class ShardSource:
    """The samples of shards. Where single samples can't be used, `item` raises DataError for these."""

    shards: tuple[_Shard, ...]
    grouping: Grouping
    ends: tuple[int, ...]  # samples up to the end of each shard
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        shard, place, sample = self._sample(i)
        try:
            return sample["__key__"], shard.labels[place] if shard.labels is not None else _class_of(sample)
        except ValueError as error:
            raise DataError(f"{shard.path}: key {sample['__key__']}: {error}") from error

    def item(self, i: int) -> Item:
        key, label = self.key_and_label(i)
        shard, _, sample = self._sample(i)
        name = f"{shard.path}: key {key}"
        try:
            return self._item(key, name, sample, label)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error

    def _sample(self, i: int) -> tuple[_Shard, int, dict[str, Any]]:
        """(shard, place inside it, members)"""
        number = bisect_right(self.ends, i)
        shard, place = self.shards[number], i - (self.ends[number - 1] if number else 0)
        return shard, place, _block(shard, place // BLOCK, self.grouping)[place % BLOCK]

    def _item(self, key: str, name: str, sample: dict[str, Any], label: int | None) -> Item:
        images = image_suffixes(sample)
        if len(images) > 1 and self.grouping.image is None:
            raise ValueError(f"has {len(images)} images: .{', .'.join(images)}; give --image SUFFIX or --dots last")
        image, vector = main_suffixes(tuple(sample), self.grouping.image)
        if image is not None:
            return image_item(key, name, sample[image], label)
        if vector is None:
            raise ValueError("has no image and no vector")
        return Item(key, name, decode_vector(sample[vector], *read_vector_shape(sample[vector])), label)


def _class_of(sample: dict[str, Any]) -> int | None:
    return parse_label(sample["cls"]) if "cls" in sample else None


@lru_cache(maxsize=2)
def _block(shard: _Shard, block: int, grouping: Grouping) -> list[dict[str, Any]]:
    begin, end = (*shard.offsets, shard.bytes)[block : block + 2]
    try:
        with open(shard.path, "rb") as file:
            data = read_range(file, begin, end)
        if shard.crc32 is not None and crc32(data) != shard.crc32[block]:
            raise ValueError(f"bytes {begin} to {end - 1} changed since the manifest was made")
        found = list(read_block(data, grouping.dots))
        if len(found) != min(BLOCK, shard.samples - block * BLOCK):
            raise ValueError("its samples are not those of the manifest")
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path}: {error}") from error
    return found


def open_shards(
    where: str, split: str, labels: LabelTable | None = None, label: str | None = None, grouping: Grouping | None = None
) -> ShardSource:
    """Shards with a manifest as it has them; others, and all where a label or a grouping is given, are scanned. Raises
    DataError."""
    if labels is None and label is None and grouping is None and manifest_path(where).exists():
        manifest = load_manifest(where)
        shards = [
            _Shard(
                str(manifest.local / s.name), s.samples, s.bytes, s.offsets, s.crc32,
                None if s.labels is None else tuple(None if n < 0 else n for n in s.labels),
            )
            for s in manifest.shards
        ]  # fmt: skip
        return _source(where, split, shards, manifest.grouping, manifest.classes, manifest.left_out)
    paths, grouping = find_shards(where), grouping or Grouping()
    scans = [scan_shard(path, grouping, "none" if labels else label or "cls") for path in paths]
    values: list[Label | None] = [
        labels.of(key) if labels else value for scan in scans for key, value in zip(scan.keys, scan.labels, strict=True)
    ]
    numbers, classes = numbered(values)
    shards, at, others = [], 0, dict[str, list[str]]()
    for path, scan in zip(paths, scans, strict=True):
        part = tuple(numbers[at : at + scan.samples])
        shards.append(_Shard(str(path), scan.samples, scan.bytes, tuple(scan.offsets), None, part))
        at += scan.samples
        for reason, names in scan.others.items():
            others.setdefault(reason, []).extend(names)
    left_out = [
        LeftOut(reason=f"members that are in no sample: {r}", count=len(n), first=n[0]) for r, n in others.items()
    ]
    return _source(where, split, shards, grouping, classes, left_out)


def _source(
    where: str,
    split: str,
    shards: Sequence[_Shard],
    grouping: Grouping,
    classes: tuple[str, ...] | None,
    left_out: Sequence[LeftOut],
) -> ShardSource:
    ends = tuple(accumulate(shard.samples for shard in shards))
    origin = Origin(
        source=f"shards:{Path(where).resolve()}",
        split=split,
        samples=ends[-1],
        fingerprint=fingerprint([shard.path for shard in shards]),
    )
    return ShardSource(tuple(shards), grouping, ends, classes, tuple(left_out), origin)
