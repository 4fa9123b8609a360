"""Chains over levels, which cross between modes where the density is smoother. Parallel tempering: replicas at higher
temperatures, and swaps that pass their states down. Noise levels: the level is part of the state. Recovery: chains of
one level that are tied to a state of the next."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.energies.base import split_noise_level, with_noise_level
from ebm.samplers.base import Bounds, Energy, check_domain, dense, describe, evaluate
from ebm.samplers.metropolis import (
    BOUNDARIES,
    State,
    along,
    begin,
    comes_about,
    select,
    transition,
    walls_of,
)
from ebm.streams import Generators, normal_, uniform_

Proposal = Callable[..., Tensor]  # as `NoiseConditionalEnergy.propose`


class TemperingInfo(NamedTuple):
    """What happened in a chain: the values of `ChainInfo` for its cold replicas, and the two acceptances."""

    grad_norm: Tensor
    displacement: Tensor
    saturated: Tensor
    acceptance: Tensor  # probability with which a proposal is accepted, mean over steps and levels
    swap_acceptance: Tensor  # probability with which two neighbours are swapped; 0 where no swap was tried


def tempering(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    temperatures: Sequence[float],
    swap_every: int = 1,
    steps_before: int = 0,
    bounds: Bounds = None,
    boundary: str = "reject",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, TemperingInfo]:
    """Parallel tempering (Swendsen & Wang 1986; Earl & Deem 2005): each chain has L replicas, the l-th of which samples
    exp(-E / temperatures[l]) exactly.

    Every replica moves by `mala` with the same step size: the noise, sqrt(2 step_size T), grows with the temperature,
    and on a quadratic energy all levels have the same acceptance. After every `swap_every`-th step neighbours i and j,
    first the pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ..., change places with probability
    min(1, exp((1/T_i - 1/T_j) (E_i - E_j))). Swaps cost almost nothing, since the energies are known.

    Args:
        energy: states (B * L, *shape) -> energies (B * L,). It is called on `x.flatten(0, 1)`, so a closure over labels
            y (B,) must pass on `y.repeat_interleave(L)`; `Engine` does so by itself.
        x: initial states (B, L, *shape), inside the bounds; `x[:, 0]` are the cold replicas.
        temperatures: T_cold < ... < T_hot, L numbers above 0.
        steps_before: number of steps taken by earlier calls, for a chain that is cut into several calls: it keeps the
            swaps at every `swap_every`-th step of the whole.
        step_size, bounds, boundary, grad_scale, generator: as in `ebm.samplers.mala`.

    Returns the states after the last step, (B, L, *shape) float32, and TemperingInfo.
    """
    check_domain(bounds, boundary, BOUNDARIES)
    chains, levels = x.shape[:2]
    if levels != len(temperatures):
        raise ValueError(f"x of shape {tuple(x.shape)} must be (B, {len(temperatures)}, ...): a level a temperature")
    start = dense(x.detach().flatten(0, 1))
    state, ladder = begin(energy, start, grad_scale), _ladder(temperatures, chains, x.device)
    accepted = start.new_zeros(())
    swapped: list[Tensor] = []
    for step in range(steps_before + 1, steps_before + num_steps + 1):
        state, probability = transition(
            energy,
            state,
            length=(2 * step_size) ** 0.5,
            num_leapfrog=1,
            temperature=ladder.flatten(),
            bounds=bounds,
            walls=walls_of(bounds, boundary),
            grad_scale=grad_scale,
            generator=generator,
        )
        accepted += probability.mean()
        if step % swap_every == 0:
            swapped += [swap_(state, ladder, first, generator) for first in (0, 1) if first + 1 < levels]
    first_x, last_x, grad = (_levels(part, ladder)[:, 0] for part in (start, state.x, state.grad))
    swap_acceptance = torch.cat(swapped, dim=1).mean() if swapped else accepted.new_zeros(())
    info = TemperingInfo(*describe(first_x, last_x, grad, bounds), accepted / max(num_steps, 1), swap_acceptance)
    return _levels(state.x, ladder), info


def swap_(state: State, ladder: Tensor, first: int, generator: Generators) -> Tensor:
    """Tests the pairs of levels (first, first + 1), (first + 2, first + 3), ... and swaps in place those that pass.
    Returns the probabilities (B, pairs) of a swap. `ladder` (B, L) holds the temperatures of the B * L replicas."""
    pairs = (ladder.shape[1] - first) // 2
    parts = [*(_levels(part, ladder) for part in state), ladder]  # views: writing to them changes the state
    (*low, cold), (*high, hot) = ([part[:, i : i + 2 * pairs : 2] for part in parts] for i in (first, first + 1))
    log_ratio = (1 / cold - 1 / hot) * (low[1] - high[1])
    probability = torch.where(log_ratio.isnan(), 0.0, log_ratio.clamp(max=0).exp())
    swapped = comes_about(probability, generator)
    for a, b in zip(low, high, strict=True):
        chosen = swapped.view(*swapped.shape, *[1] * (a.ndim - 2))
        above = b.clone()
        b.copy_(torch.where(chosen, a, b))
        a.copy_(torch.where(chosen, above, a))
    return probability


def _levels(x: Tensor, ladder: Tensor) -> Tensor:
    """`x` (B * L, ...) viewed as (B, L, ...)."""
    return x.view(*ladder.shape, *x.shape[1:])


def _ladder(temperatures: Sequence[float], chains: int, device: torch.device) -> Tensor:
    """The temperatures of all replicas, (B, L), filled on the device: a copy from the host would wait for it."""
    ladder = torch.empty(chains, len(temperatures), device=device)
    for level, temperature in enumerate(temperatures):
        ladder[:, level].fill_(temperature)
    return ladder


class NoiseLevelsInfo(NamedTuple):
    """What happened in a chain. Each value is a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # norm of dE/dx at the last state
    displacement: Tensor  # norm of x_K - x_0
    saturated: Tensor  # 0: there are no bounds
    acceptance: Tensor  # acceptance probability of the moves of x, mean over the steps
    level_acceptance: Tensor  # acceptance probability of the moves of the level, 0 beyond the ends
    level: Tensor  # mean of the last level, 0 for the lowest and 1 for the highest: .5 where all are visited alike


