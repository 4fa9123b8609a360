"""The plain energy: a multilayer perceptron on vectors or flattened images."""

from itertools import pairwise

from torch import Tensor, nn

from ebm.energies.base import BaseEnergyFunction, EnergyHead, spectrally_normalise


class MLPEnergyFunction(BaseEnergyFunction):
    """E(x) of (B, input_dim), or of any (B, *shape) with input_dim elements, by SiLU layers of `hidden_dim`."""

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = 64,
        num_layers: int = 2,
        *,
        spectral_norm: bool = False,
        num_classes: int | None = None,
    ):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * num_layers
        layers = [m for a, b in pairwise(dims) for m in (nn.Linear(a, b), nn.SiLU())]
        self.input_dim = input_dim
        self.body = nn.Sequential(*layers)
        self.head = EnergyHead(hidden_dim, num_classes)
        if spectral_norm:
            spectrally_normalise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = x.flatten(1) if x.ndim > 1 else x
        if x.ndim != 2 or x.shape[1] != self.input_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; this energy takes (batch, {self.input_dim})")
        return self.head(self.body(x), y)
