"""Parallel tempering: replicas at higher temperatures cross the barriers, swaps bring what they find down."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.samplers.base import dense, describe
from ebm.samplers.metropolis import State, begin, comes_about, transition
from ebm.streams import Generators


class TemperingInfo(NamedTuple):
    """What happened in a chain; each a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # norm of dE/dx at the last cold state
    displacement: Tensor  # norm of x_K - x_0, of the cold replicas
    saturated: Tensor  # share of components of the cold replicas that end at a bound
    acceptance: Tensor  # probability with which a proposal is accepted, mean over steps and levels
    swap_acceptance: Tensor  # probability with which two neighbours are swapped; 0 where no swap was tried


def tempering(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Tensor,
    temperatures: Sequence[float],
    swap_every: int = 1,
    steps_before: int = 0,
    bounds: tuple[float, float] | None = None,
    boundary: str = "reject",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, TemperingInfo]:
    """Parallel tempering (Swendsen & Wang 1986; Earl & Deem 2005): each chain is a ladder of L replicas, the l-th of
    which samples exp(-E / temperatures[l]) exactly.

    Every replica moves by `mala`. The step size is one for all: the noise, sqrt(2 step_size T), is larger the hotter
    the replica, and on a quadratic energy all levels accept alike. After every `swap_every`-th step neighbours i and j,
    first the pairs (0, 1), (2, 3), ..., then (1, 2), (3, 4), ..., change places with probability
    min(1, exp((1/T_i - 1/T_j) (E_i - E_j))). Swaps cost nothing beside a step: the energies are known.

    Args:
        energy: states (B * L, *shape) -> energies (B * L,): called on `x.flatten(0, 1)`, so that a closure over labels
            y (B,) passes on `y.repeat_interleave(L)`, which `Engine` does by itself.
        x: initial states (B, L, *shape), inside the bounds; `x[:, 0]` are the cold replicas.
        temperatures: T_cold < ... < T_hot, L numbers above 0.
        steps_before: steps of earlier calls, where a chain is cut into several and swaps go on in their rhythm.
        step_size, bounds, boundary, grad_scale, generator: as in `ebm.samplers.mala`.

    Returns the states after the last step, (B, L, *shape) float32, and TemperingInfo.
    """
    chains, levels = x.shape[:2]
    if levels != len(temperatures):
        raise ValueError(f"x of shape {tuple(x.shape)} must be (B, {len(temperatures)}, ...): a level a temperature")
    start = dense(x.detach().flatten(0, 1))
    state, ladder = begin(energy, start, grad_scale), _ladder(temperatures, chains, x.device)
    accepted, swapped = start.new_zeros(()), []
    for step in range(steps_before + 1, steps_before + num_steps + 1):
        state, probability = transition(
            energy,
            state,
            length=(2 * step_size) ** 0.5,
            num_leapfrog=1,
            temperature=ladder.flatten(),
            bounds=bounds,
            boundary=boundary,
            grad_scale=grad_scale,
            generator=generator,
        )
        accepted += probability.mean()
        if step % swap_every == 0:
            swapped += [swap_(state, ladder, first, generator) for first in (0, 1) if first + 1 < levels]
    cold = (part.unflatten(0, (chains, levels))[:, 0] for part in (start, state.x, state.grad))
    swap_acceptance = torch.cat(swapped, dim=1).mean() if swapped else accepted.new_zeros(())
    info = TemperingInfo(*describe(*cold, bounds), accepted / max(num_steps, 1), swap_acceptance)
    return state.x.unflatten(0, (chains, levels)), info


def swap_(state: State, ladder: Tensor, first: int, generator: Generators) -> Tensor:
    """Swap, in place, the pairs of levels (first, first + 1), (first + 2, first + 3), ... whose test says so. Returns
    the pairs' probabilities (B, pairs). `ladder` (B, L) are the temperatures of the B * L replicas of `state`."""
    pairs = (ladder.shape[1] - first) // 2
    # Views: what is written to them is in the state.
    parts = [*(part.unflatten(0, ladder.shape) for part in state), ladder]
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


def _ladder(temperatures: Sequence[float], chains: int, device: torch.device) -> Tensor:
    """(B, L), filled on the device: a copy from the host would wait for it."""
    ladder = torch.empty(chains, len(temperatures), device=device)
    for level, temperature in enumerate(temperatures):
        ladder[:, level].fill_(temperature)
    return ladder
