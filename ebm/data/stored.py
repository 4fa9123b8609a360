"""Sources in files: .npy, which is mapped, the named arrays of .npz, and parquet tables."""

import glob
import json
import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ebm.data.decode import show
from ebm.data.folders import split_of
from ebm.data.items import ArraySource, Item, Label, checked, image_item, map_npy, numbered
from ebm.data.manifest import LeftOut, Origin, fingerprint
from ebm.errors import DataError


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


_open_npy = lru_cache(maxsize=1)(map_npy)


def open_npy(path: str, split: str, labels: np.ndarray | None = None) -> NpySource | ArraySource:
    """A .npy file, or the arrays of a .npz file: `FILE.npz`, or `FILE.npz#IMAGES,LABELS` by name. Raises DataError."""
    file, _, names = path.partition("#") if ".npz" in path else (path, "", "")
    if file.endswith(".npz"):
        return _open_npz(file, names, split, labels)
    _open_npy.cache_clear()  # the file may have changed
    try:
        array = _open_npy(path)
        origin = Origin(
            source=f"npy:{Path(path).resolve()}", split=split, samples=len(array), fingerprint=fingerprint([path])
        )
    except (OSError, ValueError, TypeError) as error:  # TypeError: an array without an axis has no length
        raise DataError(f"npy:{path}: {error}") from error
    _check_array(f"npy:{path}", array)
    return NpySource(path, len(array), _fitting(labels, array, path), origin=origin)


def _open_npz(path: str, names: str, split: str, labels: np.ndarray | None) -> ArraySource:
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("not a .npz archive")
            there = _arrays_in(file)
            wanted = names.split(",") if names else _by_content(path, file, there, split)
            if not 1 <= len(wanted) <= 2 or not set(wanted) <= set(there):
                raise DataError(f"npy:{path}: {names} must be IMAGES or IMAGES,LABELS of {', '.join(there)}")
            arrays = [file[name] for name in wanted]
            if not all(isinstance(array, np.ndarray) for array in arrays):  # without numpy's first bytes
                raise ValueError(f"{', '.join(wanted)}: no arrays")
        origin = Origin(
            source=f"npy:{Path(path).resolve()}#{','.join(wanted)}",
            split=split,
            samples=len(arrays[0]),
            fingerprint=fingerprint([path]),
        )
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise almost anything on a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"npy:{path}: not a readable .npz file without pickles ({reason})") from error
    _check_array(f"npy:{path}#{wanted[0]}", arrays[0])
    if labels is None and len(arrays) == 2:
        labels = checked(arrays[1], f"{path}#{wanted[1]}")
    images = arrays[0][..., None] if arrays[0].ndim == 3 else arrays[0]
    return ArraySource(path, images, _fitting(labels, images, path), origin=origin)


def _arrays_in(file: Any) -> list[str]:
    members = set(file.zip.namelist())
    return [name for name in file.files if f"{name}.npy" in members]


def _by_content(path: str, file: Any, names: list[str], split: str) -> list[str]:
    """The names of the images, and of the labels if any, where type, shape and split leave one of each."""
    found = {name: _described(file, name) for name in names}
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
                path = f", only the path {value.get('path')}" if isinstance(value, dict) else ""
                raise ValueError(f"column {self.image} has no bytes there{path}")
            return image_item(f"{i:08d}", name, data, self.labels[i])
        except parquet_errors() as error:
            raise DataError(f"{name}: can't be read as an image ({error})") from error


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError("parquet: needs pyarrow; install it: pip install 'ebm[parquet]'") from error
    return parquet


def parquet_errors() -> tuple[type[Exception], ...]:
    """What reading a parquet file raises: Arrow's own exceptions, and plain ones of Python and of the file system. Call
    it where pyarrow has been loaded."""
    from pyarrow import ArrowException

    return (ArrowException, OSError, ValueError, LookupError, TypeError, NotImplementedError)


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int) -> list[Any]:
    rows: list[Any] = _pyarrow().ParquetFile(path).read_row_group(group, columns=[column]).column(column).to_pylist()
    return rows


@lru_cache(maxsize=64)
def _group_ends(path: str) -> tuple[int, ...]:
    return tuple(accumulate(_rows_of_groups(_pyarrow().ParquetFile(path).metadata)))


def _rows_of_groups(metadata: Any) -> list[int]:
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _parquet_rows(path: str, column: str, row: int) -> Any:
    ends = _group_ends(path)
    group = bisect_right(ends, row)
    return _row_group(path, column, group)[row - (ends[group - 1] if group else 0)]


