"""What the chains of all samplers share: their states, their energies and gradients, what is told of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Info = TypeVar("Info", bound=tuple[Tensor, ...])


class ChainInfo(NamedTuple):
    """What happened in a chain; each a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # norm of dE/dx at the last step, before the clamp
    displacement: Tensor  # norm of x_K - x_0
    saturated: Tensor  # share of components that end at a bound


def evaluate(energy: Callable[[Tensor], Tensor], x: Tensor, grad_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """E (B,) float32 and dE/dx (B, *shape) at `x`, which is left as it is; neither has a graph behind it.

    E is multiplied and dE/dx divided by `grad_scale` on the way, so that float16 gradients do not vanish.
    """
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        energies = energy(x)
        total = energies.sum()
        (grad,) = torch.autograd.grad(total * grad_scale if grad_scale != 1 else total, x)
    return energies.detach().float(), grad if grad_scale == 1 else grad / grad_scale


def dense(x: Tensor) -> Tensor:
    """A float32 copy of `x`; images channels last, with strides that say so even for one channel, where
    `contiguous(memory_format=...)` leaves them ambiguous and convolutions then change layouts back and forth."""
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=layout).copy_(x)


def describe(start: Tensor, x: Tensor, grad: Tensor, bounds: tuple[float, float] | None) -> ChainInfo:
    saturated = x.new_zeros(())
    if bounds is not None:
        saturated = ((x <= bounds[0]) | (x >= bounds[1])).float().mean()
    return ChainInfo(grad.flatten(1).norm(dim=1).mean(), (x - start).flatten(1).norm(dim=1).mean(), saturated)


def per_step(value: float | Sequence[float], num_steps: int, name: str) -> Sequence[float]:
    if isinstance(value, int | float):
        return [value] * num_steps
    if len(value) != num_steps:
        raise ValueError(f"{name} has {len(value)} values for num_steps={num_steps}; give one number, or one a step")
    return value


def mean_info(infos: Sequence[Info]) -> Info:
    """The mean of each field over named tuples of one type."""
    return type(infos[0])(*(torch.stack(values).mean(0) for values in zip(*infos, strict=True)))


def saturated(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """The share of components of `x` at a bound or beyond."""
    if bounds is None:
        return x.new_zeros(())
    return ((x <= bounds[0]) | (x >= bounds[1])).float().mean()
