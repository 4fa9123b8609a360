"""The contract of an energy, and the arithmetic of energies: sums, weights and mixtures."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import cast

import torch
from torch import Tensor, nn

# The contract


class BaseEnergyFunction(nn.Module, ABC):
    """An unnormalised density: p(x) is proportional to exp(-E(x) / T). A subclass only has to define `forward`.

    Energies can be combined: `a + b` (a product of experts), `a - b`, `-a`, `w * a` and `a / w` are energies that share
    the modules of their parts. `w` is a number; in `w * a` it may also be an nn.Parameter, which is then learned.
    """

    num_classes: int | None = None  # number of classes of a conditional energy, whose forward takes (x, y)
    __call__: Callable[..., Tensor]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Energies (B,) in float32 of states (B, *shape). A class-conditional energy takes labels (B,) as well."""

    def gradient(self, x: Tensor, *labels: Tensor) -> Tensor:
        """dE/dx, (B, *shape): minus the score of the density at temperature 1."""
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self(x, *labels).sum(), x)[0]

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes). This version runs one forward a class; a subclass may override
        it with something faster. Raises ValueError if the energy has no classes."""
        if not self.num_classes:
            raise ValueError("class_energies: this energy has no classes; give it num_classes")
        each = (self(x, torch.full((len(x),), y, device=x.device)) for y in range(self.num_classes))
        return torch.stack(list(each), 1)

    def marginal(self, x: Tensor) -> Tensor:
        """-log sum_y exp(-E(x, y)), (B,): the energy of x whatever its class."""
        return marginal_energy(self.class_energies(x))

    def __add__(self, other: "BaseEnergyFunction") -> "BaseEnergyFunction":
        return plus(self, other) if isinstance(other, BaseEnergyFunction) else NotImplemented

    def __radd__(self, other: object) -> "BaseEnergyFunction":
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


def marginal_energy(class_energies: Tensor) -> Tensor:
    """-log sum_y exp(-E(x, y)), (B,), from E(x, y) of every class, (B, num_classes) (Grathwohl et al. 2020, eq. 6)."""
    return -torch.logsumexp(-class_energies, 1)


def require_batch(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns `x` if it is (B, *shape). Raises ValueError otherwise, also for one state without its batch dimension:
    adding that dimension would be a guess, and a wrong one for some shapes."""
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; this energy takes (batch, {', '.join(map(str, shape))})"
            + ("; add the batch dimension: x[None]" if tuple(x.shape) == tuple(shape) else "")
        )
    return x


def device_of(energy: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for an energy that has none."""
    return next((t.device for t in (*energy.parameters(), *energy.buffers())), torch.device("cpu"))


# Energies made of energies


class Composition(BaseEnergyFunction):
    """An elementwise function of the energies of several parts. A subclass defines the function, `combine`.

    Labels go to the class-conditional parts; every other part has one energy for all classes. Without labels the result
    is the marginal over the classes of the whole, which is not the composition of the parts' marginals.
    """

    def __init__(self, energies: Sequence[BaseEnergyFunction]):
        super().__init__()
        self.energies = nn.ModuleList(energies)
        classes = {e.num_classes for e in energies if e.num_classes}
        if len(classes) > 1:
            raise ValueError(f"energies of {', '.join(map(str, sorted(classes)))} classes can't be composed")
        self.num_classes = classes.pop() if classes else None

    @property
    def parts(self) -> list[BaseEnergyFunction]:
        """The energies that this one is made of, in order."""
        return [cast(BaseEnergyFunction, energy) for energy in self.energies]

    @abstractmethod
    def combine(self, values: list[Tensor]) -> Tensor:
        """The energy of the whole from the energies of the parts: each (B,), or, when all classes are asked for,
        (B, num_classes) or (B, 1)."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None and not self.num_classes:
            raise ValueError("labels y go with num_classes: no part of this energy has any")
        if y is None and self.num_classes:
            return self.marginal(x)
        return self.combine([e(x, y) if e.num_classes else e(x) for e in self.parts])

    def class_energies(self, x: Tensor) -> Tensor:
        if not self.num_classes:
            return super().class_energies(x)  # raises the error that says what is missing
        return self.combine([e.class_energies(x) if e.num_classes else e(x)[:, None] for e in self.parts])


class WeightedSum(Composition):
    """sum_i w_i E_i(x): the density is the product of the parts' densities to the powers w_i (Hinton 2002).

    Each weight is a finite number, kept as a buffer, or an nn.Parameter without dimensions, which is learned.
    """

    def __init__(self, energies: Sequence[BaseEnergyFunction], weights: Sequence[float | Tensor]):
        super().__init__(energies)
        for i, (energy, weight) in enumerate(zip(energies, weights, strict=True)):
            if not isinstance(weight, nn.Parameter):
                weight = torch.as_tensor(weight, dtype=torch.float32).to(device_of(energy))
            if weight.ndim or not weight.isfinite():
                raise ValueError(f"an energy can be multiplied by one finite number, not by {weight}")
            if isinstance(weight, nn.Parameter):
                self.register_parameter(f"weight_{i}", weight)
            else:
                self.register_buffer(f"weight_{i}", weight)

    @property
    def weights(self) -> list[Tensor]:
        """The weight of each part, a tensor without dimensions."""
        return [getattr(self, f"weight_{i}") for i in range(len(self.energies))]

    def combine(self, values: list[Tensor]) -> Tensor:
        return reduce(add, [weight * value for weight, value in zip(self.weights, values, strict=True)])


class MixtureEnergy(Composition):
    """-log sum_i w_i exp(-E_i(x)): the density is proportional to sum_i w_i Z_i p_i, where Z_i is the normaliser of
    part i. The share of part i is therefore w_i only if all parts have the same normaliser.

    `weights` (K,): finite numbers above 0, equal by default. A buffer keeps their logarithms.
    """

    log_weights: Tensor

    def __init__(self, energies: Sequence[BaseEnergyFunction], weights: Tensor | Sequence[float] | None = None):
        super().__init__(energies)
        count = len(energies)
        shares = torch.as_tensor([1 / count] * count if weights is None else weights).double()
        if shares.shape != (count,) or not (shares > 0).all() or not shares.isfinite().all():
            raise ValueError(f"weights={shares.tolist()} must be {count} finite numbers above 0, one an energy")
        self.register_buffer("log_weights", shares.log().float().to(device_of(self)))

    def combine(self, values: list[Tensor]) -> Tensor:
        weighted = [weight - value for weight, value in zip(self.log_weights, values, strict=True)]
        widest = max(weighted, key=Tensor.numel)  # a part without classes is (B, 1) beside (B, num_classes)
        return -torch.logsumexp(torch.stack([value.expand_as(widest) for value in weighted]), 0)


def mixture(energies: Sequence[BaseEnergyFunction], weights: Tensor | Sequence[float] | None = None) -> MixtureEnergy:
    """The mixture of `energies`, with equal weights by default: see MixtureEnergy."""
    return MixtureEnergy(energies, weights)


def plus(a: BaseEnergyFunction, b: BaseEnergyFunction) -> WeightedSum:
    """a + b. The terms of a sum become terms of the new sum, so that a sum of many energies is one level deep."""
    energies, weights = zip(*_terms(a), *_terms(b), strict=True)
    return WeightedSum(energies, weights)


def _terms(energy: BaseEnergyFunction) -> list[tuple[BaseEnergyFunction, float | Tensor]]:
    # A subclass of WeightedSum, such as the hybrid, stays whole: it has properties of its own.
    if type(energy) is WeightedSum:
        return list(zip(energy.parts, energy.weights, strict=True))
    return [(energy, 1.0)]
