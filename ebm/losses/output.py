"""What every loss returns, how losses evaluate an energy, and the regularisers that any loss can have."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def energies(energy: Energy, xs: Sequence[Tensor], ys: Sequence[Tensor | None] = (None,)) -> list[Tensor]:
    """The energies of each batch of `xs`, from one forward on all of them; float32, or what is wider.

    `ys`: the labels of each batch, or None for all. A batch with k times as many states as labels holds k states of
    each label in turn.
    """
    labels = [y.repeat_interleave(len(x) // len(y)) for x, y in zip(xs, ys, strict=False) if y is not None]
    assert len(labels) in (0, len(xs)), "labels of some batches only"
    e = energy(torch.cat(list(xs)) if len(xs) > 1 else xs[0], *([torch.cat(labels)] if labels else []))
    return list(torch.split(at_least_float32(e), [len(x) for x in xs]))


def at_least_float32(e: Tensor) -> Tensor:
    """`e` in float32, or as it is where its type is wider."""
    return e.to(torch.promote_types(e.dtype, torch.float32))


def energy_and_gradient(
    energy: Energy, x: Tensor, y: Tensor | None = None, create_graph: bool = True
) -> tuple[Tensor, Tensor]:
    """(E (B,), dE/dx (B, *shape)) at an `x` that requires gradients; both can be differentiated if `create_graph`."""
    with without_float16(x.device.type):
        (e,) = energies(energy, [x], [y])
    return e, gradient_of(e.sum(), x, create_graph)


def gradient_of(value: Tensor, x: Tensor, create_graph: bool = True) -> Tensor:
    """The gradient of a scalar with respect to `x`, zeros where it does not depend on it. Every gradient inside a loss
    is taken here."""
    with without_float16(x.device.type):
        (gradient,) = torch.autograd.grad(value, x, create_graph=create_graph, materialize_grads=True)
    return gradient


@contextmanager
def without_float16(device: str) -> Iterator[None]:
    """Turns float16 autocast off, for a gradient inside a loss: no loss scale reaches it, and float16 would lose its
    small parts. bfloat16 has float32's range and stays on (it costs 1 % of a score's precision)."""
    narrow = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    if narrow:
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


def per_state(values: Tensor, x: Tensor) -> Tensor:
    """`values` (B,) in a shape that broadcasts over the states `x` (B, *shape)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def squared_norm(x: Tensor) -> Tensor:
    """The sum of squares of each state's components, (B,)."""
    return x.square().flatten(1).sum(1)


def energy_l2(*energies: Tensor) -> Tensor:
    """The sum over batches of mean E**2, which keeps the energies' scale (Du & Mordatch 2019, eq. 4)."""
    return torch.stack([e.square().mean() for e in energies]).sum()


def gradient_penalty(energy: Energy, x: Tensor, y: Tensor | None = None) -> Tensor:
    """mean |dE/dx|**2 / 2 over `x`. Where these are data it is R1 (Mescheder et al. 2018, eq. 9 with gamma = 1)."""
    _, gradient = energy_and_gradient(energy, x.detach().requires_grad_(True), y)
    return squared_norm(gradient).mean() / 2


def interpolate(x_pos: Tensor, x_neg: Tensor, generator: Generators = None) -> Tensor:
    """A point drawn uniformly from the line between each pair of states (Gulrajani et al. 2017, algorithm 1)."""
    u = uniform_(x_pos.new_empty(len(x_pos)), generator)
    return torch.lerp(x_neg, x_pos, per_state(u, x_pos))
