"""Energies made of energies: sums, differences, multiples, mixtures, and the hybrid of a prior and a network.

The parts are registered modules, shared and not copied: `FoldedEnergy`, spectral norm, optimizers and checkpoints see
their parameters and buffers.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm.energies.analytic import GaussianEnergy
from ebm.energies.base import BaseEnergyFunction
from ebm.energies.mlp import MLPEnergyFunction


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
            weight = weight if learned else torch.as_tensor(weight, dtype=torch.float32).to(_device(energy))
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
        self.register_buffer("log_weights", weights.log().float().to(_device(self)))

    def combine(self, values: list[Tensor]) -> Tensor:
        weighted = [weight - value for weight, value in zip(self.log_weights, values, strict=True)]
        return -torch.logsumexp(torch.stack(torch.broadcast_tensors(*weighted)), 0)


class HybridEnergyFunction(WeightedSum):
    """E(x) = E_prior(x) + w E_network(x), with w learned: p(x) is the prior's density, tilted by the network.

    The prior stands as it is. In alpha E_prior + (1 - alpha) E_network, a form one meets often, alpha is an inverse
    temperature: learning it heats the prior to 1 / alpha, and what was put in as knowledge does not hold any more. Here
    the network has to say what differs, and where it says nothing (w E_network = constant) the density is the prior's.

    `prior`: N(0, I) in `input_dim` dimensions by default. `network`: an MLP of `num_layers` of `hidden_dim` by default.
    """

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = 64,
        num_layers: int = 2,
        *,
        prior: BaseEnergyFunction | None = None,
        network: BaseEnergyFunction | None = None,
        weight: float = 1.0,
    ):
        prior = GaussianEnergy(torch.zeros(input_dim), 1.0) if prior is None else prior
        network = MLPEnergyFunction(input_dim, hidden_dim, num_layers) if network is None else network
        super().__init__([prior, network], [1.0, nn.Parameter(torch.tensor(float(weight), device=_device(network)))])

    @property
    def prior(self) -> BaseEnergyFunction:
        return self.energies[0]

    @property
    def network(self) -> BaseEnergyFunction:
        return self.energies[1]


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


def _device(energy: nn.Module) -> torch.device:
    return next((t.device for t in (*energy.parameters(), *energy.buffers())), torch.device("cpu"))
