"""Class labels from a file beside the images, and their numbers and names."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ebm.errors import DataError

Label = int | str
HEADINGS = ("key", "keys", "id", "name", "file", "filename", "file_name", "image", "path")  # a CSV file's first cell
NUMBER = re.compile(r"[0-9]{1,9}")


class LabelTable(NamedTuple):
    """Labels by key, as a file has them. `path` is for messages."""

    path: str
    values: Mapping[str, Label]

    def of(self, key: str) -> Label | None:
        """The label of a sample or file: by its whole name, its name without suffix, or its last part alone."""
        path = PurePosixPath(key)
        for name in (key, path.with_suffix("").as_posix(), path.name, path.stem):
            if name in self.values:
                return self.values[name]
        return None


def read_labels(path: str) -> LabelTable | np.ndarray:
    """Labels by key from a .csv file (key, label) or a .json object, or int64 (N,) in order from a .npy file. Raises
    DataError."""
    suffix = Path(path).suffix.lower()
    try:
        if suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                return LabelTable(path, _table(csv.reader(file)))
        if suffix == ".json":
            with open(path, encoding="utf-8") as file:
                return LabelTable(path, _object(json.load(file)))
        if suffix == ".npy":
            return checked(np.load(path, mmap_mode="r", allow_pickle=False), path)
    except (OSError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise DataError(f"labels {path}: {error}") from error
    raise DataError(f"labels {path}: must be a .csv file (key, label), a .json object {{key: label}}, or a .npy array")


def _table(rows: Iterable[list[str]]) -> dict[str, Label]:
    values: dict[str, Label] = {}
    for number, row in enumerate(rows, 1):
        if not row or (number == 1 and row[0].strip().lower() in HEADINGS):
            continue
        if len(row) < 2:
            raise ValueError(f"line {number} has one column; each line is: key, label")
        _add(values, row[0].strip(), _typed(row[1].strip()), f"line {number}")
    return values


def _object(found: object) -> dict[str, Label]:
    if not isinstance(found, dict):
        raise ValueError(f"must be an object {{key: label}}, found {type(found).__name__}")
    values: dict[str, Label] = {}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"{key}: {str(value)[:40]!r} must be a class's name or number")
        _add(values, key, _typed(value) if isinstance(value, str) else value, key)
    return values


def _add(values: dict[str, Label], key: str, value: Label, where: str) -> None:
    if values.setdefault(key, value) != value:
        raise ValueError(f"{where}: {key} has the label {values[key]} already")


def _typed(text: str) -> Label:
    return int(text) if NUMBER.fullmatch(text) else text


def checked(labels: np.ndarray, name: str) -> np.ndarray:
    """int64 (N,) of class numbers. Raises DataError."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or (len(labels) and labels.min() < 0):
        raise DataError(f"labels {name}: {labels.dtype} {labels.shape}; must be class numbers, integers (N,) from 0 on")
    return labels.astype(np.int64)


def natural(names: Iterable[str]) -> list[str]:
    """Sorted by text, with the numbers in it by value: 0, 1, 2, 10."""
    return sorted(names, key=lambda name: ([_part(part) for part in re.split(r"([0-9]+)", name)], name))


def _part(part: str) -> tuple[bool, int, str]:
    return (False, int(part), "") if part.isascii() and part.isdigit() else (True, 0, part)


def numbered(
    labels: Sequence[Label | None], classes: Sequence[str] | None = None
) -> tuple[list[int | None], tuple[str, ...] | None]:
    """(class numbers, names in order). Labels that are all numbers keep them and have no names, unless `classes` are
    given, whose places are the numbers. Raises ValueError for a name that `classes` has not."""
    typed = [_typed(label) if isinstance(label, str) else label for label in labels]
    if classes is None and all(label is None or isinstance(label, int) for label in typed):
        return [label for label in typed if label is None or isinstance(label, int)], None
    texts = [None if label is None else str(label) for label in labels]
    names = tuple(classes) if classes is not None else tuple(natural({text for text in texts if text is not None}))
    places = {name: place for place, name in enumerate(names)}
    unknown = next((text for text in texts if text is not None and text not in places), None)
    if unknown is not None:
        raise ValueError(f"class {unknown!r} is not among {', '.join(names[:20])}")
    return [None if text is None else places[text] for text in texts], names
