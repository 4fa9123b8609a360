"""Dual score matching: the energy of every level of noise, up to one constant (Guth, Kadkhodaie & Simoncelli 2025)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ebm.losses.output import (
    LossOutput,
    at_least_float32,
    gradients_of,
    output,
    per_state,
    squared_norm,
    without_float16,
)
from ebm.losses.score_matching import spread_levels
from ebm.streams import Generators, normal_

LevelEnergy = Callable[..., Tensor]  # x (B, *shape), t (B,), and labels (B,) where it is class-conditional -> (B,)


def dual_score_matching(
    energy: LevelEnergy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    t_min: float,
    t_max: float,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |z - sqrt(t) dU/dx|**2 / D + mean ((1 - |z|**2 / D) / 2 - (t / D) dU/dt)**2 at x = x_pos + sqrt(t) z,
    z ~ N(0, I), for an energy U(x, t) of the noisy state and its variance of noise t.

    The first term is denoising score matching, the second the same in time: with p_t the density of the noisy data,
    the mean of z / sqrt(t) given x is minus the score of p_t, and that of D / (2 t) - |z|**2 / (2 t) is
    -d log p_t / dt (Guth et al. 2025, eq. 5 to 8). The minimum is U(x, t) = -log p_t(x) + c with one constant c for all
    t, which `log_normaliser` finds: the energy at t_min is then a likelihood.

    Variances of noise are spread over [t_min, t_max] by `spread_levels`; the paper has them from far below the square
    of a pixel's bin to far above the data's variance. Terms: "space" and "time". `x_neg` and `y_neg` are not used.
    """
    size = x_pos[0].numel()
    z = normal_(torch.empty_like(x_pos), generator)
    t = spread_levels(x_pos, t_min, t_max, generator).requires_grad_(True)
    scale = per_state(t.detach().sqrt(), x_pos)
    x = (x_pos + scale * z).detach().requires_grad_(True)
    u = level_energy(energy, x, t, y_pos)
    in_space, in_time = gradients_of(u.sum(), [x, t])
    space = (z - scale * in_space).square().mean()
    time = ((1 - z.square().flatten(1).mean(1)) / 2 - t.detach() / size * in_time).square().mean()
    return output(space + time, space=space, time=time)


def log_normaliser(
    energy: LevelEnergy, x_pos: Tensor, t_max: float, y_pos: Tensor | None = None, generator: Generators = None
) -> Tensor:
    """The constant C with -log p_t(x) = U(x, t) + C in nats, a scalar, for an energy trained by `dual_score_matching`.

    At a variance of noise t_max far above the data's, the noisy data are almost Gaussian. C is the mean of
    -log N(x; m, (t_max + v) I) - U(x, t_max) over them, with m the data's mean and v the mean variance of a component
    (Guth et al. 2025, eq. 10, who leave m and v out). `x_pos`: (B, *shape), the more the better.
    """
    size, mean = x_pos[0].numel(), x_pos.mean(0)
    variance = t_max + (x_pos - mean).square().mean()
    x = x_pos + math.sqrt(t_max) * normal_(torch.empty_like(x_pos), generator)
    with torch.no_grad():
        u = level_energy(energy, x, x.new_full((len(x),), t_max), y_pos)
    gaussian = squared_norm(x - mean) / (2 * variance) + size / 2 * torch.log(2 * math.pi * variance)
    return (gaussian - u).mean()


def level_energy(energy: LevelEnergy, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """U(x, t) (B,), computed without float16, in float32 or what is wider."""
    with without_float16(x.device.type):
        return at_least_float32(energy(x, t, *(() if y is None else (y,))))
