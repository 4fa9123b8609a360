"""uint8 images to the network's range, and augmentation: pure functions, on the images' device.

`generators`: one a stream; the batch is their equal parts in order, and a stream's result depends on its own alone.
"""

import torch
from torch import Tensor

from ebm.streams import Generators, normal_, uniform_


def dequantize(images: Tensor, generators: Generators) -> Tensor:
    """uint8 (B, C, H, W) -> float32 in [-1, 1]: 2 (x + u) / 256 - 1 with u ~ U[0, 1), each level spread over its bin
    (Theis et al. 2016, section 3.1). With `generators=None`: 2 x / 255 - 1, no noise.
    """
    x = images.float()
    if generators is None:
        return x / 127.5 - 1
    return (x + uniform_(torch.empty_like(x), generators)) / 128 - 1


def augment(x: Tensor, generators: Generators, flip: bool, crop: int) -> Tensor:
    """Mirror half of the images left to right, and shift each by up to `crop` pixels, its edges repeated.

    Every image takes three numbers whatever is asked for, so that flip and crop do not change one another.
    """
    batch, channels, height, width = x.shape
    u = uniform_(torch.empty(batch, 3, device=x.device), generators)
    shift = (u[:, 1:] * (2 * crop + 1)).long().clamp(max=2 * crop) - crop
    rows = (torch.arange(height, device=x.device) + shift[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + shift[:, 1:]).clamp(0, width - 1)
    if flip:
        columns = torch.where(u[:, :1] < 0.5, width - 1 - columns, columns)
    image = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def add_noise(x: Tensor, std: float, generators: Generators) -> Tensor:
    """x + std N(0, 1)."""
    return x + std * normal_(torch.empty_like(x), generators)