def noise_levels(
    energy: Energy,
    z: Tensor,
    *,
    num_steps: int,
    step_size: float,
    log_variances: Sequence[float],
    lowest_share: float | None = None,
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, NoiseLevelsInfo]:
    """Simulated tempering over noise levels: samples the joint density p(x, t) ~ w(t) exp(-E(x, t)) over the levels
    exactly.

    Each step is one of MALA in x, then a proposal of the next level in the chain's direction, accepted with probability
    min(1, w(t') / w(t) exp(E(x, t) - E(x, t'))). A chain keeps its direction until a proposal is rejected, then turns
    (Sakai & Hukushima 2016): it sweeps over the levels where plain proposals would diffuse. Directions are drawn at the
    start. Where E(., t) is normalised, the levels have the shares w (Zhang, Tan & Ou 2023 train it so).

    Args:
        energy: E of states (B, C + 1, H, W) or (B, D + 1), float32 (B,).
        z: states with their levels, which must be among `log_variances`.
        step_size: of MALA at the lowest level, a number; at the others it is in proportion to their variance.
        log_variances: the levels, ascending and evenly spaced.
        lowest_share: w of the lowest level, in (0, 1]; the others share the rest alike. None: all alike. 1: levels are
            not moved, which saves half of the evaluations.

    Returns the states after the last step, with their levels, and NoiseLevelsInfo.
    """
    first, level = split_noise_level(z.detach())
    low, spacing = log_variances[0], log_variances[1] - log_variances[0]
    index = ((level - low) / spacing).round()
    highest = len(log_variances) - 1
    moves = lowest_share != 1
    favour = 0.0 if lowest_share is None or not moves else math.log(highest * lowest_share / (1 - lowest_share))
    draws = uniform_(torch.empty_like(level), generator)
    direction = torch.where(draws < 0.5, -1.0, 1.0)
    state = begin(_at(energy, level), dense(first), grad_scale)
    accepted, moved = level.new_zeros(()), level.new_zeros(())
    for _ in range(num_steps):
        state, probability = _move(energy, state, level, step_size, low, grad_scale, generator)
        accepted += probability.mean()
        if not moves:
            continue
        proposed = index + direction
        inside = (proposed >= 0) & (proposed <= highest)
        proposed = proposed.clamp(0, highest)
        new_level = low + spacing * proposed
        candidate = State(state.x, *evaluate(_at(energy, new_level), state.x, grad_scale))
        log_ratio = state.energy - candidate.energy + favour * ((proposed == 0).float() - (index == 0).float())
        probability = torch.where(inside & ~log_ratio.isnan(), log_ratio.clamp(max=0).exp(), 0.0)
        chosen = comes_about(probability, generator)
        moved += probability.mean()
        state = select(chosen, candidate, state)
        index, level = torch.where(chosen, proposed, index), torch.where(chosen, new_level, level)
        direction = torch.where(chosen, direction, -direction)
    described, steps = describe(first, state.x, state.grad, None), max(num_steps, 1)
    info = NoiseLevelsInfo(*described, accepted / steps, moved / steps, (index / max(highest, 1)).mean())
    return with_noise_level(state.x, level), info


