"""A small convolutional energy, for images of any size from 8x8 up."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ebm.energies.base import BaseEnergyFunction, EnergyHead, require_batch, spectrally_normalise


class ConvolutionalEnergyFunction(BaseEnergyFunction):
    """E(x) of images (B, channels, height, width): 3x3 convolutions, all but the first of stride 2, then two layers.

    A stride-2 layer takes a side s to ceil(s / 2), so every size works; the head's width is computed from it.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 28,
        height: int = 28,
        features: Sequence[int] = (16, 32, 32, 64),
        hidden_dim: int = 64,
        *,
        spectral_norm: bool = False,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.shape = (channels, height, width)
        layers, h, w = [nn.Conv2d(channels, features[0], 3, padding=1), nn.SiLU()], height, width
        for narrow, wide in pairwise(features):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.SiLU()]
            h, w = -(-h // 2), -(-w // 2)
        layers += [nn.Flatten(), nn.Linear(features[-1] * h * w, hidden_dim), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = EnergyHead(hidden_dim, num_classes)
        if spectral_norm:
            spectrally_normalise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(self.body(require_batch(x, self.shape)), y)
