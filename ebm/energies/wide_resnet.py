"""JEM's wide ResNet (Grathwohl et al. 2020): WRN-depth-widen (Zagoruyko & Komodakis 2016) without normalisation."""

from torch import Tensor, nn

from ebm.energies.base import require_batch
from ebm.energies.network import NetworkEnergy, make_activation, sum_over
from ebm.energies.resnet import ResidualBlock


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
