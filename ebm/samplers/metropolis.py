"""Samplers that are exact at any step size: MALA and HMC by a Metropolis test, and Gibbs draws of the classes of a
conditional energy E(x, y)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ebm.samplers.base import Bounds, ChainInfo, Energy, check_domain, dense, describe, evaluate, per_step, reflected
from ebm.samplers.langevin import langevin
from ebm.streams import Generators, normal_, uniform_

BOUNDARIES = ("reject", "reflect")
Number = TypeVar("Number", float, Tensor)


class MetropolisInfo(NamedTuple):
    """What happened in a chain: the values of `ChainInfo` (grad_norm at the last state), and the acceptance."""

    grad_norm: Tensor
    displacement: Tensor
    saturated: Tensor
    acceptance: Tensor  # probability with which a proposal is accepted, mean over the steps


class State(NamedTuple):
    """A batch of chains between two steps."""

    x: Tensor  # (B, *shape)
    energy: Tensor  # (B,)
    grad: Tensor  # dE/dx, (B, *shape)


def mala(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    temperature: float | Sequence[float] = 1.0,
    bounds: Bounds = None,
    boundary: str = "reject",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, MetropolisInfo]:
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996, sec. 1.4.2): samples exp(-E / T) exactly.

    Proposes x' = x - step_size * dE/dx + sqrt(2 step_size T) z and accepts it with probability min(1, exp(-E(x') / T)
    q(x | x') / exp(-E(x) / T) q(x' | x)), each chain on its own. A step costs one forward and one backward. The
    proposal is a leapfrog step of length sqrt(2 step_size), so this is `hmc` with num_leapfrog=1 (Neal 2011, sec. 5.2).

    `step_size` is a number, or a scalar float32 tensor on the device of `x`, which is never read on the host. The
    module describes the other arguments. Returns the states after the last step, (B, *shape) float32, and
    MetropolisInfo.
    """
    return metropolis_chain(
        energy,
        x,
        num_steps=num_steps,
        length=(2 * step_size) ** 0.5,
        num_leapfrog=1,
        temperature=temperature,
        bounds=bounds,
        boundary=boundary,
        grad_scale=grad_scale,
        generator=generator,
    )


def adapted(step_size: Number, acceptance: Number, target: float, rate: float) -> Number:
    """step_size * exp(rate * (acceptance - target)): the next step size on the way to a target acceptance.

    This is a step of stochastic approximation on log(step_size) (Andrieu & Thoms 2008, sec. 4.2), for numbers and for
    scalar tensors. Chains are exact only once the step size no longer changes. The targets that cost least in high
    dimensions are .574 for `mala` (Roberts & Rosenthal 1998) and .651 for `hmc` (Beskos et al. 2013; Stan takes .8).
    """
    change = rate * (acceptance - target)
    return step_size * (change.exp() if isinstance(change, Tensor) else math.exp(change))


def metropolis_chain(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    temperature: float | Sequence[float],
    bounds: Bounds,
    boundary: str,
    grad_scale: float,
    **settings: Any,
) -> tuple[Tensor, MetropolisInfo]:
    """The chain of `mala` and `hmc`: `num_steps` calls of `transition`."""
    check_domain(bounds, boundary, BOUNDARIES)
    settings |= {"bounds": bounds, "walls": walls_of(bounds, boundary), "grad_scale": grad_scale}
    start = dense(x.detach())
    state, accepted = begin(energy, start, grad_scale), start.new_zeros(())
    for t in per_step(temperature, num_steps, "temperature"):
        state, probability = transition(energy, state, temperature=t, **settings)
        accepted += probability.mean()
    described = describe(start, state.x, state.grad, bounds)
    return state.x, MetropolisInfo(*described, accepted / max(num_steps, 1))


def begin(energy: Energy, x: Tensor, grad_scale: float = 1.0) -> State:
    """The state at `x`, in memory of its own, as autograd may return views."""
    energies, grad = evaluate(energy, x, grad_scale)
    return State(x.clone(), energies.clone(), torch.empty_like(x).copy_(grad))


def walls_of(bounds: Bounds, boundary: str) -> Bounds:
    """The bounds at which trajectories are reflected; None where they pass, and are rejected if they end outside."""
    return bounds if boundary == "reflect" else None


