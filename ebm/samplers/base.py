"""What all samplers share: where chains start, evaluating an energy, keeping states inside bounds, and the account of a
chain."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ebm.config.samplers import check_interval
from ebm.streams import Generators, normal_, uniform_

Energy = Callable[[Tensor], Tensor]  # states (B, *shape) -> energies (B,)
Bounds = tuple[float, float] | None
COMPONENTS = 10  # of a mixture for chains without classes
FACTORS = 32  # of each of its Gaussians, at most
LARGEST = 1 << 24  # numbers in the factors of a mixture, at most
Info = TypeVar("Info", bound=tuple[Tensor, ...])  # a named tuple of scalars: what happened in a chain


class ChainInfo(NamedTuple):
    """What happened in a chain. Each value is a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # norm of dE/dx at the last step, before the clamp
    displacement: Tensor  # norm of x_K - x_0
    saturated: Tensor  # share of components that end at a bound


@dataclass(frozen=True)
class MixtureStart:
    """Initial states from a mixture of K Gaussians that was fitted to data, each a probabilistic PCA: a mean, R factors
    and a variance for what they leave (Tipping & Bishop 1999, eq. 6). Chains with a class start in its components."""

    shares: Tensor  # (K,) float32, of sum 1
    classes: Tensor  # (K,) int64: whose data a component was fitted to; without classes all are 0
    means: Tensor  # (K, D) float32
    factors: Tensor  # (K, D, R) float32
    rest: Tensor  # (K,) float32: standard deviation of what the factors leave
    bounds: Bounds = None  # draws beyond are clamped

    @classmethod
    def empty(cls, dim: int, classes: int | None, bounds: Bounds) -> "MixtureStart":
        """A mixture of the right size, of zeros: a component a class, or COMPONENTS without classes."""
        count = classes or COMPONENTS
        rank = min(FACTORS, dim - 1, LARGEST // (count * dim))
        sizes = ("shares", (count,)), ("means", (count, dim)), ("factors", (count, dim, rank))
        numbers = torch.arange(count) if classes else torch.zeros(count, dtype=torch.int64)
        tensors = {name: torch.zeros(size) for name, size in (*sizes, ("rest", (count,)))}
        return cls(classes=numbers, bounds=bounds, **tensors)

    def to(self, device: torch.device | str) -> "MixtureStart":
        return MixtureStart(**{name: tensor.to(device) for name, tensor in self.tensors().items()}, bounds=self.bounds)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if name != "bounds"}

    def fill_(self, x: Tensor, generators: Generators, labels: Tensor | None = None) -> Tensor:
        """Fills a dense `x` (B, ...) in place; a row holds D values, or those of several replicas of a chain. `labels`
        (B,): the classes of the chains."""
        dim, rank = self.factors.shape[1:]
        flat = x.view(len(x), -1, dim)
        pick = uniform_(flat.new_empty(flat.shape[:2]), generators)
        z = normal_(flat.new_empty(*flat.shape[:2], rank), generators)
        normal_(flat, generators)
        shares = self.shares.expand(len(x), -1)
        if labels is not None:
            own = shares * (self.classes == labels.unsqueeze(1))
            shares = torch.where(own.sum(1, keepdim=True) > 0, own, shares)
            shares = shares / shares.sum(1, keepdim=True)
        ends = shares.cumsum(1).unsqueeze(1)
        component = (pick.unsqueeze(2) >= ends).sum(2).clamp(max=len(self.shares) - 1).unsqueeze(2)
        drawn = torch.zeros_like(flat)
        for k in range(len(self.shares)):  # without a gather of (B, D, R), nor a host read
            drawn = torch.where(component == k, self.means[k] + z @ self.factors[k].T + self.rest[k] * flat, drawn)
        low, high = self.bounds or (-math.inf, math.inf)
        return x.copy_(drawn.clamp_(low, high).view(x.shape))


