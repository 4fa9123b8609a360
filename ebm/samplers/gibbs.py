"""Gibbs draws of the classes of a conditional energy E(x, y), alone and in turn with moves of x."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.samplers.langevin import langevin
from ebm.samplers.metropolis import MetropolisInfo
from ebm.streams import Generators, uniform_


class GibbsInfo(NamedTuple):
    """What happened in a chain; each a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # as the sampler says it, in the last round
    displacement: Tensor  # norm of x_K - x_0
    saturated: Tensor  # share of components that end at a bound
    acceptance: Tensor  # of the moves of x, mean over the rounds; 1 for a sampler without a test
    flipped: Tensor  # share of the draws that change the class, mean over the rounds


def class_flips(
    energy_of_classes: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    temperature: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """An exact draw of y given x: p(y | x) = softmax(-E(x, .) / T), by the largest of E(x, y) / -T plus Gumbel noise.

    Args:
        energy_of_classes: states (B, *shape) -> energies of all classes (B, K); JEM's negative logits, for one.
        x, y: states (B, *shape) and their classes (B,), integers.
        generator: of the draws; a list of them cuts the batch into equal parts, one each.

    Returns the new classes (B,), and the share that changed, a scalar on the device. A class of energy +inf is never
    drawn; a chain with a NaN, a -inf or nothing finite among its energies keeps its class.
    """
    with torch.no_grad():
        energies = energy_of_classes(x).float()
    uniform = uniform_(torch.empty(energies.shape, device=energies.device), generator)
    drawn = (energies / -temperature - (-uniform.log()).log()).argmax(1)
    sound = energies.isfinite().any(1) & ~(energies.isnan() | energies.isneginf()).any(1)
    new = torch.where(sound, drawn.to(y.dtype), y)
    return new, (new != y).float().mean()


def within_gibbs(
    sampler: Callable[..., tuple[Tensor, tuple]],
    energy: Callable[[Tensor, Tensor], Tensor],
    energy_of_classes: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    rounds: int,
    temperature: float = 1.0,
    generator: Generators = None,
    **settings,
) -> tuple[Tensor, Tensor, GibbsInfo]:
    """`rounds` times: x moves at its class by `sampler` (`langevin`, `mala` or `hmc`, with `settings`), then the class
    is drawn given x. With `mala` or `hmc` this samples p(x, y) ~ exp(-E(x, y) / T) exactly.

    Args:
        energy: states (B, *shape) and classes (B,) -> energies (B,).
        energy_of_classes, x, y, generator: as in `class_flips`.
        rounds: at least 1.
        temperature: of both kinds of moves; for `langevin` its `noise_scale` says it for x.

    Returns states (B, *shape) float32, classes (B,) and GibbsInfo.
    """
    start, accepted, flipped = x.detach().float(), [], []
    if sampler is not langevin:
        settings["temperature"] = temperature
    for _ in range(rounds):
        x, info = sampler(lambda x, y=y: energy(x, y), x, generator=generator, **settings)
        y, share = class_flips(energy_of_classes, x, y, temperature=temperature, generator=generator)
        accepted.append(info.acceptance if isinstance(info, MetropolisInfo) else torch.ones_like(share))
        flipped.append(share)
    displacement = (x - start).flatten(1).norm(dim=1).mean()
    means = (torch.stack(values).mean() for values in (accepted, flipped))
    return x, y, GibbsInfo(info.grad_norm, displacement, info.saturated, *means)
