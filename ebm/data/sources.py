"""Sources by their names: digits, toy densities, torchvision's sets, folders, arrays, parquet files and shards."""

import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ebm.data.arrays import open_npy
from ebm.data.datasets import NAMES, open_dataset
from ebm.data.folders import open_folder
from ebm.data.items import ArraySource, Source
from ebm.data.labels import LabelTable, read_labels
from ebm.data.manifest import Origin
from ebm.data.stored import open_parquet, open_shards
from ebm.data.tars import Grouping
from ebm.data.toys import TOYS, sample_toy
from ebm.errors import DataError

PATHS = ("folder", "npy", "parquet", "shards")
KINDS = f"digits, {', '.join(NAMES)}, {', '.join(TOYS)}, folder:PATH, npy:FILE, parquet:PATTERN, shards:DIR"


class Options(NamedTuple):
    """What a source may be told beside its name and split. `root`: of torchvision's files; `labels`: a file; `label`
    and `grouping`: of shards' members."""

    root: str | None = None
    labels: str | None = None
    label: str | None = None
    grouping: Grouping | None = None


PLAIN = Options()


def open_source(spec: str, split: str = "train", options: Options = PLAIN) -> Source:
    """A source by its name. `split`: `train` or `test`, or another that the data set has. Raises DataError."""
    kind, _, path = spec.partition(":")
    _check(spec, kind, options)
    labels = read_labels(options.labels) if options.labels else None
    if kind in PATHS and path:
        return _open_path(kind, expanded(path), split, labels, options)
    if spec == "digits":
        return open_digits(split)
    if spec in TOYS:
        return open_toy(spec, split)
    if spec in NAMES:
        return open_dataset(spec, split, options.root)
    raise DataError(f"source {spec!r} is not known; use one of {KINDS}")


def _check(spec: str, kind: str, options: Options) -> None:
    """Raises DataError for an option that the source would ignore."""
    if options.root is not None and spec not in NAMES:
        raise DataError(f"--root is for {', '.join(NAMES)}; {spec} has none")
    if options.labels is not None and kind not in ("folder", "npy", "shards"):
        raise DataError(f"--labels is for folder:, npy: and shards:; {spec} has its own")
    if (options.label is not None or options.grouping is not None) and kind != "shards":
        raise DataError(f"--label, --image and --dots are for shards:; {spec} has no members")


def _open_path(kind: str, path: str, split: str, labels: LabelTable | np.ndarray | None, options: Options) -> Source:
    if kind == "npy":
        if isinstance(labels, LabelTable):
            raise DataError(f"labels {labels.path}: of an array they are a .npy file, in the order of the samples")
        return open_npy(path, split, labels)
    if isinstance(labels, np.ndarray):
        raise DataError(f"labels {options.labels}: for {kind}: they are a .csv or .json file with a key for each")
    if kind == "folder":
        return open_folder(Path(path), split, labels)
    if kind == "parquet":
        return open_parquet(path, split)
    return open_shards(path, split, labels, options.label, options.grouping)


def expanded(path: str) -> str:
    """`~` made the home directory. Raises DataError where there is none."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise DataError(f"{path}: there is no home directory (HOME is not set); write the path in full") from error


def identify(spec: str, split: str) -> Origin | None:
    """The origin that `open_source` would give now: None where the source's files are not at hand. Raises DataError
    where they can't be used."""
    kind, _, path = spec.partition(":")
    if kind not in PATHS or not path:
        return Origin(source=spec, split=split)
    path = expanded(path)
    there = glob.glob(path) if kind == "parquet" else Path(path.partition("#")[0]).exists()
    return open_source(spec, split).origin if there else None


def open_digits(split: str) -> ArraySource:
    """scikit-learn's 1,797 digits, 8x8, in a fixed random split: 1,437 train, 360 test.

    Not stratified: equal class shares in both parts would set a floor of the Fréchet distance that independent samples
    of the same distribution do not reach."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: digits has train and test")
    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[..., None]
    train, test, y_train, y_test = train_test_split(images, digits.target, test_size=0.2, random_state=0)
    x, y = (train, y_train) if split == "train" else (test, y_test)
    return ArraySource("digits", x, y, origin=Origin(source="digits", split=split, samples=len(x)))


def open_toy(name: str, split: str) -> ArraySource:
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: {name} has train and test")
    x, labels = sample_toy(name, split)
    origin = Origin(source=name, split=split, samples=len(x))
    return ArraySource(name, x.numpy(), None if labels is None else labels.numpy(), origin=origin)
