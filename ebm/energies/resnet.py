"""The residual energy, for natural images (after Du & Mordatch 2019, appendix A)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ebm.energies.base import BaseEnergyFunction, EnergyHead, require_batch, spectrally_normalise


class ResidualBlock(nn.Module):
    """h + conv(SiLU(conv(SiLU(h)))), with a 1x1 convolution on the shortcut where the width changes. No norm layer."""

    def __init__(self, narrow: int, wide: int):
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1)
        self.shortcut = nn.Identity() if narrow == wide else nn.Conv2d(narrow, wide, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.shortcut(h) + self.conv2(F.silu(self.conv1(F.silu(h))))


class ResNetEnergyFunction(BaseEnergyFunction):
    """E(x) of images (B, channels, height, width): a stage of `blocks` residual blocks a feature width, halving the
    resolution after each, features summed over space, a linear head with a learned scale. Any size from 8x8 up."""

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        features: Sequence[int] = (48, 96, 96),
        blocks: int = 1,
        spectral_norm: bool = True,
        *,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.shape = (channels, height, width)
        self.stem = nn.Conv2d(channels, features[0], 3, padding=1)
        widths = [features[0], *features]
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(narrow if i == 0 else wide, wide) for i in range(blocks)))
            for narrow, wide in zip(widths, features, strict=False)
        )
        self.head = EnergyHead(features[-1], num_classes)
        if spectral_norm:
            spectrally_normalise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.stem(require_batch(x, self.shape))
        for stage in self.stages:
            h = stage(h)
            if min(h.shape[2:]) > 1:
                h = F.avg_pool2d(h, 2, ceil_mode=True)
        return self.head(F.silu(h).float().sum((2, 3)), y)
