"""Gibbs draws of the classes of a conditional energy E(x, y), alone or in turn with moves of x."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm.samplers.base import ChainInfo, Energy
from ebm.samplers.langevin import langevin
from ebm.samplers.metropolis import MetropolisInfo
from ebm.streams import Generators, uniform_


class GibbsInfo(NamedTuple):
    """What happened in a chain: the values of `ChainInfo` (grad_norm in the last round), and of the Gibbs rounds."""

    grad_norm: Tensor
    displacement: Tensor
    saturated: Tensor
    acceptance: Tensor  # acceptance of the moves of x, mean over the rounds; 1 for a sampler without a test
    flipped: Tensor  # share of the draws that change the class, mean over the rounds


def class_flips(
    energy_of_classes: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    temperature: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """Draws y from p(y | x) = softmax(-E(x, .) / T), as the argmax of -E(x, y) / T plus Gumbel noise.

    Args:
        energy_of_classes: states (B, *shape) -> energies of all classes (B, K), for example JEM's negative logits.
        x, y: states (B, *shape) and their classes (B,), integers.
        generator: makes the draws; a list of generators cuts the batch into equal parts, one for each.

    Returns the new classes (B,), and the share that changed, a scalar on the device. A class of energy +inf is never
    drawn. A chain keeps its class if one of its energies is NaN or -inf, or none is finite.
    """
    with torch.no_grad():
        energies = energy_of_classes(x).float()
    uniform = uniform_(torch.empty(energies.shape, device=energies.device), generator)
    drawn = (energies / -temperature - (-uniform.log()).log()).argmax(1)
    sound = energies.isfinite().any(1) & ~(energies.isnan() | energies.isneginf()).any(1)
    new = torch.where(sound, drawn.to(y.dtype), y)
    return new, (new != y).float().mean()


def within_gibbs(
    sampler: Callable[..., tuple[Tensor, ChainInfo | MetropolisInfo]],
    energy: Callable[[Tensor, Tensor], Tensor],
    energy_of_classes: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    rounds: int,
    temperature: float = 1.0,
    generator: Generators = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, GibbsInfo]:
    """In each of the `rounds`, moves x at its class by `sampler` (`langevin`, `mala` or `hmc`, with `settings`) and
    then draws the class given x. With `mala` or `hmc` this samples p(x, y) ~ exp(-E(x, y) / T) exactly.

    Args:
        energy: states (B, *shape) and classes (B,) -> energies (B,).
        energy_of_classes, x, y, generator: as in `class_flips`.
        rounds: at least 1.
        temperature: T of both kinds of moves; with `langevin`, that of x follows from its `noise_scale` instead.

    Returns states (B, *shape) float32, classes (B,) and GibbsInfo.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    start, accepted, flipped = x.detach().float(), [], []
    if sampler is not langevin:
        settings["temperature"] = temperature

    def of_states(y: Tensor) -> Energy:
        return lambda x: energy(x, y)

    for _ in range(rounds):
        x, info = sampler(of_states(y), x, generator=generator, **settings)
        y, share = class_flips(energy_of_classes, x, y, temperature=temperature, generator=generator)
        accepted.append(info.acceptance if isinstance(info, MetropolisInfo) else torch.ones_like(share))
        flipped.append(share)
    displacement = (x - start).flatten(1).norm(dim=1).mean()
    acceptance, changed = (torch.stack(values).mean() for values in (accepted, flipped))
    return x, y, GibbsInfo(info.grad_norm, displacement, info.saturated, acceptance, changed)
