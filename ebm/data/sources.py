"""Samples of densities on the plane that are known exactly: float32 (N, 2), a function of the seed alone."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ebm.data.decode import CHANNELS, FORMATS, IMAGE_SUFFIXES, to_array
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

TOYS: dict[str, Callable] = {
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


KINDS = f"digits, mnist, cifar10, svhn, celeba, {', '.join(TOYS)}, folder:PATH, npy:PATH"


class Item(NamedTuple):
    """One sample. `array`: an image, uint8 (H, W, C), or a vector, float32 (D,). `encoded`: an image's file as it is
    and its suffix, where it can be kept so."""

    key: str
    name: str  # for error messages
    array: np.ndarray
    label: int | None
    encoded: tuple[bytes, str] | None = None


class Source(Protocol):
    """Samples in a fixed order; sent to worker processes, so it must be picklable."""

    def __len__(self) -> int: ...

    def item(self, i: int) -> Item: ...


@dataclass(frozen=True)
class ArraySource:
    """`arrays`: images, uint8 (N, H, W, C), or vectors, float32 (N, D); `labels`: (N,) or None."""

    name: str
    arrays: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.arrays)

    def item(self, i: int) -> Item:
        label = None if self.labels is None else int(self.labels[i])
        return Item(f"{i:06d}", f"{self.name}, sample {i}", self.arrays[i], label)


@dataclass(frozen=True)
class NpySource:
    """uint8 (N, H, W) or (N, H, W, C), or float32 (N, D), in a .npy file, which is mapped, not loaded."""

    path: str
    length: int

    def __len__(self) -> int:
        return self.length

    def item(self, i: int) -> Item:
        array = np.array(_open_npy(self.path)[i])
        array = array[:, :, None] if array.ndim == 2 else array
        return Item(f"{i:06d}", f"{self.path}, sample {i}", array, None)


@dataclass(frozen=True)
class FileSource:
    """Image files below `root`, as (relative path, key, label)."""

    root: str
    files: list[tuple[str, str, int | None]]

    def __len__(self) -> int:
        return len(self.files)

    def item(self, i: int) -> Item:
        name, key, label = self.files[i]
        path = Path(self.root) / name
        try:
            data = path.read_bytes()
            with Image.open(path, formats=FORMATS) as image:
                turned = image.getexif().get(0x0112, 1) != 1  # the reader knows no EXIF orientation
                as_it_is = image.format in ("PNG", "JPEG") and image.mode in ("L", "RGB") and not turned
                suffix = "png" if image.format == "PNG" else "jpg"
                if image.mode not in CHANNELS:
                    raise ValueError(f"pixels of Pillow's mode {image.mode}")
                array = to_array(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's plugins raise almost anything on a broken file
            raise DataError(f"{path}: can't be read as an image ({error}); mend or remove it") from error
        return Item(key, str(path), array, label, (data, suffix) if as_it_is else None)


def open_source(spec: str, split: str = "train") -> Source:
    """A source by its name. `split`: `train` or `test`, or another that the data set has; for a folder, its
    subdirectory of that name if there is one; a .npy file has none. Raises DataError."""
    kind, _, path = spec.partition(":")
    if kind == "folder" and path:
        return open_folder(Path(path), split)
    if kind == "npy" and path:
        return open_npy(path)
    if spec == "digits":
        return open_digits(split)
    if spec in TOYS:
        return open_toy(spec, split)
    if spec in ("mnist", "cifar10", "svhn", "celeba"):
        return open_torchvision(spec, split)
    raise DataError(f"source {spec!r} is not known; use one of {KINDS}")


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
    return ArraySource("digits", *((train, y_train) if split == "train" else (test, y_test)))


def open_toy(name: str, split: str) -> ArraySource:
    if split not in ("train", "test"):
        raise DataError(f"split {split!r}: {name} has train and test")
    x, labels = sample_toy(name, split)
    return ArraySource(name, x.numpy(), None if labels is None else labels.numpy())


def open_torchvision(name: str, split: str) -> Source:
    """Downloads below $EBM_DATASETS, or ~/.cache/ebm, where the files are not there yet."""
    from torchvision import datasets

    root = Path(os.environ.get("EBM_DATASETS", "~/.cache/ebm")).expanduser()
    splits = {"celeba": ("train", "valid", "test"), "svhn": ("train", "test", "extra")}.get(name, ("train", "test"))
    if split not in splits:
        raise DataError(f"split {split!r}: {name} has {', '.join(splits)}")
    try:
        if name == "mnist":
            data = datasets.MNIST(root, train=split == "train", download=True)
            return ArraySource(name, data.data.numpy()[..., None], data.targets.numpy())
        if name == "cifar10":
            data = datasets.CIFAR10(root / name, train=split == "train", download=True)
            return ArraySource(name, data.data, np.array(data.targets))
        if name == "svhn":
            data = datasets.SVHN(root / name, split=split, download=True)
            return ArraySource(name, np.ascontiguousarray(data.data.transpose(0, 2, 3, 1)), data.labels)
        data = datasets.CelebA(root, split=split, target_type=[], download=True)
    except Exception as error:  # network, archive and checksum errors are of many types
        folder = root / {"mnist": "MNIST/raw"}.get(name, name)
        raise DataError(
            f"{name}: download failed ({type(error).__name__}: {error}). Place the files that "
            f"torchvision.datasets expects in {folder} by hand (set EBM_DATASETS for another place than {root})"
        ) from error
    files = [(file, Path(file).stem, None) for file in data.filename]
    return FileSource(str(root / "celeba" / "img_align_celeba"), files)


def open_folder(root: Path, split: str) -> FileSource:
    """Images below a folder, sorted by path; the class is the rank of the first-level subdirectory, if any."""
    root = root / split if (root / split).is_dir() else root
    if not root.is_dir():
        raise DataError(f"folder:{root}: no such directory")
    paths = sorted(
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
    )
    if not paths:
        raise DataError(f"folder:{root}: no images below it (.{', .'.join(IMAGE_SUFFIXES)})")
    nested = [path for path in paths if len(path.parts) > 1]
    if nested and len(nested) < len(paths):
        loose = next(path for path in paths if len(path.parts) == 1)
        raise DataError(f"folder:{root}: {loose} is in no class folder, {nested[0]} is; move it, or point at one level")
    classes = {name: i for i, name in enumerate(sorted({path.parts[0] for path in nested}))}
    files, keys = [], set()
    for path in paths:
        key = path.with_suffix("").as_posix().replace(".", "_")  # webdataset's keys end at the first dot
        key = f"x{key}" if key.startswith("__") else key  # which it takes for its own
        while key in keys:
            key += "_"
        keys.add(key)
        files.append((path.as_posix(), key, classes.get(path.parts[0])))
    return FileSource(str(root), files)


def open_npy(path: str) -> NpySource:
    try:
        array = _open_npy(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"npy:{path}: not a readable .npy file without pickles ({error})") from error
    images = array.dtype == np.uint8 and array.ndim in (3, 4)
    vectors = array.dtype == np.float32 and array.ndim == 2
    if not (images or vectors) or 0 in array.shape:
        raise DataError(
            f"npy:{path}: is {array.dtype} {array.shape}; must be images, uint8 (N, H, W) or (N, H, W, C), or vectors, "
            "float32 (N, D)"
        )
    if array.ndim == 4 and array.shape[3] not in (1, 2, 3, 4):
        raise DataError(f"npy:{path}: is {array.shape}; channels come last, (N, H, W, C), and are 1 to 4")
    return NpySource(path, len(array))


@lru_cache(maxsize=1)
def _open_npy(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)
