"""Images as the commands read and write them: uint8 arrays (N, H, W, C)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm.errors import DataError
from ebm.evaluation.levels import from_levels, to_levels


def to_uint8(x: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C), as `ebm.evaluation.levels.to_levels`."""
    return to_levels(x, "samples").permute(0, 2, 3, 1).contiguous().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, C) -> (N, C, H, W) in [-1, 1], each level to the middle of its bin."""
    return from_levels(torch.from_numpy(images).permute(0, 3, 1, 2))


def load_array(path: str | Path, shape: tuple[int, int, int]) -> np.ndarray:
    """A .npy of uint8 images (N, H, W, C) that fits `shape` (C, H, W); (N, H, W) where C is 1."""
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}; give a .npy file of uint8 images (N, H, W, C)") from error
    channels, height, width = shape
    if images.ndim == 3 and channels == 1:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        raise DataError(
            f"{path}: {images.dtype} {images.shape}, but the run's images are uint8 (N, {height}, {width}, {channels})"
        )
    return images
