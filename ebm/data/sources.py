"""Sources by their names: digits, toy densities, torchvision's sets, folders, arrays, parquet files and shards."""

import glob
import gzip
import math
import os
import string
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ebm.data.folders import FileSource, open_folder
from ebm.data.indexing import open_shards
from ebm.data.items import ArraySource, LabelTable, Source, natural, read_labels, unique_keys
from ebm.data.manifest import Origin, fingerprint
from ebm.data.stored import open_npy, open_parquet
from ebm.data.tars import Grouping
from ebm.energies import BaseEnergyFunction, FourPeaksEnergy, GaussianMixtureEnergy
from ebm.errors import DataError
from ebm.streams import generator

SAMPLES = 20_000  # of each split


def four_peaks(n: int, gen: torch.Generator) -> tuple[Tensor, None]:
    """Of `FourPeaksEnergy`, on all of the plane."""
    return FourPeaksEnergy().sample(n, gen), None


def eight_gaussians(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight N(m_k, .2^2 I) of equal weight, m_k = 2 (cos, sin)(pi k / 4); the label is k."""
    label = torch.randint(8, (n,), generator=gen)
    return EIGHT[label] + 0.2 * _normal(n, gen), label


def rings(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three rings of equal weight: the angle uniform, the radius N(1 + k, .1^2); the label is k."""
    label = torch.randint(3, (n,), generator=gen)
    radius = 1 + label + 0.1 * torch.randn(n, generator=gen, dtype=torch.float64)
    return radius[:, None] * _circle(_angle(n, gen, 2)), label


def two_moons(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half circles of radius 1 that interlock, as scikit-learn's, centred, plus N(0, .1^2 I); the label says which."""
    label = torch.randint(2, (n,), generator=gen)
    upper = _circle(_angle(n, gen, 1))
    lower = upper.new_tensor([1.0, 0.5]) - upper
    x = torch.where(label[:, None] == 0, upper, lower) - upper.new_tensor([0.5, 0.25])
    return x + 0.1 * _normal(n, gen), label


def _normal(n: int, gen: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=gen, dtype=torch.float64)


def _angle(n: int, gen: torch.Generator, half_turns: int) -> Tensor:
    return half_turns * math.pi * torch.rand(n, generator=gen, dtype=torch.float64)


def _circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


EIGHT = 2 * _circle(torch.arange(8, dtype=torch.float64) * math.pi / 4)  # the means of eight_gaussians

TOYS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]] = {
    "four_peaks": four_peaks,
    "eight_gaussians": eight_gaussians,
    "rings": rings,
    "two_moons": two_moons,
}

DENSITIES = ("four_peaks", "eight_gaussians")


def sample_toy(name: str, split: str, n: int = SAMPLES) -> tuple[Tensor, Tensor | None]:
    """(float32 (n, 2), int64 labels (n,) or None) of a toy density; each split has a seed of its own."""
    x, labels = TOYS[name](n, generator(0, f"toy/{name}/{split}"))
    return x.float(), labels


def known_density(name: str) -> tuple[BaseEnergyFunction, Tensor]:
    """The energy that a toy of `DENSITIES` has at temperature 1, and its modes (M, 2)."""
    if name == "four_peaks":
        energy = FourPeaksEnergy()
        return energy, energy.centres
    return GaussianMixtureEnergy(EIGHT, 0.2**2), EIGHT.float()


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
CLASSES = {  # of the IDX files, which have numbers alone
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnist": tuple(string.digits + string.ascii_uppercase + "abdefghnqrt"),
}


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
    except DataError:
        raise
    except Exception as error:  # network, archive and checksum errors are of many types
        raise DataError(
            f"{name}: its files are not in {place}, or not as they were published, and the download failed "
            f"({type(error).__name__}: {error}). Place the files that torchvision.datasets.{TORCHVISION[name]} expects "
            "there by hand (--root or EBM_DATASETS for another place)"
        ) from error


def _origin(name: str, split: str, samples: int) -> Origin:
    return Origin(source=name, split=split, samples=samples)


