"""What a source of samples is: an array, a label and a name each, in a fixed order."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np

from ebm.data.decode import OWN_FORMATS, decode_deep, read_header
from ebm.data.manifest import LeftOut, Origin
from ebm.errors import DataError

MAX_PIXELS = 1 << 29  # of one image of a source; its decoder takes several bytes each


class Item(NamedTuple):
    """One sample. `array`: an image, uint8 or uint16 (H, W, C), or a vector, float32 (D,). `encoded`: the file of an
    image as it is and its suffix, where the reader decodes it to the same array."""

    key: str
    name: str  # for error messages
    array: np.ndarray
    label: int | None
    encoded: tuple[bytes, str] | None = None


class Source(Protocol):
    """Samples in a fixed order. A source is sent to worker processes, so it must be picklable.

    `classes`: the labels' names, in order. `left_out`: what was passed over when it was opened. `item` raises DataError
    where one sample can't be read.
    """

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def left_out(self) -> tuple[LeftOut, ...]: ...

    @property
    def origin(self) -> Origin | None: ...

    def __len__(self) -> int: ...

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        """Those of `item`, without its image."""

    def item(self, i: int) -> Item: ...


@dataclass(frozen=True)
class ArraySource:
    """`arrays`: images, uint8 or uint16 (N, H, W, C), or vectors, float32 (N, D); `labels`: (N,) or None."""

    name: str
    arrays: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.arrays)

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        return f"{i:06d}", None if self.labels is None else int(self.labels[i])

    def item(self, i: int) -> Item:
        key, label = self.key_and_label(i)
        return Item(key, f"{self.name}, sample {i}", self.arrays[i], label)


@dataclass(frozen=True)
class Selection:
    """The samples of `source` at `places`; `classes` and `numbers` where the labels are others: new number by old."""

    source: Source
    places: tuple[int, ...]
    classes: tuple[str, ...] | None
    numbers: dict[int, int] | None = None
    origin: Origin | None = None

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        return self.source.left_out

    def __len__(self) -> int:
        return len(self.places)

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        key, label = self.source.key_and_label(self.places[i])
        return key, label if self.numbers is None or label is None else self.numbers[label]

    def item(self, i: int) -> Item:
        return self.source.item(self.places[i])._replace(label=self.key_and_label(i)[1])


def select(
    source: Source,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    holdout: tuple[float, str] | None = None,
) -> Source:
    """Some of a source's samples. Raises DataError where none is left.

    Args:
        classes: names or numbers of the classes to keep, which are numbered anew in this order.
        limit: how many to keep, evenly spaced.
        holdout: (share, split): about that share for the split test, by a hash of the keys, and the rest for train.
    """
    if classes is None and limit is None and holdout is None:
        return source
    places, numbers, options = list(range(len(source))), None, dict[str, str | int | float]()
    split = source.origin.split if source.origin else "train"
    if classes is not None:
        numbers, options["classes"] = _numbers(source, classes), ",".join(classes)
        places = [i for i in places if source.key_and_label(i)[1] in numbers]
    if holdout is not None:
        share, split = holdout
        if split not in ("train", "test"):
            raise DataError(f"--holdout {share}: makes the splits train and test, not {split!r}")
        options["holdout"] = share
        places = [i for i in places if _in_test(source.key_and_label(i)[0], share) == (split == "test")]
    if limit is not None and limit < len(places):
        options["limit"] = limit
        places = [places[i * len(places) // limit] for i in range(limit)]
    if not places:
        raise DataError("no sample is left: none is of the classes and the split that were asked for")
    origin = source.origin and source.origin.model_copy(
        update={"options": source.origin.options | options, "split": split}
    )
    return Selection(source, tuple(places), tuple(classes) if classes is not None else source.classes, numbers, origin)


def _numbers(source: Source, classes: Sequence[str]) -> dict[int, int]:
    """New number by old."""
    known = {name: number for number, name in enumerate(source.classes or ())}
    unknown = [name for name in classes if name not in known and not (source.classes is None and name.isdigit())]
    if unknown:
        raise DataError(
            f"--classes {','.join(classes)}: there is no {unknown[0]!r} among {', '.join(known) or 'numbers'}"
        )
    return {known.get(name, int(name) if name.isdigit() else -1): number for number, name in enumerate(classes)}


def _in_test(key: str, share: float) -> bool:
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) < share * 2.0**64


def image_item(key: str, name: str, data: bytes, label: int | None) -> Item:
    """The item of an encoded image. Raises ValueError where it can't be decoded."""
    header = read_header(data, OWN_FORMATS)
    if header.height * header.width > MAX_PIXELS:
        raise ValueError(f"image has {header.width}x{header.height} pixels, more than {MAX_PIXELS}")
    array = decode_deep(data, header, OWN_FORMATS).transpose(1, 2, 0)
    as_it_is = header.plain is not None and not header.deep and header.orientation == 1
    suffix = {"png": "png", "jpeg": "jpg", None: ""}[header.plain]
    return Item(key, name, array, label, (data, suffix) if as_it_is else None)


def unique_keys(paths: Iterable[str]) -> list[str]:
    """A key for each path: without dots, at which webdataset's keys end, nor the __ with which its own begin."""
    keys: dict[str, None] = {}
    for path in paths:
        key = PurePosixPath(path).with_suffix("").as_posix().replace(".", "_")
        key = f"x{key}" if key.startswith("__") else key
        while key in keys:
            key += "_"
        keys[key] = None
    return list(keys)
