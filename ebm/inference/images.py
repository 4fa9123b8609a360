"""Images as files and measures hold them: 256 levels, and arrays with channels last."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm.errors import DataError


def to_levels(x: Tensor, what: str = "images") -> Tensor:
    """Turns images (N, C, H, W) in [-1, 1] into uint8 on the host, each value into the number of its bin of 256, one
    outside into the nearest. Raises DataError, which calls the images `what`, where a value is not finite."""
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{bad} of {len(x)} {what} hold non-finite values; evaluate an earlier checkpoint of the run")
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8).cpu()


def from_levels(images: Tensor) -> Tensor:
    """Turns uint8 images (N, C, H, W) into float32 in [-1, 1], each level into the middle of its bin."""
    return (images.float() + 0.5) / 128 - 1


def to_array(x: Tensor) -> np.ndarray:
    """Turns states of chains into what a file holds: images (N, C, H, W) in [-1, 1] into uint8 (N, H, W, C), as
    `to_levels` does; vectors (N, D) stay as they are. Raises DataError where a value is not finite."""
    if x.ndim == 4:
        return np.asarray(to_levels(x, "samples").permute(0, 2, 3, 1).contiguous().numpy())
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(1).sum())
        raise DataError(f"{bad} of {len(x)} samples hold non-finite values; use an earlier checkpoint of the run")
    return np.asarray(x.float().cpu().numpy())


def to_states(data: Tensor) -> Tensor:
    """Turns what a reader gives into what an energy takes: uint8 images (N, C, H, W) into float32 in [-1, 1]; vectors
    and states stay as they are."""
    return from_levels(data) if data.dtype == torch.uint8 else data


def load_array(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Opens a .npy file that fits `shape`: uint8 images (N, H, W, C) for (C, H, W), (N, H, W) too where C is 1; finite
    float32 vectors (N, D) for (D,). Raises DataError."""
    try:
        array: np.ndarray = np.load(path, allow_pickle=False, mmap_mode="r")  # a header may promise terabytes
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {error}; give a .npy file of {_expected(shape)}") from error
    if not isinstance(array, np.ndarray):  # np.load opens a .npz too
        raise DataError(f"{path}: is an archive; give a .npy file of {_expected(shape)}")
    if array.ndim == 3 and shape[0] == 1 and len(shape) == 3:
        array = array[..., None]
    dtype, tail = (np.float32, shape) if len(shape) == 1 else (np.uint8, (*shape[1:], shape[0]))
    if array.dtype != dtype or array.ndim != len(tail) + 1 or array.shape[1:] != tuple(tail):
        raise DataError(f"{path}: {array.dtype} {array.shape}, but the run's samples are {_expected(shape)}")
    if len(shape) == 1 and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(1).argmax())
        raise DataError(f"{path}: vector {bad} holds a value that is not finite")
    return array


def _expected(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"float32 vectors (N, {shape[0]})"
    channels, height, width = shape
    return f"uint8 images (N, {height}, {width}, {channels})"
