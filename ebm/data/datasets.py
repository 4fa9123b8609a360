"""Data sets that torchvision knows, from files on disk or by download, and the IDX files of the MNIST family."""

import gzip
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebm.data.folders import FileSource
from ebm.data.items import ArraySource, Item, Source
from ebm.data.manifest import LeftOut, Origin
from ebm.errors import DataError

# Names of their IDX files, up to images-idx3-ubyte, by split.
IDX = {
    "mnist": {"train": "train", "test": "t10k"},
    "fashion_mnist": {"train": "train", "test": "t10k"},
    "kmnist": {"train": "train", "test": "t10k"},
    "emnist": {"train": "emnist-balanced-train", "test": "emnist-balanced-test"},
}
FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST", "emnist": "EMNIST"}
SPLITS = {
    "celeba": ("train", "valid", "test"),
    "svhn": ("train", "test", "extra"),
    "stl10": ("train", "test", "unlabeled"),
}
NAMES = ("mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "svhn", "stl10", "omniglot", "celeba")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def default_root() -> Path:
    """Where downloads go: $EBM_DATASETS, or ~/.cache/ebm. Raises DataError where there is no home directory."""
    try:
        return Path(os.environ.get("EBM_DATASETS") or "~/.cache/ebm").expanduser()
    except RuntimeError as error:
        raise DataError(
            "there is no home directory for downloads (HOME is not set); give --root DIR or set EBM_DATASETS"
        ) from error


def open_dataset(name: str, split: str, root: str | None = None) -> Source:
    """A data set of NAMES. Its files are looked for below `root` (default: `default_root()`), and downloaded there if
    they are missing. Raises DataError."""
    splits = SPLITS.get(name, ("train", "test"))
    if split not in splits:
        raise DataError(f"split {split!r}: {name} has {', '.join(splits)}")
    place = default_root() if root is None else Path(root).expanduser()
    found = _find_idx(place, name, split) if name in IDX else None
    if found is not None:
        return _from_idx(name, split, *found)
    try:
        return OPEN[name](place, split)
    except Exception as error:  # network, archive and checksum errors are of many types
        raise DataError(
            f"{name}: not found in {place}, and the download failed ({type(error).__name__}: {error}). Place the files "
            f"that torchvision.datasets.{TORCHVISION[name]} expects there by hand (--root or EBM_DATASETS for another "
            "place)"
        ) from error


def _origin(name: str, split: str, samples: int) -> Origin:
    return Origin(source=name, split=split, samples=samples)


def _find_idx(root: Path, name: str, split: str) -> tuple[Path, Path] | None:
    """(images, labels): IDX files, gzip'd or not, in `root` itself or where torchvision puts them."""
    stem = IDX[name][split]
    for folder in (root / FOLDERS[name] / "raw", root / "raw", root / FOLDERS[name], root):
        for end in ("", ".gz"):
            images, labels = (folder / f"{stem}-{kind}-ubyte{end}" for kind in ("images-idx3", "labels-idx1"))
            if images.is_file() and labels.is_file() and (folder != root or name in _named(root, name)):
                return images, labels
    return None


def _named(root: Path, name: str) -> tuple[str, ...]:
    """MNIST, Fashion-MNIST and KMNIST have files of the same names: in a folder of its own, the name of that decides,
    unless it has none of the three."""
    told = root.resolve().name.lower().replace("-", "_").replace("fashionmnist", "fashion_mnist")
    family = ("fashion_mnist", "kmnist", "emnist", "mnist")
    first = next((one for one in family if one in told), None)
    return (name,) if first is None else (first,)


def _from_idx(name: str, split: str, images: Path, labels: Path) -> ArraySource:
    try:
        x, y = read_idx(images), read_idx(labels)
    except (OSError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"{name}: {images} or its labels can't be read ({error}); copy or download it again") from error
    if x.ndim != 3 or y.shape != x.shape[:1]:
        raise DataError(f"{name}: {images} holds {x.shape} and {labels} {y.shape}; must be (N, H, W) and (N,)")
    if name == "emnist":
        x = x.transpose(0, 2, 1)  # its images lie on their side
    classes = FASHION if name == "fashion_mnist" else None
    return ArraySource(name, x[..., None], y, classes, origin=_origin(name, split, len(x)))


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of an IDX file (Yann LeCun's MNIST page), gzip'd or not. Raises OSError, ValueError."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        zeros, kind, rank = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or not 1 <= rank <= 4:
            raise ValueError("not an IDX file of bytes")
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        data = file.read()
    if len(data) != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"has {len(data)} bytes where its header says {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


@dataclass(frozen=True)
class PictureSource:
    """A torchvision data set of Pillow images."""

    name: str
    data: Any
    labels: tuple[int, ...]
    classes: tuple[str, ...] | None = None
    left_out: tuple[LeftOut, ...] = ()
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def key_and_label(self, i: int) -> tuple[str, int | None]:
        return f"{i:06d}", self.labels[i]

    def item(self, i: int) -> Item:
        array = np.asarray(self.data[i][0].convert("L"))[:, :, None]
        return Item(f"{i:06d}", f"{self.name}, sample {i}", array, self.labels[i])


def _mnist(kind: str) -> Callable[[Path, str], Source]:
    def open_it(root: Path, split: str) -> Source:
        from torchvision import datasets

        options = {"split": "balanced"} if kind == "emnist" else {}
        getattr(datasets, TORCHVISION[kind])(root, train=split == "train", download=True, **options)
        found = _find_idx(root, kind, split)
        if found is None:
            raise FileNotFoundError(f"no {IDX[kind][split]}-images-idx3-ubyte below {root}")
        return _from_idx(kind, split, *found)

    return open_it


def _cifar(kind: str) -> Callable[[Path, str], Source]:
    def open_it(root: Path, split: str) -> Source:
        from torchvision import datasets

        folder = root if any(root.glob("cifar-*")) else root / kind
        data = getattr(datasets, TORCHVISION[kind])(folder, train=split == "train", download=True)
        return ArraySource(
            kind, data.data, np.array(data.targets), tuple(data.classes), origin=_origin(kind, split, len(data))
        )

    return open_it


def _svhn(root: Path, split: str) -> Source:
    from torchvision import datasets

    folder = root if any(root.glob("*_32x32.mat")) else root / "svhn"
    data = datasets.SVHN(folder, split=split, download=True)
    images = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))
    return ArraySource("svhn", images, data.labels, origin=_origin("svhn", split, len(images)))


