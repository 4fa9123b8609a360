"""Residual networks for natural images: a plain one (after Du & Mordatch 2019, appendix A) and JEM's wide one. Their
default sizes are those of the config (ebm.config.energies)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from ebm.config.energies import ResNetConfig, WideResNetConfig
from ebm.energies.base import require_batch
from ebm.energies.networks import HeadOptions, NetworkEnergy, NetworkOptions, make_activation, sum_over

RESNET, WIDE_RESNET = ResNetConfig(), WideResNetConfig()


def halve(h: Tensor) -> Tensor:
    """Means over windows of 2x2 pixels side by side, (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)). At an odd size
    the last windows take the mean of the pixels that exist.

    This is `avg_pool2d(h, 2, ceil_mode=True)`, whose gradient inductor computes wrongly at odd sizes (torch 2.11 to
    2.14), and whose own backward kernel for channels-last tensors took a quarter of a chain's time on a GPU.
    """
    means: Tensor = _Halve.apply(h)
    return means


class _Halve(torch.autograd.Function):
    """Linear; its derivative is the adjoint map, `_Spread`, so both can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.size = rows, columns = h.shape[2:]
        means = h[:, :, ::2, ::2] * 0.25
        means[..., : columns // 2].add_(h[:, :, ::2, 1::2], alpha=0.25)
        means[:, :, : rows // 2].add_(h[:, :, 1::2, ::2], alpha=0.25)
        means[:, :, : rows // 2, : columns // 2].add_(h[:, :, 1::2, 1::2], alpha=0.25)
        return _double_edges(means, rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # torch's own signature: one gradient an output
        spread: Tensor = _Spread.apply(*grads, *ctx.size)
        return spread


class _Spread(torch.autograd.Function):
    """Gives each pixel its share of the value of its window: the adjoint of `_Halve` for images of rows x columns."""

    @staticmethod
    def forward(ctx: Any, means: Tensor, rows: int, columns: int) -> Tensor:
        shares = _double_edges(means * 0.25, rows, columns).permute(0, 2, 3, 1)  # channels last, as the copy below is
        b, h, w, c = shares.shape
        lines = shares[:, :, :, None].expand(b, h, w, 2, c).reshape(b, h, 1, 2 * w * c)
        pixels = lines.expand(b, h, 2, 2 * w * c).reshape(b, 2 * h, 2 * w, c)
        return pixels[:, :rows, :columns].contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return halve(*grads), None, None


def _double_edges(quarters: Tensor, rows: int, columns: int) -> Tensor:
    """Doubles in place what was divided by the four pixels of a window, where an edge at an odd size has fewer."""
    if columns % 2:
        quarters[..., -1] *= 2
    if rows % 2:
        quarters[:, :, -1] *= 2
    return quarters


class ResidualBlock(nn.Module):
    """h -> h + conv(a(conv(a(h)))), where `a` is the activation, from `narrow` to `wide` channels. The second
    convolution has the stride. The shortcut has a 1x1 convolution if width or resolution change. There is no norm
    layer."""

    def __init__(self, narrow: int, wide: int, activation: str, stride: int = 1):
        super().__init__()
        self.activation = make_activation(activation)
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=stride, padding=1)
        same = narrow == wide and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(narrow, wide, 1, stride=stride)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.shortcut(h) + self.conv2(self.activation(self.conv1(self.activation(h))))
        return out


class ResNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width) of 8x8 pixels or more.

    Each width of `features` is a stage of `blocks` residual blocks, after which the resolution is halved. The head
    takes the last features summed over space. `options`: see NetworkEnergy.finish.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        features: Sequence[int] = RESNET.features,
        blocks: int = RESNET.blocks,
        spectral_norm: bool = RESNET.spectral_norm,
        *,
        activation: str = RESNET.activation,
        **options: Unpack[HeadOptions],
    ):
        super().__init__()
        self.shape = (channels, height, width)
        self.stem = nn.Conv2d(channels, features[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(narrow if i == 0 else wide, wide, activation) for i in range(blocks)))
            for narrow, wide in pairwise([features[0], *features])
        )
        self.activation = make_activation(activation)
        self.finish(features[-1], spectral_norm=spectral_norm, **options)

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.stem(require_batch(x, self.shape))
        for stage in self.stages:
            h = stage(h)
            if min(h.shape[2:]) > 1:
                h = halve(h)
        return sum_over(self.activation(h), (2, 3))


class WideResNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width) of 8x8 pixels or more.

    There are three stages of (depth - 4) / 6 residual blocks, with 16, 32 and 64 times `widen` channels. The second and
    the third halve the resolution. The head takes the last features averaged over space.

    JEM's network is WRN-28-10 with `activation="leaky_relu"` (Grathwohl et al. 2020). The default, SiLU, has the second
    derivative that score matching needs. `options`: see NetworkEnergy.finish.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        depth: int = WIDE_RESNET.depth,
        widen: int = WIDE_RESNET.widen,
        *,
        activation: str = WIDE_RESNET.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} must be 6 n + 4 with n blocks a stage: 10, 16, 22, 28 ...")
        self.shape = (channels, height, width)
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        blocks, narrow = [], 16
        for wide, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(ResidualBlock(narrow, wide, activation, stride=1 if i else first_stride))
                narrow = wide
        self.blocks = nn.Sequential(*blocks)
        self.activation = make_activation(activation)
        self.finish(narrow, **options)

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.activation(self.blocks(self.stem(require_batch(x, self.shape))))
        return sum_over(h, (2, 3)) / (h.shape[2] * h.shape[3])
