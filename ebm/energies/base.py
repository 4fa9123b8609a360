"""The contract of an energy, the arithmetic of energies (sums, weights and mixtures), and the noise level as a further
input: E(x, t) for data with Gaussian noise of variance t.

A state may carry its level along: (C + 1, H, W), or (D + 1,) for a vector, whose last plane holds log t. Chains,
buffers and losses pass such states on as they pass any other."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

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


PLANES = 8  # of sines and cosines of log t that the network sees beside the state
MAX_FULL = 1024  # components up to which the data's whole covariance is kept
FREQUENCIES = (0.2, 1.5)  # in radians per unit of log t; a range of variances of 1 to 1000 spans 7 units


def with_noise_level(x: Tensor, log_variance: Tensor) -> Tensor:
    """States (B, *shape) and levels (B,) in one tensor, with one plane more than `x`."""
    level = log_variance.view(-1, *[1] * (x.ndim - 1)).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, level.to(x.dtype)], 1)


def split_noise_level(z: Tensor) -> tuple[Tensor, Tensor]:
    """The states (B, *shape) and levels (B,) of `with_noise_level`."""
    return z[:, :-1], z[:, -1].flatten(1)[:, 0] if z.ndim > 2 else z[:, -1]


class NoiseConditionalEnergy(BaseEnergyFunction):
    """E(x, t) = -log N(x; m, C + t I) + s sqrt(D / t) / 2 f((x - m) / sqrt(s^2 + t), t).

    The first term is the normalised energy of the data's Gaussian with noise of variance t; the network f says what
    differs. `fit` takes m and C from data. Before, m = 0 and C = s^2 I, and C stays so with more than MAX_FULL
    components. The factor makes an f whose gradient is of order 1 give scores of order sqrt(D / t), as denoising needs
    at every level (Karras et al. 2022, table 1).

    `forward` takes states (B, *shape), whose level is the lowest, or states that carry their levels along. So the
    energy scores, samples and composes as the density of data with noise `sigma_min`.

    Args:
        network: takes (B, C + PLANES, H, W), or (B, D + PLANES).
        shape: of a state without its level.
        sigma_min, sigma_max: range of the noise's standard deviation, in units of x.
        data_std: s, about the standard deviation of the data.
        initialiser: what `propose` asks, (B, C + PLANES + num_classes, H, W) -> (B, C, H, W), or the same of vectors.
    """

    frequencies: Tensor
    mean: Tensor  # shape of a state
    variances: Tensor  # eigenvalues of C, (D,)
    basis: Tensor  # its eigenvectors in columns, (D, D); empty where C is s^2 I

    def __init__(
        self,
        network: BaseEnergyFunction,
        shape: tuple[int, ...],
        sigma_min: float = 0.1,
        sigma_max: float = 3.0,
        data_std: float = 0.7,
        initialiser: nn.Module | None = None,
    ):
        super().__init__()
        self.initialiser = initialiser
        self.network, self.num_classes, self.planes = network, network.num_classes, shape[0]
        self.log_variances = (2 * math.log(sigma_min), 2 * math.log(sigma_max))
        self.data_variance, self.dim = data_std**2, math.prod(shape)
        self.register_buffer("frequencies", torch.linspace(*FREQUENCIES, PLANES // 2), persistent=False)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variances", torch.full((self.dim,), self.data_variance))
        self.register_buffer("basis", torch.eye(self.dim if self.dim <= MAX_FULL else 0))
        _initialise(network)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and covariance of the Gaussian term from data (N, *shape)."""
        flat = x.flatten(1).double()
        self.mean.copy_(flat.mean(0).view_as(self.mean))
        if len(self.basis):
            values, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(self.dim, self.dim))
            self.variances.copy_(values.clamp(min=0))
            self.basis.copy_(vectors)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None and self.num_classes:  # the factor is outside of each class's f, so the sum over classes is too
            return marginal_energy(self.class_energies(x))
        gaussian, scale, inputs = self._terms(x)
        return gaussian + scale * self.network(inputs, *(() if y is None else (y,)))

    def class_energies(self, x: Tensor) -> Tensor:
        gaussian, scale, inputs = self._terms(x)
        return gaussian[:, None] + scale[:, None] * self.network.class_energies(inputs)

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The Gaussian's energies (B,), the network's factors (B,), and the network's input."""
        if x.shape[1] == self.planes:
            level = x.new_full((len(x),), self.log_variances[0])
        else:
            x, level = split_noise_level(x)
        centred = x - self.mean
        along = centred.flatten(1) @ self.basis if len(self.basis) else centred.flatten(1)
        spread = self.variances + level.exp()[:, None]
        gaussian = (along.square() / spread + (2 * math.pi * spread).log()).sum(1) / 2
        total = level.exp() + self.data_variance
        scale = (self.dim * self.data_variance / 4) ** 0.5 * (-level / 2).exp()
        return gaussian, scale, self._seen(centred, level, total)

    def _seen(self, centred: Tensor, level: Tensor, total: Tensor) -> Tensor:
        """A network's input: states less their mean, divided by the root of their variance `total`, and waves of their
        level."""
        over = [1] * (centred.ndim - 1)
        angles = level[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], 1).view(-1, PLANES, *over[1:])
        waves = waves.expand(-1, -1, *centred.shape[2:])
        return torch.cat([centred / total.sqrt().view(-1, *over), waves.to(centred.dtype)], 1)

    def noisiest(self, z: Tensor) -> Tensor:
        """Draws of the Gaussian term at the highest level, N(m, C + sigma_max^2 I), from `z` (B, *shape) of N(0, I)."""
        along = z.flatten(1) * (self.variances + math.exp(self.log_variances[1])).sqrt()
        return self.mean + (along @ self.basis.T if len(self.basis) else along).view_as(z)

    def propose(self, x: Tensor, level: Tensor, spacing: float, y: Tensor | None = None) -> Tensor:
        """The mean, (B, *shape), of the initialiser's states at log variances `level` (B,), given states `x` that have
        the log variances `level + spacing` (CDRL, Zhu et al. 2023). A class-conditional energy needs labels `y` (B,).

        A datum a and its noisier state x leave N((1 - r) a + r x, (1 - r) s I) for the state in between, with
        s = exp(level) and r = exp(-spacing). The initialiser says what a is: a = m + v / (t + v) (x - m) +
        sqrt(v t / (t + v)) g, with the data's variance v and t = s / r, so that a g of order 1 does at every level
        (Karras et al. 2022, table 1) and g = 0 is right for Gaussian data.
        """
        assert self.initialiser is not None, "the config asks for it"
        over = [1] * (x.ndim - 1)
        centred, upper = x - self.mean, level + spacing
        total = upper.exp() + self.data_variance
        seen = self._seen(centred, upper, total)
        if self.num_classes:
            assert y is not None, "chains of classes have labels"
            of_class = torch.arange(self.num_classes, device=y.device) == y[:, None]  # one_hot() waits for the device
            seen = torch.cat([seen, of_class.to(x.dtype).view(len(x), -1, *over[1:]).expand(-1, -1, *x.shape[2:])], 1)
        kept = (self.data_variance / total).view(-1, *over)
        scale = kept.sqrt() * (upper / 2).exp().view(-1, *over)
        clean = self.mean + kept * centred + scale * self.initialiser(seen)
        return torch.lerp(clean, x, math.exp(-spacing))


def conditioned_on_noise(energy: Callable[..., Tensor]) -> NoiseConditionalEnergy:
    """`energy`, which must be conditional on the noise level. Raises ValueError for any other."""
    if not isinstance(energy, NoiseConditionalEnergy):
        raise ValueError(f"{type(energy).__name__} does not take a noise level: set energy.noise_conditional={{}}")
    return energy


def _initialise(network: nn.Module) -> None:
    """Initial weights of variance 2 / inputs (He et al. 2015), in place of torch's 1 / (3 inputs).

    What the Gaussian leaves to the network has no linear or quadratic part. With torch's weights a new network has
    nothing else, since its activations stay where SiLU is nearly linear, and does not learn in a thousand steps.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not parametrize.is_parametrized(layer):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
