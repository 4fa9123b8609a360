"""Arrays in files as sources: .npy, which is mapped, and the named arrays of .npz."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ebm.data.decode import show
from ebm.data.items import ArraySource, Item
from ebm.data.labels import checked
from ebm.data.manifest import LeftOut, Origin
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
