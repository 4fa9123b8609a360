"""The residual energy, for natural images (after Du & Mordatch 2019, appendix A)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ebm.energies.base import require_batch
from ebm.energies.networks import NetworkEnergy, make_activation, sum_over


class ResidualBlock(nn.Module):
    """h + conv(a(conv(a(h)))), `a` the activation. A 1x1 convolution is on the shortcut where the width changes or the
    second convolution has a stride. No norm layer."""

    def __init__(self, narrow: int, wide: int, activation: str = "silu", stride: int = 1):
        super().__init__()
        self.activation = make_activation(activation)
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=stride, padding=1)
        same = narrow == wide and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(narrow, wide, 1, stride=stride)

    def forward(self, h: Tensor) -> Tensor:
        return self.shortcut(h) + self.conv2(self.activation(self.conv1(self.activation(h))))


class ResNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width): a stage of `blocks` residual blocks a feature width, halving the
    resolution after each, features summed over space, a linear head with a learned scale. Any size from 8x8 up.
    `options`: num_classes, confine (NetworkEnergy.finish)."""

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        features: Sequence[int] = (48, 96, 96),
        blocks: int = 1,
        spectral_norm: bool = True,
        *,
        activation: str = "silu",
        **options,
    ):
        super().__init__()
        self.shape = (channels, height, width)
        self.stem = nn.Conv2d(channels, features[0], 3, padding=1)
        widths = [features[0], *features]
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(narrow if i == 0 else wide, wide, activation) for i in range(blocks)))
            for narrow, wide in zip(widths, features, strict=False)
        )
        self.activation = make_activation(activation)
        self.finish(features[-1], spectral_norm=spectral_norm, **options)

    def features(self, x: Tensor) -> Tensor:
        h = self.stem(require_batch(x, self.shape))
        for stage in self.stages:
            h = stage(h)
            if min(h.shape[2:]) > 1:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
        return sum_over(self.activation(h), (2, 3))


class WideResNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width): three stages of (depth - 4) / 6 residual blocks, 16, 32 and 64 times
    `widen` wide, the second and third of stride 2, features averaged over space. Any size from 8x8 up.

    JEM's network is WRN-28-10 with `activation="leaky_relu"`; the default, SiLU, has the second derivative that score
    matching needs. `options`: spectral_norm, num_classes, confine (NetworkEnergy.finish).
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        depth: int = 28,
        widen: int = 10,
        *,
        activation: str = "silu",
        **options,
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
        h = self.activation(self.blocks(self.stem(require_batch(x, self.shape))))
        return sum_over(h, (2, 3)) / (h.shape[2] * h.shape[3])