def transition(
    energy: Energy,
    state: State,
    *,
    length: float | Tensor,
    num_leapfrog: int,
    temperature: float | Tensor,
    bounds: Bounds,
    walls: Bounds,
    grad_scale: float,
    generator: Generators,
    tested: Tensor | None = None,
) -> tuple[State, Tensor]:
    """One step: draw a momentum, propose a state, test it. Returns the new state, in the memory of the old one, and the
    acceptance probabilities (B,).

    The momentum is N(0, T) with mass 1, so that E + |p|^2 / 2 is conserved and exp(-(E + |p|^2 / 2) / T) is sampled.
    `temperature` is a number, or (B,). Proposals outside the bounds are rejected; reflected ones never are. Where
    `tested` (bool, (B,)) is false, each proposal of a finite energy is taken.
    """
    start = normal_(torch.empty_like(state.x), generator)
    start.mul_(temperature**0.5 if isinstance(temperature, float | int) else along(temperature, start) ** 0.5)
    proposal, end = leapfrog(energy, state, start, length, num_leapfrog, walls, grad_scale)
    # |p'|^2 - |p|^2 as a product: it is small beside both, which round at their own size.
    kinetic = ((end - start) * (end + start)).flatten(1).sum(1) / 2
    log_ratio = -(proposal.energy - state.energy + kinetic) / temperature
    possible = proposal.energy.isfinite() & ~log_ratio.isnan()
    if tested is not None:
        log_ratio = torch.where(tested, log_ratio, 0.0)
    if bounds is not None:
        possible &= ((proposal.x >= bounds[0]) & (proposal.x <= bounds[1])).flatten(1).all(1)
    probability = torch.where(possible, log_ratio.clamp(max=0).exp(), 0.0)
    return select(comes_about(probability, generator), proposal, state), probability


def leapfrog(
    energy: Energy,
    state: State,
    momentum: Tensor,
    length: float | Tensor,
    num: int,
    walls: Bounds = None,
    grad_scale: float = 1.0,
) -> tuple[State, Tensor]:
    """Integrates dx/dt = p, dp/dt = -dE/dx by `num` steps, each `length` long (Neal 2011, eq. 5.18-5.20), and returns
    the final state and momentum.

    The map is reversible and preserves volume, also at the `walls`, where the momentum is reversed (sec. 5.5.1.5).
    """
    momentum = momentum.clone()
    for _ in range(num):
        momentum.sub_(state.grad * (length / 2))
        x = state.x.clone().add_(momentum * length)
        if walls is not None:
            x, turned = reflected(x, walls)
            momentum.mul_(torch.where(turned, -1.0, 1.0))
        state = State(x, *evaluate(energy, x, grad_scale))
        momentum.sub_(state.grad * (length / 2))
    return state, momentum


def comes_about(probability: Tensor, generator: Generators) -> Tensor:
    """Draws events (B, ...) of the given probabilities; one of probability 0 never comes about."""
    return uniform_(torch.empty(probability.shape, device=probability.device), generator) < probability


def select(chosen: Tensor, new: State, old: State) -> State:
    """`new` where `chosen` (B,), else `old`. The result takes over the memory and layout of `old`."""
    return State(*(torch.where(along(chosen, b), a, b, out=b) for a, b in zip(new, old, strict=True)))


def along(values: Tensor, x: Tensor) -> Tensor:
    """`values` (B,) viewed with as many dimensions as `x` (B, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def hmc(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    num_leapfrog: int,
    temperature: float | Sequence[float] = 1.0,
    bounds: Bounds = None,
    boundary: str = "reflect",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, MetropolisInfo]:
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011, fig. 5.2) with mass 1: samples exp(-E / T) exactly.

    A step draws a momentum p ~ N(0, T), follows dx/dt = p, dp/dt = -dE/dx for `num_leapfrog` leapfrog steps, each
    `step_size` long in time, and accepts the end with probability min(1, exp((H - H') / T)), H = E + |p|^2 / 2.
    It costs `num_leapfrog` forwards and backwards. A trajectory of half a period, pi / sqrt(curvature) in time, ends at
    the mirror image of where it began, whatever the momentum: num_leapfrog * step_size should be about half of that.

    `step_size` is a number, or a scalar float32 tensor on the device of `x`. It is a length of x, whereas the step
    sizes of `mala` and `langevin` are squares of lengths: they correspond to step_size**2 / 2. The module describes the
    other arguments. Returns the states after the last step, (B, *shape) float32, and MetropolisInfo.
    """
    return metropolis_chain(
        energy,
        x,
        num_steps=num_steps,
        length=step_size,
        num_leapfrog=num_leapfrog,
        temperature=temperature,
        bounds=bounds,
        boundary=boundary,
        grad_scale=grad_scale,
        generator=generator,
    )


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
