"""Langevin dynamics: the loop in which over nine tenths of the training time is spent."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ebm.samplers.base import ChainInfo, dense, describe, evaluate, per_step
from ebm.streams import Generators, normal_


def langevin(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    num_steps: int,
    step_size: float | Sequence[float],
    noise_scale: float | Sequence[float],
    grad_clamp: float | None = None,
    bounds: tuple[float, float] | None = None,
    boundary: str = "clamp",
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, ChainInfo]:
    """`num_steps` times x <- x - step_size * dE/dx + noise_scale * z, z ~ N(0, I); `x` itself is left alone.

    The unadjusted Langevin algorithm (Parisi 1981; Welling & Teh 2011, eq. 4 with all the data). At noise_scale**2 =
    2 * step_size * T it samples exp(-E / T), with a bias that falls with the step size. Short chains of image
    energies use a far smaller noise, which samples at T = noise_scale**2 / (2 * step_size) (Nijkamp et al. 2019).

    Args:
        energy: states (B, *shape) -> energies (B,).
        x: initial states (B, *shape); states, noise and updates are float32 whatever type the energy computes in.
        step_size, noise_scale: a number, or one for each step.
        grad_clamp: each component of dE/dx is clamped to +- this.
        bounds, boundary: states stay in [low, high], by "clamp" or "reflect".
        grad_scale: E is multiplied and dE/dx divided by it, so that float16 gradients do not vanish.
        generator: of the noise; a list of them cuts the batch into equal parts, one each (`ebm.streams.normal_`).

    Returns the states after the last step, (B, *shape) float32, and ChainInfo.
    """
    steps, noises = per_step(step_size, num_steps, "step_size"), per_step(noise_scale, num_steps, "noise_scale")
    start = dense(x.detach())
    x, z = start.clone(), torch.empty_like(start)
    move = _mover(x.device.type)
    grad = torch.zeros_like(start)
    for step, noise in zip(steps, noises, strict=True):
        _, grad = evaluate(energy, x, grad_scale)
        move(x, grad, normal_(z, generator) if noise else None, step, noise, grad_clamp, bounds, boundary)
    return x, describe(start, x, grad, bounds)


def move_(
    x: Tensor,
    grad: Tensor,
    z: Tensor | None,
    step: float,
    noise: float,
    grad_clamp: float | None,
    bounds: tuple[float, float] | None,
    boundary: str,
) -> None:
    """One update of `x` in place: all of a step but the network and the drawing of `z`."""
    x.add_(grad if grad_clamp is None else grad.clamp(-grad_clamp, grad_clamp), alpha=-step)
    if z is not None:
        x.add_(z, alpha=noise)
    if bounds is not None:
        _keep_inside_(x, bounds, boundary)


@cache
def _mover(device: str) -> Callable[..., None]:
    """`move_`, on CUDA as one kernel."""
    if device == "cuda" and find_spec("triton"):
        from ebm.samplers.kernels import move_ as fused

        return fused
    return move_


def _keep_inside_(x: Tensor, bounds: tuple[float, float], boundary: str) -> None:
    low, high = bounds
    if boundary == "clamp":
        x.clamp_(low, high)
    elif boundary == "reflect":  # a triangle wave of period 2 (high - low): exact for steps of any length
        width = high - low
        x.sub_(low).remainder_(2 * width).sub_(width).abs_().neg_().add_(width + low).clamp_(low, high)
    else:
        raise ValueError(f"boundary={boundary!r} must be 'clamp' or 'reflect'")
