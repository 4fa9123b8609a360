"""Parallel tempering: replicas at higher temperatures cross barriers, and swaps pass their states down."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.samplers.base import Bounds, Energy, check_domain, dense, describe
from ebm.samplers.metropolis import BOUNDARIES, State, begin, comes_about, transition, walls_of
from ebm.streams import Generators


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