Start = tuple[float, float] | MixtureStart | None  # an interval, a mixture, or N(0, 1)


def initial_(x: Tensor, generators: Generators, start: Start, labels: Tensor | None = None) -> Tensor:
    """Fills a dense `x` (B, ...) in place with initial states of chains, whose classes are `labels` (B,)."""
    if isinstance(start, MixtureStart):
        return start.fill_(x, generators, labels)
    return normal_(x, generators) if start is None else uniform_(x, generators, *start)


def evaluate(energy: Energy, x: Tensor, grad_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """E (B,) float32 and dE/dx (B, *shape) at `x`, both detached; `x` itself is left alone.

    E is multiplied by `grad_scale` before the gradient is taken, and dE/dx is divided by it, so that float16 gradients
    do not underflow.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        energies = energy(x)
        # The gradient of their sum, without the sum: two launches less.
        (grad,) = torch.autograd.grad(energies, x, torch.full_like(energies, grad_scale))
    return energies.detach().float(), grad if grad_scale == 1 else grad / grad_scale


def dense(x: Tensor) -> Tensor:
    """A float32 copy of `x`, channels last for images.

    For a single channel `contiguous(memory_format=...)` leaves strides that are ambiguous, and convolutions then change
    layouts back and forth. The strides of this copy are those of channels last for any number of channels.
    """
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=layout).copy_(x)


def describe(start: Tensor, x: Tensor, grad: Tensor, bounds: Bounds) -> ChainInfo:
    """The account of a chain from `start` to `x`, with the gradient `grad` of its last step."""
    grad_norm, displacement = (value.flatten(1).norm(dim=1).mean() for value in (grad, x - start))
    return ChainInfo(grad_norm, displacement, saturated(x, bounds))


def saturated(x: Tensor, bounds: Bounds) -> Tensor:
    """The share of components of `x` at a bound or beyond it, a scalar; 0 without bounds."""
    if bounds is None:
        return x.new_zeros(())
    return ((x <= bounds[0]) | (x >= bounds[1])).mean(dtype=torch.float32)


def mean_info(infos: Sequence[Info]) -> Info:
    """The mean of each value over several chains."""
    return type(infos[0])(*map(mean, zip(*infos, strict=True)))


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of scalar tensors; one is its own mean, without a launch."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean()


def per_step(value: float | Sequence[float], num_steps: int, name: str) -> Sequence[float]:
    """`num_steps` values, from one number or from as many. Raises ValueError for another number of them."""
    if isinstance(value, int | float):
        return [value] * num_steps
    if len(value) != num_steps:
        raise ValueError(f"{name} has {len(value)} values for num_steps={num_steps}; give one number, or one a step")
    return value


def check_domain(bounds: Bounds, boundary: str, boundaries: Sequence[str]) -> None:
    """Raises ValueError for empty bounds, and for a `boundary` that is none of `boundaries`."""
    if bounds is not None:
        check_interval("bounds", bounds)
    if boundary not in boundaries:
        raise ValueError(f"boundary={boundary!r} must be {' or '.join(map(repr, boundaries))}")


def inside(x: Tensor, bounds: Bounds, boundary: str) -> Tensor:
    """`x` brought into the bounds by "clamp" or "reflect"; differentiable. NaN stays NaN."""
    if bounds is None:
        return x
    return reflected(x, bounds)[0] if boundary == "reflect" else x.clamp(*bounds)


def reflected(x: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """`x` folded back into the bounds once for each crossing, and a mask of the components that crossed an odd number
    of times, whose direction of motion is reversed.

    The fold is a triangle wave of period 2 (high - low), so it is exact for steps of any length; differentiable.
    """
    low, high = bounds
    width = high - low
    phase = (x - low).remainder(2 * width) - width  # below 0 on the way up from `low`, above 0 on the way back
    return (width + low - phase.abs()).clamp(low, high), phase > 0
