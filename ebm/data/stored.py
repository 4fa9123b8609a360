"""Sources in files: .npy, which is mapped, the named arrays of .npz, parquet tables, and shards that are to be written
anew."""

import glob
import hashlib
import json
import os
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ebm.data.decode import decode_vector, read_vector_shape, show
from ebm.data.indexing import find_shards
from ebm.data.items import ArraySource, Item, Label, LabelTable, checked, image_item, numbered
from ebm.data.manifest import LeftOut, Origin, load_manifest, manifest_path
from ebm.data.tars import (
    BLOCK,
    Grouping,
    crc32,
    image_suffixes,
    main_suffixes,
    parse_label,
    read_block,
    read_range,
    scan_shard,
)
from ebm.errors import DataError

ENDS = 1 << 20  # bytes at either end of a file that its fingerprint covers


def fingerprint(paths: Sequence[str | Path]) -> str:
    """A hash of files' names, sizes, and first and last MiB: seconds also for large ones. Raises OSError."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{Path(path).name}\0{size}\n".encode(errors="surrogateescape"))
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


@dataclass(frozen=True)
class NpySource:
    """Images, uint8 or uint16 (N, H, W) or (N, H, W, C), or vectors, float32 (N, D), in a .npy file. It is mapped, not
    loaded."""

    path: str
    length: int
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return self.length

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        return f"{i:06d}", None if self.labels is None else int(self.labels[i])

    def item(self, i: int) -> Item:
        array = np.array(_open_npy(self.path)[i])
        key, label = self.key_and_label(i)
        return Item(key, f"{self.path}, sample {i}", array[:, :, None] if array.ndim == 2 else array, label)


@lru_cache(maxsize=1)
def _open_npy(path: str) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def open_npy(path: str, split: str, labels: np.ndarray | None = None) -> NpySource | ArraySource:
    """A .npy file, or the arrays of a .npz file: `FILE.npz`, or `FILE.npz#IMAGES,LABELS` by name. Raises DataError."""
    file, _, names = path.partition("#") if ".npz" in path else (path, "", "")
    if file.endswith(".npz"):
        return _open_npz(file, names, split, labels)
    try:
        array = _open_npy(path)
        origin = Origin(
            source=f"npy:{Path(path).resolve()}", split=split, samples=len(array), fingerprint=fingerprint([path])
        )
    except (OSError, ValueError, EOFError, OverflowError, TypeError) as error:
        raise DataError(f"npy:{path}: not a readable .npy file without pickles ({error})") from error
    _check_array(f"npy:{path}", array)
    return NpySource(path, len(array), _fitting(labels, array, path), origin=origin)


def _open_npz(path: str, names: str, split: str, labels: np.ndarray | None) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("not a .npz archive")
            wanted = names.split(",") if names else _by_content(path, file, split)
            missing = [name for name in wanted if name not in file.files]
            if missing or not 1 <= len(wanted) <= 2:
                raise DataError(f"npy:{path}: {names} must be IMAGES or IMAGES,LABELS of {', '.join(file.files)}")
            arrays = [file[name] for name in wanted]
        origin = Origin(
            source=f"npy:{Path(path).resolve()}#{','.join(wanted)}",
            split=split,
            samples=len(arrays[0]),
            fingerprint=fingerprint([path]),
        )
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"npy:{path}: not a readable .npz file without pickles ({error})") from error
    _check_array(f"npy:{path}#{wanted[0]}", arrays[0])
    if labels is None and len(arrays) == 2:
        labels = checked(arrays[1], f"{path}#{wanted[1]}")
    images = arrays[0][..., None] if arrays[0].ndim == 3 else arrays[0]
    return ArraySource(path, images, _fitting(labels, images, path), origin=origin)


def _by_content(path: str, file: Any, split: str) -> list[str]:
    """The names of the images, and of the labels if any, where type, shape and split leave one of each."""
    found = {name: _described(file, name) for name in file.files}
    inside = [name for name in found if split in name.lower()] or (list(found) if split == "train" else [])
    others = ("train", "val", "test")
    if not any(split in name.lower() for name in found):
        inside = [name for name in inside if not any(other in name.lower() for other in others if other != split)]
    images = [name for name in inside if found[name][0] in ("u1", "u2", "f4") and len(found[name][1]) in (2, 3, 4)]
    images = [name for name in images if found[name][0] != "f4" or len(found[name][1]) == 2]
    labels = [name for name in inside if found[name][0][0] in "iu" and len(found[name][1]) == 1]
    if len(images) != 1 or len(labels) > 1:
        said = ", ".join(f"{name} {dtype} {show(shape)}" for name, (dtype, shape) in found.items())
        raise DataError(
            f"npy:{path}: it is not plain which arrays are the split {split!r}: {said}; name them: "
            f"npy:{path}#IMAGES,LABELS"
        )
    return [*images, *labels]


def _described(file: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """(type, shape) of an array in a .npz, from its header."""
    with file.zip.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return dtype.str[1:], shape


def _check_array(name: str, array: np.ndarray) -> None:
    images = array.dtype in (np.uint8, np.uint16) and array.ndim in (3, 4)
    vectors = array.dtype == np.float32 and array.ndim == 2
    if not (images or vectors) or 0 in array.shape:
        raise DataError(
            f"{name}: is {array.dtype} {array.shape}; must be images, uint8 or uint16 (N, H, W) or (N, H, W, C), or "
            "vectors, float32 (N, D)"
        )
    if array.ndim == 4 and array.shape[3] not in (1, 2, 3, 4):
        raise DataError(f"{name}: is {array.shape}; channels come last, (N, H, W, C), and are 1 to 4")


def _fitting(labels: np.ndarray | None, array: np.ndarray, path: str) -> np.ndarray | None:
    if labels is not None and len(labels) != len(array):
        raise DataError(f"npy:{path}: {len(array)} samples, and {len(labels)} labels")
    return labels


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
