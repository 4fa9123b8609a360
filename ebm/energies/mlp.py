"""The plain energy: a multilayer perceptron on vectors or flattened images."""

from itertools import pairwise

from torch import Tensor, nn

from ebm.energies.network import NetworkEnergy, make_activation


class MLPEnergyFunction(NetworkEnergy):
    """E(x) of (B, input_dim), or of any (B, *shape) with input_dim elements, by layers of `hidden_dim`. `options`:
    spectral_norm, num_classes, confine (NetworkEnergy.finish)."""

    def __init__(
        self, input_dim: int = 2, hidden_dim: int = 64, num_layers: int = 2, *, activation: str = "silu", **options
    ):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * num_layers
        layers = [m for a, b in pairwise(dims) for m in (nn.Linear(a, b), make_activation(activation))]
        self.input_dim = input_dim
        self.body = nn.Sequential(*layers)
        self.finish(hidden_dim, **options)

    def features(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) if x.ndim > 1 else x
        if flat.ndim != 2 or flat.shape[1] != self.input_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; this energy takes (batch, {self.input_dim})")
        return self.body(flat)