def _find_idx(root: Path, name: str, split: str) -> tuple[Path, Path] | None:
    """(images, labels): IDX files, gzip'd or not, in `root` itself or where torchvision puts them."""
    stem = IDX[name][split]
    own = [root / FOLDERS[name] / "raw", root / FOLDERS[name]]
    for folder in (*own, root / "raw", root / "gzip", root):
        for end in ("", ".gz"):
            images, labels = (folder / f"{stem}-{kind}-ubyte{end}" for kind in ("images-idx3", "labels-idx1"))
            if images.is_file() and labels.is_file() and (folder in own or _named(root) in (None, name)):
                return images, labels
    return None


def _named(root: Path) -> str | None:
    """The set that a folder's name says, if any: MNIST, Fashion-MNIST and KMNIST have files of the same names."""
    told = root.resolve().name.lower().replace("-", "_").replace("fashionmnist", "fashion_mnist")
    return next((one for one in ("fashion_mnist", "kmnist", "emnist", "mnist") if one in told), None)


def _from_idx(name: str, split: str, images: Path, labels: Path) -> ArraySource:
    try:
        x, y = read_idx(images), read_idx(labels)
    except (OSError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"{name}: {images} or its labels can't be read ({error}); copy or download it again") from error
    if x.ndim != 3 or y.shape != x.shape[:1] or 0 in x.shape:
        raise DataError(f"{name}: {images} holds {x.shape} and {labels} {y.shape}; must be (N, H, W) and (N,)")
    if name == "emnist":
        x = x.transpose(0, 2, 1)  # its images lie on their side
    return ArraySource(name, x[..., None], y, CLASSES.get(name), origin=_origin(name, split, len(x)))


def read_idx(path: Path) -> np.ndarray:
    """uint8 array of an IDX file (Yann LeCun's MNIST page), gzip'd or not. Raises OSError, ValueError, EOFError,
    struct.error, zlib.error."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        zeros, kind, rank = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or kind != 8 or not 1 <= rank <= 4:
            raise ValueError("not an IDX file of bytes")
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        size, data = math.prod(shape), bytearray()
        while len(data) <= size and (part := file.read(1 << 20)):  # a header or an archive may promise terabytes
            data += part
    if len(data) != size:
        more = "more" if len(data) > size else len(data)
        raise ValueError(f"has {more} bytes where its header says {shape}")
    return np.frombuffer(bytes(data), np.uint8).reshape(shape)


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

        cls = getattr(datasets, TORCHVISION[kind])
        root = _above(root, cls.base_folder)
        folder = root if any(root.glob(f"{cls.base_folder}*")) or (root / cls.filename).is_file() else root / kind
        data = cls(folder, train=split == "train", download=True)
        return ArraySource(
            kind, data.data, np.array(data.targets), tuple(data.classes), origin=_origin(kind, split, len(data))
        )

    return open_it


def _above(root: Path, folder: str) -> Path:
    """Where torchvision looks for `folder`, also where `root` is that folder itself."""
    return root.resolve().parent if root.resolve().name == folder else root


def _svhn(root: Path, split: str) -> Source:
    from torchvision import datasets

    folder = root if any(root.glob("*_32x32.mat")) else root / "svhn"
    data = datasets.SVHN(folder, split=split, download=True)
    images = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))
    return ArraySource("svhn", images, data.labels, origin=_origin("svhn", split, len(images)))


def _stl10(root: Path, split: str) -> Source:
    from torchvision import datasets

    data = datasets.STL10(_above(root, datasets.STL10.base_folder), split=split, download=True)
    labels = None if split == "unlabeled" else data.labels
    named = labels is not None and hasattr(data, "classes")  # class_names.txt may be missing
    images = np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))
    return ArraySource(
        "stl10", images, labels, tuple(data.classes) if named else None, origin=_origin("stl10", split, len(images))
    )


def _omniglot(root: Path, split: str) -> Source:
    """A class a character: `Alphabet, character01`. Its archive is unpacked where that is all there is."""
    from torchvision import datasets
    from torchvision.datasets.utils import extract_archive

    part = "images_background" if split == "train" else "images_evaluation"
    places = [place for place in (root / datasets.Omniglot.folder, root / "python", root) if place.is_dir()]
    if not any((place / part).is_dir() for place in places):
        packed = [place for place in places if (place / f"{part}.zip").is_file()]
        if packed:
            extract_archive(packed[0] / f"{part}.zip", packed[0])
        else:
            datasets.Omniglot(root, background=split == "train", download=True)
            places = [root / datasets.Omniglot.folder]
    folder = next(place / part for place in places if (place / part).is_dir())
    paths = sorted(path.relative_to(folder) for path in folder.glob("*/*/*.png"))
    if not paths:
        raise DataError(f"omniglot: no ALPHABET/CHARACTER/*.png in {folder}")
    names = natural({", ".join(path.parts[:2]) for path in paths})
    numbers = {name: number for number, name in enumerate(names)}
    files: list[tuple[str, str, int | None]] = [
        (str(path), key, numbers[", ".join(path.parts[:2])])
        for path, key in zip(paths, unique_keys(map(str, paths)), strict=True)
    ]
    return FileSource(str(folder), files, tuple(names), origin=_origin("omniglot", split, len(files)))


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


PATHS = ("folder", "npy", "parquet", "shards")
KINDS = f"digits, {', '.join(NAMES)}, {', '.join(TOYS)}, folder:PATH, npy:FILE, parquet:PATTERN, shards:DIR"


class Options(NamedTuple):
    """What a source may be told beside its name and split. `root`: of torchvision's files; `labels`: a file; `label`
    and `grouping`: of shards' members, or, with `grouping.image` alone, the columns of parquet files."""

    root: str | None = None
    labels: str | None = None
    label: str | None = None
    grouping: Grouping | None = None


