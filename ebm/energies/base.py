"""What every energy shares: the contract, its arithmetic, and what is refused."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ebm.errors import ConfigError


class BaseEnergyFunction(nn.Module, ABC):
    """An unnormalised density: p(x) is proportional to exp(-E(x) / T). A subclass needs `forward` alone.

    Energies are values: `a + b` (a product of experts), `a - b`, `-a`, `w * a` and `a / w` are energies again, of the
    same modules (ebm.energies.composition). `w` is a number, or in `w * a` an nn.Parameter, which is then learned.
    """

    num_classes: int | None = None  # of a class-conditional energy, whose forward takes (x, y)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Energies (B,) in float32 of states (B, *shape). A class-conditional energy takes labels (B,) as well."""

    def gradient(self, x: Tensor, *labels: Tensor) -> Tensor:
        """dE/dx, (B, *shape): minus the score of the density at temperature 1."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self(x, *labels).sum(), x)[0]

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes): a forward a class, where a subclass knows no faster way."""
        if not self.num_classes:
            raise ValueError("class_energies: this energy has no classes; give it num_classes")
        each = (self(x, torch.full((len(x),), y, device=x.device)) for y in range(self.num_classes))
        return torch.stack(list(each), 1)

    def marginal(self, x: Tensor) -> Tensor:
        """-log sum_y exp(-E(x, y)), (B,): the energy of x whatever its class (Grathwohl et al. 2020, eq. 6)."""
        return -torch.logsumexp(-self.class_energies(x), 1)

    def __add__(self, other: "BaseEnergyFunction") -> "BaseEnergyFunction":
        from ebm.energies.composition import plus  # which is made of subclasses of this class

        return plus(self, other) if isinstance(other, BaseEnergyFunction) else NotImplemented

    def __radd__(self, other) -> "BaseEnergyFunction":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum() begins with 0

    def __mul__(self, weight: float | Tensor) -> "BaseEnergyFunction":
        from ebm.energies.composition import WeightedSum

        return NotImplemented if isinstance(weight, nn.Module) else WeightedSum([self], [weight])

    __rmul__ = __mul__

    def __truediv__(self, weight: float) -> "BaseEnergyFunction":
        return NotImplemented if isinstance(weight, nn.Module | nn.Parameter) else self * (1 / weight)

    def __neg__(self) -> "BaseEnergyFunction":
        return self * -1.0

    def __sub__(self, other: "BaseEnergyFunction") -> "BaseEnergyFunction":
        return self + -other if isinstance(other, BaseEnergyFunction) else NotImplemented


def require_batch(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x`, if it is (B, *shape). A state without its batch dimension is refused, since a guess may be wrong."""
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; this energy takes (batch, {', '.join(map(str, shape))})"
            + ("; add the batch dimension: x[None]" if tuple(x.shape) == tuple(shape) else "")
        )
    return x


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
