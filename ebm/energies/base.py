"""What every energy shares: the contract, the head, spectral normalisation."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ebm.errors import ConfigError

NORMALISED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class BaseEnergyFunction(nn.Module, ABC):
    """An unnormalised density: p(x) is proportional to exp(-E(x) / T). A subclass needs `forward` alone."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Energies (B,) in float32 of states (B, *shape). A class-conditional energy takes labels (B,) as well."""

    def gradient(self, x: Tensor, *labels: Tensor) -> Tensor:
        """dE/dx, (B, *shape): minus the score of the density at temperature 1."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self(x, *labels).sum(), x)[0]


def require_batch(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x`, if it is (B, *shape). An image without its batch dimension is refused, since a guess may be wrong."""
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; this energy takes (batch, {', '.join(map(str, shape))})"
            + ("; add the batch dimension: x[None]" if tuple(x.shape) == tuple(shape) else "")
        )
    return x


class EnergyHead(nn.Module):
    """Features (B, D) -> energies (B,), float32 whatever the autocast type: `scale * (w h + b)`, and for a class
    condition the projection `+ <embedding(y), h>` (Miyato & Koyama 2018, eq. 3). `scale` is learned."""

    def __init__(self, dim: int, num_classes: int | None = None):
        super().__init__()
        self.linear = nn.Linear(dim, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.classes = nn.Embedding(num_classes, dim) if num_classes else None

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if (y is None) != (self.classes is None):
            raise ValueError("labels y go with num_classes: give both or neither")
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            energy = self.linear(h).squeeze(1)
            if y is not None:
                energy = energy + (self.classes(y) * h).sum(1)
            return self.scale * energy


def spectrally_normalise(module: nn.Module) -> nn.Module:
    """Give every linear, convolutional and embedding weight, seen as a matrix (out, rest), a largest singular value
    of 1 by power iteration at each forward in training mode (Miyato et al. 2018, algorithm 1). In place."""
    for layer in list(module.modules()):
        if isinstance(layer, NORMALISED):
            parametrizations.spectral_norm(layer, "weight", n_power_iterations=1)
    return module


def refuse_mixing_layers(energy: nn.Module, where: str) -> nn.Module:
    """`energy`, unless it holds a layer through which one sample's energy depends on the others or on chance."""
    for name, layer in energy.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}: it makes the energy of an image depend on "
                "the others in its batch; use GroupNorm, LayerNorm or spectral normalisation"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}: it makes the energy random, while chains "
                "sample the one without it; use weight decay or spectral normalisation"
            )
    return energy