def annealed(
    energy: Energy,
    z: Tensor,
    *,
    num_steps: int,
    step_size: float,
    log_variances: Sequence[float],
    anneal_steps: int,
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, NoiseLevelsInfo]:
    """Chains that go down from noise to data, and then sample the lowest level.

    After each step a chain's level falls by the same amount in log t, so that it reaches the lowest in four fifths of
    `anneal_steps` from the highest (annealed importance sampling's path, Neal 2001; Song & Ermon 2019). A step is one
    of Langevin, with noise for temperature 1, and is tested as in `mala` once the level stands still: until then the
    density changes beside it. The state tells how far a chain is, so that calls of some steps each make one chain.

    Args:
        energy: E of states (B, C + 1, H, W) or (B, D + 1), float32 (B,).
        z: states with their levels, any between the ends of `log_variances`.
        step_size: at the lowest level, a number; at the others it is in proportion to their variance.
        log_variances: the levels, ascending; only the first and the last count.

    Returns the states after the last step, with their levels, and NoiseLevelsInfo.
    """
    first, level = split_noise_level(z.detach())
    low, high = log_variances[0], log_variances[-1]
    fall = (high - low) / (0.8 * anneal_steps)
    state = begin(_at(energy, level), dense(first), grad_scale)
    accepted, tested = level.new_zeros(()), level.new_zeros(())
    for _ in range(num_steps):
        below = (level - fall).clamp(min=low)
        stands = below == level
        state, probability = _move(energy, state, level, step_size, low, grad_scale, generator, below)
        accepted, tested, level = accepted + (probability * stands).sum(), tested + stands.sum(), below
    acceptance = torch.where(tested > 0, accepted / tested.clamp(min=1), 1.0)
    place = ((level - low) / max(high - low, 1e-12)).mean()
    info = NoiseLevelsInfo(*describe(first, state.x, state.grad, None), acceptance, torch.zeros_like(place), place)
    return with_noise_level(state.x, level), info


def _at(energy: Energy, level: Tensor) -> Energy:
    return lambda x: energy(with_noise_level(x, level))


