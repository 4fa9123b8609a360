"""Samplers with a Metropolis test, which makes them exact at any step size: MALA and HMC."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.samplers.base import dense, describe, evaluate, per_step
from ebm.streams import Generators, normal_, uniform_


class MetropolisInfo(NamedTuple):
    """What happened in a chain; each a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # norm of dE/dx at the last state
    displacement: Tensor  # norm of x_K - x_0
    saturated: Tensor  # share of components that end at a bound
    acceptance: Tensor  # probability with which a proposal is accepted, mean over the steps


class State(NamedTuple):
    """A batch of chains between two steps."""

    x: Tensor  # (B, *shape)
    energy: Tensor  # (B,)
    grad: Tensor  # dE/dx, (B, *shape)


def mala(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    temperature: float | Sequence[float] = 1.0,
    bounds: tuple[float, float] | None = None,
    boundary: str = "reject",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, MetropolisInfo]:
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996, sec. 1.4.2): samples exp(-E / T) exactly.

    Proposes x' = x - step_size * dE/dx + sqrt(2 step_size T) z and accepts it with probability min(1, exp(-E(x') / T)
    q(x | x') / exp(-E(x) / T) q(x' | x)), for each chain alone. A step costs one forward and one backward. The proposal
    is a leapfrog step of length sqrt(2 step_size), and so this is `hmc` with one of them (Neal 2011, sec. 5.2).

    Args:
        energy: states (B, *shape) -> energies (B,). Where they are not finite, proposals are rejected.
        x: initial states (B, *shape), inside the bounds; float32 whatever type the energy computes in.
        step_size: a number, or a scalar float32 tensor on the device of `x`, never read on the host.
        temperature: T, a number above 0, or one for each step (simulated annealing).
        bounds, boundary: the domain is [low, high] in every component. "reject" refuses proposals outside of it, and
            stands still in high dimensions; "reflect" folds them back. Both are exact.
        grad_scale: E is multiplied and dE/dx divided by it, so that float16 gradients do not vanish.
        generator: of all draws; a list of them cuts the batch into equal parts, one each.

    Returns the states after the last step, (B, *shape) float32, and MetropolisInfo.
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


def adapted(step_size: float | Tensor, acceptance: float | Tensor, target: float, rate: float) -> float | Tensor:
    """step_size * exp(rate * (acceptance - target)): the next step size on the way to a target acceptance.

    A step of stochastic approximation on log(step_size) (Andrieu & Thoms 2008, sec. 4.2), for numbers and for scalar
    tensors. Chains are exact only once the step size is kept. Targets that cost least in high dimensions: .574 for
    `mala` (Roberts & Rosenthal 1998), .651 for `hmc` (Beskos et al. 2013; Stan takes .8).
    """
    change = rate * (acceptance - target)
    return step_size * (change.exp() if isinstance(change, Tensor) else math.exp(change))


def metropolis_chain(
    energy,
    x: Tensor,
    *,
    num_steps: int,
    temperature: float | Sequence[float],
    bounds: tuple[float, float] | None,
    grad_scale: float,
    **settings,
) -> tuple[Tensor, MetropolisInfo]:
    """`num_steps` times `transition`: what `mala` and `hmc` are."""
    start = dense(x.detach())
    state, accepted = begin(energy, start, grad_scale), start.new_zeros(())
    for t in per_step(temperature, num_steps, "temperature"):
        state, probability = transition(energy, state, temperature=t, bounds=bounds, grad_scale=grad_scale, **settings)
        accepted += probability.mean()
    described = describe(start, state.x, state.grad, bounds)
    return state.x, MetropolisInfo(*described, accepted / max(num_steps, 1))


def begin(energy, x: Tensor, grad_scale: float = 1.0) -> State:
    """The state at `x`, in memory of its own: what autograd returns may be a view."""
    energies, grad = evaluate(energy, x, grad_scale)
    return State(x.clone(), energies.clone(), torch.empty_like(x).copy_(grad))