def open_parquet(pattern: str, split: str, image: str | None = None, label: str | None = None) -> ParquetSource:
    """Parquet files by a path, a pattern or a directory. If any is named after a split, or in a folder that is, those
    of `split` are taken (`train-00000-of-00002.parquet`, `default/train/0000.parquet`). Columns are found by type and
    name, unless `image` and `label` name them (`none`: no labels). Raises DataError."""
    parquet = _pyarrow()
    _row_group.cache_clear()  # the files may have changed
    _group_ends.cache_clear()
    paths, left_out = _files_of_split(pattern, split)
    labels: list[Label | None] = []
    counts, names = [], None
    columns: tuple[str, str | None] | None = None
    path = paths[0]
    try:
        for path in paths:
            file = parquet.ParquetFile(path)
            found = _columns(path, file.schema_arrow, image, label)
            if found != (columns := columns or found):
                raise ValueError(f"its columns are {found}, those of {paths[0]} are {columns} (image, label)")
            names = names or _feature_names(file.schema_arrow, found[1])
            counts.append(file.metadata.num_rows)
            groups = _rows_of_groups(file.metadata)
            if min(groups, default=0) < 0 or sum(groups) != counts[-1]:
                raise ValueError(f"it has {counts[-1]} rows, and its groups have {groups}: it is damaged")
            values = file.read(columns=[found[1]]).column(found[1]).to_pylist() if found[1] else [None] * counts[-1]
            labels += [_class_number(value) for value in values]
        numbers, classes = numbered(labels, None)
        source = f"parquet:{os.path.abspath(pattern)}"
        origin = Origin(source=source, split=split, samples=sum(counts), fingerprint=fingerprint(paths))
    except parquet_errors() as error:
        raise DataError(f"parquet:{path}: {error}") from error
    if not sum(counts) or columns is None:
        raise DataError(f"parquet:{pattern}: has no rows")
    return ParquetSource(
        tuple(paths), tuple(accumulate(counts)), columns[0], tuple(numbers), names or classes, left_out, origin
    )


def _files_of_split(pattern: str, split: str) -> tuple[list[str], tuple[LeftOut, ...]]:
    """(the files of a split, those that are of none). A file is of the last split that its path names, below the
    directory or the fixed part of the pattern. Raises DataError."""
    is_dir = os.path.isdir(pattern)
    every = sorted(glob.glob(f"{glob.escape(pattern)}/**/*.parquet" if is_dir else pattern, recursive=True))
    base = pattern if is_dir else re.split(r"[*?[]", pattern)[0].rpartition("/")[0]
    wanted, of = split_of(split) or split, dict[str, str | None]()
    for path in every:
        words = re.findall(r"[a-z]+", os.path.relpath(path, base or ".").lower())
        splits = [split_of(word) or word for word in words if split_of(word) or word == split]
        of[path] = splits[-1] if splits else None
    if not any(of.values()):
        paths, others = every if wanted == "train" else [], list[str]()
    else:
        paths = [path for path in every if of[path] == wanted]
        others = [path for path in every if of[path] is None]
    if not paths:
        there = ", ".join(sorted({found for found in of.values() if found})) or "none by name: all are the split train"
        raise DataError(f"parquet:{pattern}: no files of the split {split!r} ({len(every)} match; splits: {there})")
    reason = "parquet files that are not named after a split"
    return paths, (LeftOut(reason=reason, count=len(others), first=others[0]),) if others else ()


def _class_number(value: Any) -> Label | None:
    """A label as it is; None for -1, which stands for no label in Hugging Face's test splits."""
    if isinstance(value, bool):
        return int(value)
    return None if isinstance(value, int) and value < 0 else value


def _columns(path: str, schema: Any, image: str | None, label: str | None) -> tuple[str, str | None]:
    """(image, label): the columns of these names, or else the only one with bytes, or the one called image or img, and
    the one called label or the like. Raises DataError, KeyError."""
    kinds = {field.name: str(field.type) for field in schema}
    said = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    images = [name for name, kind in kinds.items() if "binary" in kind and image in (None, name)]
    images = images if len(images) == 1 else [name for name in images if name in ("image", "img")]
    if len(images) != 1:
        wanted = (
            f"no column {image} of image bytes" if image else "no single column of image bytes, or one called image"
        )
        raise DataError(f"parquet:{path}: {wanted}; it has {said}; name it: --image COLUMN")
    if label == "none":
        return images[0], None
    labels = [name for name in (LABEL_COLUMNS if label is None else (label,)) if name in kinds]
    if not labels and label is not None:
        raise DataError(f"parquet:{path}: --label {label}: no such column; it has {said}")
    if labels and not re.match(r"u?int|string|large_string|bool|dictionary<values=(u?int|string)", kinds[labels[0]]):
        raise DataError(
            f"parquet:{path}: column {labels[0]} is {kinds[labels[0]]}; classes are integers or text; give --label "
            "COLUMN, or --label none to take all as unlabelled"
        )
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
