"""Langevin dynamics: the loop in which over nine tenths of the training time is spent."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ebm.samplers.base import Bounds, ChainInfo, Energy, check_domain, dense, describe, evaluate, per_step, reflected
from ebm.streams import Generators, Philox, fused_or, normal_

BOUNDARIES = ("clamp", "reflect")
Move = Callable[[Tensor, Tensor, Tensor | Philox | None, float, float, float | None, Bounds, str], None]


def langevin(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Sequence[float],
    noise_scale: float | Sequence[float],
    grad_clamp: float | None = None,
    bounds: Bounds = None,
    boundary: str = "clamp",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, ChainInfo]:
    """Takes `num_steps` steps x <- x - step_size * dE/dx + noise_scale * z, z ~ N(0, I); `x` itself is left alone.

    The unadjusted Langevin algorithm (Parisi 1981; Welling & Teh 2011, eq. 4 with all the data). At noise_scale**2 =
    2 * step_size * T it samples exp(-E / T), with a bias that falls with the step size. Short chains of image
    energies use a far smaller noise, which samples at T = noise_scale**2 / (2 * step_size) (Nijkamp et al. 2019).

    Args:
        energy: states (B, *shape) -> energies (B,).
        x: initial states (B, *shape); states, noise and updates are float32 whatever type the energy computes in.
        step_size, noise_scale: a number, or one for each step.
        grad_clamp: each component of dE/dx is clamped to +- this.
        bounds, boundary: states are kept in [low, high] by "clamp" or "reflect".
        grad_scale: see `ebm.samplers.base.evaluate`.
        generator: draws the noise; a list of generators cuts the batch into equal parts, one for each
            (`ebm.streams.normal_`).

    Returns the states after the last step, (B, *shape) float32, and ChainInfo.
    """
    check_domain(bounds, boundary, BOUNDARIES)
    steps, noises = per_step(step_size, num_steps, "step_size"), per_step(noise_scale, num_steps, "noise_scale")
    start = dense(x.detach())
    x, grad = start.clone(), torch.zeros_like(start)
    move = _mover(x.device.type)
    z = generator if isinstance(generator, Philox) else torch.empty_like(start)
    for step, noise in zip(steps, noises, strict=True):
        _, grad = evaluate(energy, x, grad_scale)
        if noise and isinstance(z, Tensor):
            normal_(z, generator)
        move(x, grad, z if noise else None, step, noise, grad_clamp, bounds, boundary)
    return x, describe(start, x, grad, bounds)


def move_(
    x: Tensor,
    grad: Tensor,
    z: Tensor | Philox | None,
    step: float,
    noise: float,
    grad_clamp: float | None,
    bounds: Bounds,
    boundary: str,
) -> None:
    """Moves `x` by one step in place, given the gradient and the noise `z` or what draws it."""
    if isinstance(z, Philox):
        z = normal_(torch.empty_like(x), z)
    x.add_(grad if grad_clamp is None else grad.clamp(-grad_clamp, grad_clamp), alpha=-step)
    if z is not None:
        x.add_(z, alpha=noise)
    if bounds is not None and boundary == "clamp":
        x.clamp_(*bounds)
    elif bounds is not None:
        x.copy_(reflected(x, bounds)[0])


@cache
def _mover(device: str) -> Move:
    """The update for a type of device: on CUDA one kernel where triton is installed and can build it, else `move_`."""

    def load() -> Move:
        from ebm.kernels import move_ as fused

        return fused

    return fused_or(move_, load, "the fused Langevin update") if device == "cuda" else move_
