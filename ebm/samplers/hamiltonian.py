"""Hamiltonian Monte Carlo: proposals far away, along trajectories that keep the energy."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ebm.samplers.metropolis import MetropolisInfo, metropolis_chain
from ebm.streams import Generators


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
