"""What a source of samples is: an array, a label and a name each, in a fixed order; labels from a file beside the
images; and what is done to images before they are written."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageColor

from ebm.data.decode import OWN_FORMATS, decode_deep, encode, read_header, to_array, to_pillow, to_uint8
from ebm.data.manifest import LeftOut, Origin
from ebm.errors import ConfigError, DataError

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


TWELVE_BITS = 1 << 12


@dataclass(frozen=True)
class Conversion:
    """How images are changed, in this order.

    `levels`: values of 16-bit images that become 0 and 255 (default: 0 and 65,535). `background`: a colour put under
    transparent images. `mode`: L or RGB. `size`: shorter side resized to it, then the centre square. `format`: None
    keeps PNG and JPEG files as they are where nothing else changes them, and writes PNG otherwise.
    """

    size: int | None = None
    mode: Literal["L", "RGB"] | None = None
    format: Literal["png", "jpg"] | None = None
    levels: tuple[int, int] | None = None
    background: str | None = None

    def options(self) -> dict[str, str | int | float]:
        """The settings that are not the default, for the manifest."""
        changed = {name: value for name, value in asdict(self).items() if value is not None}
        return {n: f"{v[0]},{v[1]}" if isinstance(v, tuple) else v for n, v in changed.items()}

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, C) of a uint8 or uint16 image. Raises ValueError where transparency has no background."""
        image = self._eight_bits(image)
        if self.background is not None and image.shape[2] in (2, 4):
            image = _over(image, self.background)
        if self.size is None and self.mode is None:
            return image
        if self.mode is not None and image.shape[2] in (2, 4) and image[..., -1].min() < 255:
            raise ValueError("is transparent in part; give --background COLOUR (white, black, #808080)")
        picture = to_pillow(image)
        if self.mode is not None:
            picture = picture.convert(self.mode)
        if self.size is not None and picture.size != (self.size, self.size):
            picture = _centre_square(picture, self.size)
        return to_array(picture)

    def _eight_bits(self, image: np.ndarray) -> np.ndarray:
        if image.dtype != np.uint16:
            return image
        if self.levels is None:
            return to_uint8(image)
        low, high = self.levels
        return np.rint((image.astype(np.float64) - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8)

    def check(self, item: Item) -> None:
        """Raises ConfigError where the settings do not fit the first sample: settings of images for a vector, or an
        image of 16 bits that seems to use only 12, and would come out nearly black."""
        if item.array.ndim == 1 and self != Conversion():
            raise ConfigError(
                f"{item.name} is a vector of {len(item.array)} values; --size, --grayscale, --rgb and --format are for "
                "images, as --range and --background are"
            )
        if item.array.dtype == np.uint8 and self.levels is not None:
            raise ConfigError(f"{item.name} has 8 bits a value; --range is for images of 16")
        if item.array.dtype == np.uint16 and self.levels is None and item.array.max() < TWELVE_BITS:
            raise ConfigError(
                f"{item.name} has 16 bits a value, and none above {item.array.max()}: taken as it is, it is nearly "
                "black. Give --range 0,4095 for 12-bit data (LOW,HIGH become 0 and 255), or --range 0,65535 to go on"
            )

    def encoded(self, item: Item, image: np.ndarray) -> tuple[bytes, str]:
        kept = item.encoded
        if kept is not None and image is item.array and self.format in (None, kept[1]):
            return kept
        suffix = self.format or "png"
        return encode(image, suffix), suffix


def parse_levels(text: str) -> tuple[int, int]:
    """(low, high) of `LOW,HIGH`. Raises ConfigError."""
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--range {text}: must be LOW,HIGH, such as 0,4095") from error
    if not 0 <= low < high <= 65535:
        raise ConfigError(f"--range {text}: must be rising, and within 0,65535")
    return low, high


def check_background(colour: str) -> None:
    """Raises ConfigError."""
    try:
        ImageColor.getcolor(colour, "RGB")
    except ValueError as error:
        raise ConfigError(f"--background {colour}: must be a colour, such as white, black or #808080") from error


def _over(image: np.ndarray, background: str) -> np.ndarray:
    """A grey or colour image with transparency, over a colour; grey stays grey only over grey."""
    red, green, blue = ImageColor.getrgb(background)[:3]
    colour = (red,) if image.shape[2] == 2 and red == green == blue else (red, green, blue)
    alpha = image[..., -1:].astype(np.float64) / 255
    return np.rint(image[..., :-1] * alpha + np.array(colour) * (1 - alpha)).astype(np.uint8)


def _centre_square(picture: Image.Image, size: int) -> Image.Image:
    """Bicubic with antialiasing, of the largest centred square."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


Label = int | str
HEADINGS = ("key", "keys", "id", "name", "file", "filename", "file_name", "image", "path")  # a CSV file's first cell
NUMBER = re.compile(r"[0-9]{1,9}")
MAX_CLASSES = 10**9  # as in manifests


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
            return checked(map_npy(path), path)
    except (OSError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        raise DataError(f"labels {path}: {error}") from error
    raise DataError(f"labels {path}: must be a .csv file (key, label), a .json object {{key: label}}, or a .npy array")


def map_npy(path: str) -> np.ndarray:
    """The array of a .npy file, mapped and read-only. Raises OSError, and ValueError where it is anything else."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header, and raises almost anything
        raise ValueError(f"not a readable .npy file without pickles ({type(error).__name__}: {error})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("is a .npz archive; name it so")
    return array


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
        if isinstance(value, str):
            _add(values, key, _typed(value), key)
        elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_CLASSES:
            raise ValueError(f"{key}: {_shown(value)} must be a class's name, or a number from 0 to {MAX_CLASSES - 1}")
        else:
            _add(values, key, value, key)
    return values


def _shown(value: object) -> str:
    try:
        return repr(value)[:40]
    except ValueError:  # Python shows no number of thousands of digits
        return "a number of thousands of digits"


def _add(values: dict[str, Label], key: str, value: Label, where: str) -> None:
    if values.setdefault(key, value) != value:
        raise ValueError(f"{where}: {key} has the label {values[key]} already")


def _typed(text: str) -> Label:
    return int(text) if NUMBER.fullmatch(text) else text


def checked(labels: np.ndarray, name: str) -> np.ndarray:
    """int64 (N,) of class numbers. Raises DataError."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"labels {name}: {labels.dtype} {labels.shape}; must be class numbers, integers (N,) from 0 on")
    if len(labels) and not (labels.min() >= 0 and labels.max() < MAX_CLASSES):
        raise DataError(
            f"labels {name}: from {labels.min()} to {labels.max()}; must be class numbers from 0 to {MAX_CLASSES - 1}"
        )
    return labels.astype(np.int64)


def natural(names: Iterable[str]) -> list[str]:
    """Sorted by text, with the numbers in it by value: 0, 1, 2, 10."""
    return sorted(names, key=lambda name: ([_part(part) for part in re.split(r"([0-9]+)", name)], name))


def _part(part: str) -> tuple[bool, int, str]:
    digits = part.lstrip("0") if part.isascii() and part.isdigit() else None
    return (True, 0, part) if digits is None else (False, len(digits), digits)  # int() takes no thousands of digits


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
