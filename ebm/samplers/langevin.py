"""Langevin dynamics: the loop in which over nine tenths of the training time is spent."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.config import LangevinConfig
from ebm.samplers.engine import Engine
from ebm.streams import Generators, generator, normal_, uniform_


class ChainInfo(NamedTuple):
    """What happened in a chain; each a float32 scalar on the chain's device, a mean over the batch."""

    grad_norm: Tensor  # norm of dE/dx at the last step, before the clamp
    displacement: Tensor  # norm of x_K - x_0
    saturated: Tensor  # share of components that end at a bound


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
    steps, noises = _per_step(step_size, num_steps, "step_size"), _per_step(noise_scale, num_steps, "noise_scale")
    start = _dense(x.detach())
    x, z = start.clone(), torch.empty_like(start)
    move = _mover(x.device.type)
    grad = torch.zeros_like(start)
    for step, noise in zip(steps, noises, strict=True):
        x.requires_grad_(True)
        with torch.enable_grad():
            total = energy(x).sum()
            (grad,) = torch.autograd.grad(total * grad_scale if grad_scale != 1 else total, x)
        x = x.detach()
        if grad_scale != 1:
            grad = grad / grad_scale
        move(x, grad, normal_(z, generator) if noise else None, step, noise, grad_clamp, bounds, boundary)
    return x, _describe(start, x, grad, bounds)


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
        from ebm.samplers.fused import move_ as fused

        return fused
    return move_


def _dense(x: Tensor) -> Tensor:
    """A float32 copy of `x`; images channels last, with strides that say so even for one channel, where
    `contiguous(memory_format=...)` leaves them ambiguous and convolutions then change layouts back and forth."""
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=layout).copy_(x)


def _keep_inside_(x: Tensor, bounds: tuple[float, float], boundary: str) -> None:
    low, high = bounds
    if boundary == "clamp":
        x.clamp_(low, high)
    elif boundary == "reflect":  # a triangle wave of period 2 (high - low): exact for steps of any length
        width = high - low
        x.sub_(low).remainder_(2 * width).sub_(width).abs_().neg_().add_(width + low).clamp_(low, high)
    else:
        raise ValueError(f"boundary={boundary!r} must be 'clamp' or 'reflect'")


def _describe(start: Tensor, x: Tensor, grad: Tensor, bounds: tuple[float, float] | None) -> ChainInfo:
    saturated = x.new_zeros(())
    if bounds is not None:
        saturated = ((x <= bounds[0]) | (x >= bounds[1])).float().mean()
    return ChainInfo(grad.flatten(1).norm(dim=1).mean(), (x - start).flatten(1).norm(dim=1).mean(), saturated)


def _per_step(value: float | Sequence[float], num_steps: int, name: str) -> Sequence[float]:
    if isinstance(value, int | float):
        return [value] * num_steps
    if len(value) != num_steps:
        raise ValueError(f"{name} has {len(value)} values for num_steps={num_steps}; give one number, or one a step")
    return value


def schedule(kind: str, start: float, end: float | None, num_steps: int) -> list[float]:
    """`num_steps` values from `start` to `end` (None: constant): "constant", "linear", "cosine" or "geometric"."""
    if kind == "constant" or end is None or num_steps == 1:
        return [start] * num_steps
    fractions = [k / (num_steps - 1) for k in range(num_steps)]
    if kind == "geometric":
        return [start * (end / start) ** f for f in fractions]
    if kind == "cosine":
        fractions = [(1 - math.cos(math.pi * f)) / 2 for f in fractions]
    return [start + (end - start) * f for f in fractions]


def settings_of(config: LangevinConfig, num_steps: int | None = None) -> dict:
    """The keyword arguments of `langevin` that a config asks for, with another number of steps where given."""
    num_steps = config.num_steps if num_steps is None else num_steps
    steps = schedule(config.schedule, config.step_size, config.step_size_end, num_steps)
    noises = schedule(config.schedule, config.noise, config.noise_scale_end, num_steps)
    if config.temperature is not None and config.noise_scale_end is None:
        noises = [math.sqrt(2 * step * config.temperature) for step in steps]
    return {
        "num_steps": num_steps,
        "step_size": steps,
        "noise_scale": noises,
        "grad_clamp": config.grad_clamp,
        "bounds": config.bounds,
        "boundary": config.boundary,
    }


def fresh_chains(
    energy: Callable[..., Tensor],
    config: LangevinConfig,
    shape: Sequence[int],
    num: int,
    num_steps: int,
    *,
    seed: int,
    device="cpu",
    num_classes: int | None = None,
    block: int = 512,
):
    """`num` chains of `num_steps` steps from uniform noise: states (num, *shape) and labels (num,) or None.

    Every 32 chains have generators of their own, so the first chains depend neither on `num` nor on `block`, the
    number computed at a time. Labels run through the classes in turn.
    """
    group, states, engine = 32, [], Engine(energy, capture=False)  # a graph pays off over many chains
    low, high = config.bounds or (-1.0, 1.0)
    labels = torch.arange(-(-num // group) * group, device=device) % num_classes if num_classes else None
    groups, at_once = range(-(-num // group)), max(1, block // group)
    for first in range(0, len(groups), at_once):
        numbers = groups[first : first + at_once]
        start, noise = ([generator(seed, purpose, n, device=device) for n in numbers] for purpose in ("start", "chain"))
        x = uniform_(torch.empty(len(numbers) * group, *shape, device=device), start, low, high)
        y = () if labels is None else (labels[first * group : first * group + len(x)],)
        x, _ = engine(langevin, x, *y, generator=noise, **settings_of(config, num_steps))
        states.append(x)
    return torch.cat(states)[:num], None if labels is None else labels[:num]
