"""Langevin dynamics: the loop in which over nine tenths of the training time is spent. And what follows the gradient
without noise: the flow x' = -dE/dx, and descent with momentum."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ebm.samplers.base import Bounds, ChainInfo, Energy, check_domain, dense, describe, evaluate, per_step, reflected
from ebm.streams import Generators, Philox, fused_or, normal_, num_parts

BOUNDARIES = ("clamp", "reflect", "end")
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
    noise_scale_from_data: float | None = None,
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
        bounds, boundary: states are kept in [low, high] by "clamp" or "reflect"; or "end": clamped after the last step.
        noise_scale_from_data: that of the first half of each generator's chains, at every step, where these start at
            data and a schedule of `noise_scale` is for the others.
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
    within = None if boundary == "end" else bounds
    for step, noise in zip(steps, noises, strict=True):
        _, grad = evaluate(energy, x, grad_scale)
        if noise_scale_from_data is not None:
            draws = normal_(torch.empty_like(start), generator)
            draws *= torch.where(_first_halves(start, num_parts(generator)), noise_scale_from_data, noise)
            move(x, grad, draws, step, 1.0, grad_clamp, within, boundary)
            continue
        if noise and isinstance(z, Tensor):
            normal_(z, generator)
        move(x, grad, z if noise else None, step, noise, grad_clamp, within, boundary)
    if boundary == "end" and bounds is not None:
        x.clamp_(*bounds)
    return x, describe(start, x, grad, bounds)


def _first_halves(x: Tensor, parts: int) -> Tensor:
    """Which states (B, *shape) are in the first half of their part: bool, of a shape that broadcasts over them."""
    size = len(x) // parts
    return (torch.arange(len(x), device=x.device) % size < size // 2).view(-1, *[1] * (x.ndim - 1))


def flow(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    end: float,
    method: str = "heun",
    tolerance: float = 0.0,
    bounds: Bounds = None,
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, ChainInfo]:
    """Follows x' = -dE/dx from time 0 to `end` in `num_steps` equal steps, by "heun" (order 2) or "euler" (order 1).

    It carries noise at time 0 to data at time 1 where E was trained by `energy_matching`, and further down the energy
    beyond. A chain stops once the root mean square of dE/dx over its components is at most `tolerance`, if that is not
    0. `bounds`: states are clamped after the last step. `generator` is not used.

    Returns the states at the end, (B, *shape) float32, and ChainInfo.
    """
    check_domain(bounds, "end", BOUNDARIES)
    start, step = dense(x.detach()), end / max(num_steps, 1)
    x, grad, moving = start, torch.zeros_like(start), torch.ones(len(start), dtype=torch.bool, device=start.device)
    for _ in range(num_steps):
        _, grad = evaluate(energy, x, grad_scale)
        ahead = x - step * grad
        if method == "heun":
            ahead = x - step / 2 * (grad + evaluate(energy, ahead, grad_scale)[1])
        x, moving = _where_moving(moving, ahead, x, grad, tolerance)
        if _all_stopped(moving, tolerance):
            break
    return _clamped(x, bounds), describe(start, x, grad, bounds)


def nesterov(
    energy: Energy,
    x: Tensor,
    *,
    num_steps: int,
    step_size: float,
    momentum: float = 0.3,
    tolerance: float = 0.0,
    bounds: Bounds = None,
    grad_scale: float = 1.0,
    generator: Generators = None,
) -> tuple[Tensor, ChainInfo]:
    """Descends by x <- y - step_size * dE/dx(y), y = x + momentum * (x - the x before) (Nesterov 1983; Wang & Du 2025
    sample by it what `equilibrium_matching` has trained). `tolerance`, `bounds` and `generator` as in `flow`.

    Returns the states after the last step, (B, *shape) float32, and ChainInfo.
    """
    check_domain(bounds, "end", BOUNDARIES)
    start = dense(x.detach())
    x, grad, moving = start, torch.zeros_like(start), torch.ones(len(start), dtype=torch.bool, device=start.device)
    velocity = torch.zeros_like(start)
    for _ in range(num_steps):
        ahead = x + momentum * velocity
        _, grad = evaluate(energy, ahead, grad_scale)
        new, moving = _where_moving(moving, ahead - step_size * grad, x, grad, tolerance)
        x, velocity = new, new - x
        if _all_stopped(moving, tolerance):
            break
    return _clamped(x, bounds), describe(start, x, grad, bounds)


def _where_moving(moving: Tensor, ahead: Tensor, x: Tensor, grad: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """`ahead` for the chains that move on, `x` for those that have stopped or stop here, and which still move."""
    if not tolerance:
        return ahead, moving
    moving = moving & (grad.flatten(1).square().mean(1).sqrt() > tolerance)
    return torch.where(moving.view(-1, *[1] * (x.ndim - 1)), ahead, x), moving


def _all_stopped(moving: Tensor, tolerance: float) -> bool:
    """Whether no chain moves any more. On a GPU, where the host would wait for the answer, it is not asked."""
    return tolerance > 0 and moving.device.type == "cpu" and not bool(moving.any())


def _clamped(x: Tensor, bounds: Bounds) -> Tensor:
    return x if bounds is None else x.clamp(*bounds)


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
