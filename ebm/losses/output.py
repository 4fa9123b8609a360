"""What every loss returns, how losses call an energy, and the regularisers that can be added to any of them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.streams import Generators, uniform_

Energy = Callable[..., Tensor]  # x (B, *shape), and labels (B,) where it is class-conditional -> (B,)


class LossOutput(NamedTuple):
    """A loss to differentiate, and what it was made of. All but `loss` is detached and float32."""

    loss: Tensor  # scalar
    e_pos: Tensor | None  # energies of the data (n,); None where the objective computes none
    e_neg: Tensor | None  # energies of chains, or of other draws that the data is told from (m,)
    terms: dict[str, Tensor]  # scalars, by the names they are logged under


def output(loss: Tensor, e_pos: Tensor | None = None, e_neg: Tensor | None = None, **terms: Tensor) -> LossOutput:
    """A `LossOutput` with everything but the loss detached and in float32."""
    e_pos, e_neg = (None if e is None else e.detach().float() for e in (e_pos, e_neg))
    return LossOutput(loss, e_pos, e_neg, {name: value.detach().float() for name, value in terms.items()})


def energies(energy: Energy, xs: Sequence[Tensor], ys: Sequence[Tensor | None] = (None,)) -> tuple[Tensor, ...]:
    """The energies of each batch of `xs`, by one forward of all together; float32, or what is wider.

    `ys`: the labels of each batch, or None for all. A batch with k times as many states as labels holds k of each
    label in turn.
    """
    labels = ()
    if ys[0] is not None:
        labels = (torch.cat([y.repeat_interleave(len(x) // len(y)) for x, y in zip(xs, ys, strict=True)]),)
    e = energy(torch.cat(list(xs)) if len(xs) > 1 else xs[0], *labels)
    return e.to(torch.promote_types(e.dtype, torch.float32)).split([len(x) for x in xs])


def energy_and_gradient(energy: Energy, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(E (B,), dE/dx (B, *shape)) at an `x` that requires gradients; both can be differentiated again.

    Under float16 autocast the energy computes in float32: no loss scale reaches this inner gradient, and float16
    would lose its small parts. bfloat16 has the range (and costs 1 % of a score's precision).
    """
    device = x.device.type
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=False) if narrow else nullcontext():
        (e,) = energies(energy, [x], [y])
        (gradient,) = torch.autograd.grad(e.sum(), x, create_graph=True, materialize_grads=True)
    return e, gradient


def num_parts(generator) -> int:
    """Into how many equal parts a batch is cut: one a generator. What looks across samples looks within a part, so
    that a run's losses don't depend on how many parts a process owns."""
    return 1 if generator is None or isinstance(generator, torch.Generator) else len(generator)


def energy_l2(*energies: Tensor) -> Tensor:
    """The sum over batches of mean E**2: keeps the energies' scale (Du & Mordatch 2019, eq. 4)."""
    return torch.stack([e.square().mean() for e in energies]).sum()


def gradient_penalty(energy: Energy, x: Tensor, y: Tensor | None = None) -> Tensor:
    """mean |dE/dx|**2 / 2 over `x`: R1 where these are data (Mescheder et al. 2018, eq. 9 with gamma = 1)."""
    _, gradient = energy_and_gradient(energy, x.detach().requires_grad_(True), y)
    return gradient.square().flatten(1).sum(1).mean() / 2


def interpolate(x_pos: Tensor, x_neg: Tensor, generator: Generators = None) -> Tensor:
    """A point drawn uniformly from the line between each pair (Gulrajani et al. 2017, algorithm 1)."""
    u = uniform_(x_pos.new_empty(len(x_pos)), generator).view(-1, *[1] * (x_pos.ndim - 1))
    return torch.lerp(x_neg, x_pos, u)