PLAIN = Options()


def open_source(spec: str, split: str = "train", options: Options = PLAIN) -> Source:
    """A source by its name. `split`: `train` or `test`, or another that the data set has. Raises DataError."""
    source = _open(spec, split, options)
    if source.origin is None or options == PLAIN:
        return source
    told = source.origin.model_copy(update={"options": source.origin.options | _told(options)})
    return replace(cast(ArraySource, source), origin=told)  # as every source, it is a frozen dataclass


def _told(options: Options) -> dict[str, str | int | float]:
    """The options that change what a source holds, for its origin."""
    dots, image = options.grouping or Grouping()
    told = {"label": options.label, "image": image, "dots": None if dots == "first" else dots}
    if options.labels is not None:
        told["labels"] = f"{Path(options.labels).name} {fingerprint([options.labels])[:16]}"
    return {name: value for name, value in told.items() if value is not None}


def _open(spec: str, split: str, options: Options) -> Source:
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
    raise DataError(f"source {spec!r} is not known{_meant(spec)}; use one of {KINDS}")


def _meant(spec: str) -> str:
    """For the message: a path without its kind, or a name with another spelling."""
    kinds = {".npy": "npy", ".npz": "npy", ".parquet": "parquet"}
    kind = "folder" if os.path.isdir(spec) else kinds.get(Path(spec).suffix)
    near = [f"{kind}:{spec}"] if kind else get_close_matches(spec.lower(), ("digits", *NAMES, *TOYS), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _check(spec: str, kind: str, options: Options) -> None:
    """Raises DataError for an option that the source would ignore."""
    if options.root is not None and spec not in NAMES:
        raise DataError(f"--root is for {', '.join(NAMES)}; {spec} has none")
    if options.labels is not None and kind not in ("folder", "npy", "shards"):
        raise DataError(f"--labels is for folder:, npy: and shards:; {spec} has its own")
    if (options.label is not None or options.grouping is not None) and kind not in ("shards", "parquet"):
        raise DataError(f"--label, --image and --dots are for shards: and parquet:; {spec} has no members or columns")
    if kind == "parquet" and options.grouping is not None and options.grouping.dots != "first":
        raise DataError(f"--dots is for shards:; {spec} has columns")


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
        return open_parquet(path, split, options.grouping.image if options.grouping else None, options.label)
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
