"""Residual networks for natural images: a plain one (after Du & Mordatch 2019, appendix A) and JEM's wide one. Their
default sizes are those of the config (ebm.config.energies)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from ebm.config.energies import ResNetConfig, WideResNetConfig
from ebm.energies.base import require_batch
from ebm.energies.networks import HeadOptions, NetworkEnergy, NetworkOptions, make_activation, sum_over

RESNET, WIDE_RESNET = ResNetConfig(), WideResNetConfig()


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
                h = F.avg_pool2d(h, 2, ceil_mode=True)
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
