"""Langevin dynamics: the loop in which over nine tenths of the training time is spent."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ebm.samplers.base import Bounds, ChainInfo, Energy, check_domain, dense, describe, evaluate, per_step, reflected
from ebm.streams import Generators, normal_

log = logging.getLogger(__name__)

BOUNDARIES = ("clamp", "reflect")
Move = Callable[[Tensor, Tensor, Tensor | None, float, float, float | None, Bounds, str], None]


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
    bounds: Bounds,
    boundary: str,
) -> None:
    """Moves `x` by one step in place, given the gradient and the noise `z`."""
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
    return _one_kernel() if device == "cuda" and find_spec("triton") else move_


def _one_kernel() -> Move:
    """The update as one kernel until it fails to build, and `move_` from then on. Triton needs a C compiler at run
    time, which slim containers lack, and builds at the first call for each combination of settings."""
    builds = True

    def move(x: Tensor, *rest: Any) -> None:
        nonlocal builds
        if builds:
            try:
                from ebm.samplers.kernels import move_ as fused

                fused(x, *rest)
                return
            except torch.OutOfMemoryError:
                raise
            # Whatever a compiler, its absence or a broken installation raises. Nothing has been launched then.
            except Exception as error:
                if x.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise  # the capture failed, not the kernel: it was built in the chain before
                builds = False
                reason = str(error).partition("\n")[0]
                log.warning("the fused Langevin update can't be built, several kernels do its work: %s", reason)
        move_(x, *rest)

    return move