def _move(
    energy: Energy,
    state: State,
    level: Tensor,
    step_size: float,
    low: float,
    grad_scale: float,
    generator: Generators,
    below: Tensor | None = None,
) -> tuple[State, Tensor]:
    """One step of MALA at levels (B,), with steps in proportion to their variances. With `below`, levels (B,), the new
    states have the energies of those, and are tested where the level stays."""
    length = math.sqrt(2 * step_size) * along(((level - low) / 2).exp(), state.x)
    return transition(
        _at(energy, level if below is None else below),
        state,
        length=length,
        num_leapfrog=1,
        temperature=1.0,
        bounds=None,
        walls=None,
        grad_scale=grad_scale,
        generator=generator,
        tested=None if below is None else below == level,
    )


def tied(energy: Callable[..., Tensor], log_variances: Sequence[float]) -> Callable[..., Tensor]:
    """The energy of recovery chains at a level of noise, given their state at the next: the function (u, x_t, log s,
    *labels) -> E(x_s, s) + |x_s - x_t|^2 / (2 (t - s)), x_s = `untied(u, x_t, log s)`, at temperature 1 (Gao et al.
    2021, eq. 5, for x_t = x_s + sqrt(t - s) z).

    It is a function of u, the displacement in units of the level, so that one step size does at all of them. The
    density of data with noise of variance s has no curvature -d^2 log p / dx^2 above 1 / s, as its score is that of a
    mixture of N(a, s I) over data a. Tied, it has none above 1 / s + 1 / (t - s), and the unit c is such that this is
    c^2 (1 / s + 1 / (t - s)) = 1 / v in u, with v the variance of the lowest level: as it is at most for chains of the
    lowest level that are not tied. A step h in u is one of h c^2 = (h / v) (t - s) s / t in x; levels evenly spaced in
    log have one s / t, so that it is in proportion to t - s.

    Args:
        energy: E of states that carry their levels, and labels, float32 (B,).
        log_variances: the levels, ascending and evenly spaced; t is the one above s.
    """
    low, spacing = _lowest_and_spacing(log_variances)
    stiffness = math.exp(-low - spacing)  # c^2 / (t - s), the same at all levels

    def conditional(u: Tensor, centre: Tensor, level: Tensor, *labels: Tensor) -> Tensor:
        e = energy(with_noise_level(untied(u, centre, level, log_variances), level), *labels)
        return e + stiffness / 2 * u.square().flatten(1).sum(1)

    return conditional


def untied(u: Tensor, centre: Tensor, level: Tensor, log_variances: Sequence[float]) -> Tensor:
    """The states x_s = x_t + c u, (B, *shape), of chains `u` tied to x_t = `centre`, at log s = `level` (B,)."""
    return centre + along(_unit(level, log_variances), u) * u


def tied_start(
    centre: Tensor,
    level: Tensor,
    log_variances: Sequence[float],
    proposal: Proposal | None = None,
    labels: Sequence[Tensor] = (),
    generator: Generators = None,
) -> Tensor:
    """Where chains u of `tied` start: 0, which is x_t = `centre`; or the proposal of an initialiser plus noise.

    A datum a and its state x_t leave N(mean, (1 - s/t) s I) for x_s: the least spread that x_s can have given x_t, and
    all of it where x_t tells the datum. The noise has this variance, which is the lowest level's in u. Where several
    data are possible the start is between them and too narrow, and the chain does the rest.
    """
    if proposal is None:
        return torch.zeros_like(centre)
    low, spacing = _lowest_and_spacing(log_variances)
    mean = proposal(centre, level, spacing, *labels)
    noise = normal_(torch.empty_like(centre), generator)
    return (mean - centre) / along(_unit(level, log_variances), centre) + math.exp(low / 2) * noise


def _unit(level: Tensor, log_variances: Sequence[float]) -> Tensor:
    """c = sqrt(s (t - s) / (t v)), (B,)."""
    low, spacing = _lowest_and_spacing(log_variances)
    return ((level - low) / 2).exp() * math.sqrt(-math.expm1(-spacing))


def _lowest_and_spacing(log_variances: Sequence[float]) -> tuple[float, float]:
    return log_variances[0], log_variances[1] - log_variances[0]