def _stl10(root: Path, split: str) -> Source:
    from torchvision import datasets

    data = datasets.STL10(root, split=split, download=True)
    labels = None if split == "unlabeled" else data.labels
    classes = None if labels is None else tuple(data.classes)
    images = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))
    return ArraySource("stl10", images, labels, classes, origin=_origin("stl10", split, len(images)))


def _omniglot(root: Path, split: str) -> Source:
    from torchvision import datasets

    data = datasets.Omniglot(root, background=split == "train", download=True)
    labels = tuple(int(label) for _, label in data._flat_character_images)
    classes = tuple(name.replace("/", ", ") for name in data._characters)
    return PictureSource("omniglot", data, labels, classes, origin=_origin("omniglot", split, len(labels)))


def _celeba(root: Path, split: str) -> Source:
    from torchvision import datasets

    data = datasets.CelebA(root, split=split, target_type=[], download=True)
    files: list[tuple[str, str, int | None]] = [(file, Path(file).stem, None) for file in data.filename]
    origin = _origin("celeba", split, len(files))
    return FileSource(str(root / "celeba" / "img_align_celeba"), files, origin=origin)


OPEN: dict[str, Callable[[Path, str], Source]] = {
    **{name: _mnist(name) for name in IDX},
    **{name: _cifar(name) for name in ("cifar10", "cifar100")},
    "svhn": _svhn,
    "stl10": _stl10,
    "omniglot": _omniglot,
    "celeba": _celeba,
}
TORCHVISION = {
    "mnist": "MNIST",
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "stl10": "STL10",
    "omniglot": "Omniglot",
    "celeba": "CelebA",
}