def transition(
    energy,
    state: State,
    *,
    length: float | Tensor,
    num_leapfrog: int,
    temperature: float | Tensor,
    bounds: tuple[float, float] | None,
    boundary: str,
    grad_scale: float,
    generator: Generators,
) -> tuple[State, Tensor]:
    """One step: fresh momentum, a proposal, its test. The new state, in the memory of the old one, and the
    probability (B,) with which each chain was to move.

    The momentum is N(0, T), mass 1, so that E + |p|^2 / 2 is conserved and exp(-(E + |p|^2 / 2) / T) is sampled.
    `temperature` is a number, or (B,).
    """
    if boundary not in ("reject", "reflect"):
        raise ValueError(f"boundary={boundary!r} must be 'reject' or 'reflect'")
    start = normal_(torch.empty_like(state.x), generator)
    start.mul_(temperature**0.5 if isinstance(temperature, float | int) else along(temperature, start) ** 0.5)
    walls = bounds if boundary == "reflect" else None
    proposal, end = leapfrog(energy, state, start, length, num_leapfrog, walls, grad_scale)
    # |p'|^2 - |p|^2 as a product: it is small beside both, which round at their own size.
    kinetic = ((end - start) * (end + start)).flatten(1).sum(1) / 2
    log_ratio = -(proposal.energy - state.energy + kinetic) / temperature
    possible = proposal.energy.isfinite() & ~log_ratio.isnan()
    if bounds is not None:
        possible &= ((proposal.x >= bounds[0]) & (proposal.x <= bounds[1])).flatten(1).all(1)
    probability = torch.where(possible, log_ratio.clamp(max=0).exp(), 0.0)
    return select(comes_about(probability, generator), proposal, state), probability


def leapfrog(
    energy,
    state: State,
    momentum: Tensor,
    length: float | Tensor,
    num: int,
    walls: tuple[float, float] | None = None,
    grad_scale: float = 1.0,
) -> tuple[State, Tensor]:
    """`num` steps of dx/dt = p, dp/dt = -dE/dx, each `length` long (Neal 2011, eq. 5.18-5.20): state and momentum.

    Reversible and volume-preserving, at the `walls` too, where the momentum turns round (Neal 2011, sec. 5.5.1.5).
    """
    momentum = momentum.clone()
    for _ in range(num):
        momentum.sub_(state.grad * (length / 2))
        x = state.x.clone().add_(momentum * length)
        if walls is not None:
            bounce_(x, momentum, walls)
        state = State(x, *evaluate(energy, x, grad_scale))
        momentum.sub_(state.grad * (length / 2))
    return state, momentum


def bounce_(x: Tensor, momentum: Tensor, walls: tuple[float, float]) -> None:
    """Fold `x` back between the walls, once a crossing; after an odd number of them the momentum points back."""
    low, width = walls[0], walls[1] - walls[0]
    x.sub_(low).remainder_(2 * width).sub_(width)  # on a circle: on the way forth below 0, on the way back above
    momentum.mul_(torch.where(x > 0, -1.0, 1.0))
    x.abs_().neg_().add_(width + low).clamp_(*walls)


def comes_about(probability: Tensor, generator: Generators) -> Tensor:
    """Which events of a probability (B, ...) come about; never one of probability 0."""
    return uniform_(torch.empty(probability.shape, device=probability.device), generator) < probability


def select(chosen: Tensor, new: State, old: State) -> State:
    """`new` where `chosen` (B,), else `old`, whose memory (and layout) the result takes over."""
    return State(*(torch.where(along(chosen, b), a, b, out=b) for a, b in zip(new, old, strict=True)))


def along(values: Tensor, x: Tensor) -> Tensor:
    """`values` (B,) with as many dimensions as `x` (B, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))


def hmc(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    num_leapfrog: int,
    temperature: float | Sequence[float] = 1.0,
    bounds: tuple[float, float] | None = None,
    boundary: str = "reflect",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, MetropolisInfo]:
    """Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011, fig. 5.2) with mass 1: samples exp(-E / T) exactly.

    A step draws a momentum p ~ N(0, T), follows dx/dt = p, dp/dt = -dE/dx for `num_leapfrog` leapfrog steps, each
    `step_size` long in time, and accepts the end with probability min(1, exp((H - H') / T)), H = E + |p|^2 / 2.
    It costs `num_leapfrog` forwards and backwards. A trajectory of half a period, pi / sqrt(curvature) in time, ends at
    the mirror image of where it began, whatever the momentum: num_leapfrog * step_size should be about half of that.

    Args:
        energy, x, temperature, grad_scale, generator: as in `ebm.samplers.mala`.
        step_size: a number, or a scalar float32 tensor on the device of `x`. In lengths of x, where that of `mala` and
            `langevin` is in squares of lengths: they agree at step_size**2 / 2.
        bounds, boundary: the domain is [low, high] in every component: trajectories are reflected at its walls
            ("reflect"), or rejected where they end beyond them ("reject"). Both are exact.

    Returns the states after the last step, (B, *shape) float32, and MetropolisInfo.
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
