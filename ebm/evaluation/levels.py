"""Images as the measures compare them: the 256 levels that data comes in, so that chains and data are alike."""

import torch
from torch import Tensor

from ebm.errors import DataError


def to_levels(x: Tensor, what: str = "images") -> Tensor:
    """Images (N, C, H, W) in [-1, 1] -> uint8 on the host, each value to its bin of 256; outside, to the nearest.

    A non-finite value has no level: DataError, which calls the images `what`.
    """
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{bad} of {len(x)} {what} hold non-finite values; evaluate an earlier checkpoint of the run")
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8).cpu()


def from_levels(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 in [-1, 1], each level to the middle of its bin."""
    return (images.float() + 0.5) / 128 - 1
