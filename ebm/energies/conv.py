"""A small convolutional energy, for images of any size from 8x8 up."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ebm.energies.base import require_batch
from ebm.energies.network import NetworkEnergy, make_activation


class ConvolutionalEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width): 3x3 convolutions, all but the first of stride 2, then two layers.

    A stride-2 layer takes a side s to ceil(s / 2), so every size works; the head's width is computed from it.
    `options`: spectral_norm, num_classes, confine (NetworkEnergy.finish).
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 28,
        height: int = 28,
        features: Sequence[int] = (16, 32, 32, 64),
        hidden_dim: int = 64,
        *,
        activation: str = "silu",
        **options,
    ):
        super().__init__()
        self.shape = (channels, height, width)
        layers = [nn.Conv2d(channels, features[0], 3, padding=1), make_activation(activation)]
        h, w = height, width
        for narrow, wide in pairwise(features):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), make_activation(activation)]
            h, w = -(-h // 2), -(-w // 2)
        layers += [nn.Flatten(), nn.Linear(features[-1] * h * w, hidden_dim), make_activation(activation)]
        self.body = nn.Sequential(*layers)
        self.finish(hidden_dim, **options)

    def features(self, x: Tensor) -> Tensor:
        return self.body(require_batch(x, self.shape))
