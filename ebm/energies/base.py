"""What every energy shares: the contract, its arithmetic, and what is refused."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm.errors import ConfigError


class BaseEnergyFunction(nn.Module, ABC):
    """An unnormalised density: p(x) is proportional to exp(-E(x) / T). A subclass needs `forward` alone.

    Energies are values: `a + b` (a product of experts), `a - b`, `-a`, `w * a` and `a / w` are energies again, of the
    same modules (ebm.energies.base). `w` is a number, or in `w * a` an nn.Parameter, which is then learned.
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

        return plus(self, other) if isinstance(other, BaseEnergyFunction) else NotImplemented

    def __radd__(self, other) -> "BaseEnergyFunction":
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum() begins with 0

    def __mul__(self, weight: float | Tensor) -> "BaseEnergyFunction":

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


class Composition(BaseEnergyFunction):
    """A function of the energies of `energies`, elementwise: a subclass has `combine`.

    Labels go to the class-conditional parts; the others have one energy for all classes. Without labels the result is
    the marginal over the classes of the whole, not the composition of marginals.
    """

    def __init__(self, energies: Sequence[BaseEnergyFunction]):
        super().__init__()
        self.energies = nn.ModuleList(energies)
        classes = {e.num_classes for e in energies if e.num_classes}
        if len(classes) > 1:
            raise ValueError(f"energies of {', '.join(map(str, sorted(classes)))} classes can't be composed")
        self.num_classes = classes.pop() if classes else None

    @abstractmethod
    def combine(self, values: list[Tensor]) -> Tensor:
        """One energy of the parts' energies, each (B,) or, where all classes are asked for, (B, num_classes or 1)."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None and not self.num_classes:
            raise ValueError("labels y go with num_classes: no part of this energy has any")
        if y is None and self.num_classes:
            return self.marginal(x)
        return self.combine([e(x, y) if e.num_classes else e(x) for e in self.energies])

    def class_energies(self, x: Tensor) -> Tensor:
        if not self.num_classes:
            return super().class_energies(x)  # which says what is missing
        return self.combine([e.class_energies(x) if e.num_classes else e(x)[:, None] for e in self.energies])


class WeightedSum(Composition):
    """sum_i w_i E_i(x): a product of the densities' powers (Hinton 2002). A weight is a finite number, kept as a
    buffer, or an nn.Parameter of no dimension, which is learned."""

    def __init__(self, energies: Sequence[BaseEnergyFunction], weights: Sequence[float | Tensor]):
        super().__init__(energies)
        for i, (energy, weight) in enumerate(zip(energies, weights, strict=True)):
            learned = isinstance(weight, nn.Parameter)
            weight = weight if learned else torch.as_tensor(weight, dtype=torch.float32).to(device_of(energy))
            if weight.ndim or not weight.isfinite():
                raise ValueError(f"an energy can be multiplied by one finite number, not by {weight}")
            (self.register_parameter if learned else self.register_buffer)(f"weight_{i}", weight)

    @property
    def weights(self) -> list[Tensor]:
        return [getattr(self, f"weight_{i}") for i in range(len(self.energies))]

    def combine(self, values: list[Tensor]) -> Tensor:
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


class MixtureEnergy(Composition):
    """-log sum_i w_i exp(-E_i(x)): the density is proportional to sum_i w_i Z_i p_i, so the share of part i is w_i only
    where all parts have the same normaliser Z_i. Weights (K,) above 0; kept as logarithms, in a buffer."""

    def __init__(self, energies: Sequence[BaseEnergyFunction], weights: Sequence[float] | None = None):
        super().__init__(energies)
        weights = torch.as_tensor([1 / len(energies)] * len(energies) if weights is None else weights).double()
        if weights.shape != (len(energies),) or not (weights > 0).all() or not weights.isfinite().all():
            raise ValueError(
                f"weights={weights.tolist()} must be {len(energies)} finite numbers above 0, one an energy"
            )
        self.register_buffer("log_weights", weights.log().float().to(device_of(self)))

    def combine(self, values: list[Tensor]) -> Tensor:
        weighted = [weight - value for weight, value in zip(self.log_weights, values, strict=True)]
        return -torch.logsumexp(torch.stack(torch.broadcast_tensors(*weighted)), 0)


def mixture(energies: Sequence[BaseEnergyFunction], weights: Sequence[float] | None = None) -> MixtureEnergy:
    """The mixture of `energies`: see MixtureEnergy. Equal weights by default."""
    return MixtureEnergy(energies, weights)


def plus(a: BaseEnergyFunction, b: BaseEnergyFunction) -> WeightedSum:
    """a + b, with the terms of sums side by side, so that a sum of many is one level deep."""
    energies, weights = zip(*_terms(a), *_terms(b), strict=True)
    return WeightedSum(energies, weights)


def _terms(energy: BaseEnergyFunction) -> list[tuple[BaseEnergyFunction, float | Tensor]]:
    flat = type(energy) is WeightedSum
    return list(zip(energy.energies, energy.weights, strict=True)) if flat else [(energy, 1.0)]


def device_of(energy: nn.Module) -> torch.device:
    return next((t.device for t in (*energy.parameters(), *energy.buffers())), torch.device("cpu"))
