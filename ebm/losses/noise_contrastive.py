"""Noise contrastive estimation: tell data from noise whose density is known."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ebm.losses.output import Energy, LossOutput, energies, terms
from ebm.losses.regularisers import energy_l2
from ebm.streams import Generators, normal_, uniform_


class GaussianNoise(NamedTuple):
    """N(mean, std**2), independent components; a number each, or tensors that broadcast to a state's shape."""

    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def draw_(self, x: Tensor, generator: Generators = None) -> Tensor:
        return normal_(x, generator).mul_(self.std).add_(self.mean)

    def log_density(self, x: Tensor) -> Tensor:
        std = torch.as_tensor(self.std, dtype=x.dtype, device=x.device).expand(x.shape[1:])
        squared = ((x - self.mean) / std).square().flatten(1).sum(1)
        return -squared / 2 - std.log().sum() - std.numel() * math.log(2 * math.pi) / 2


class UniformNoise(NamedTuple):
    """Uniform in [low, high) in every component. Data outside tell nothing: noise never gets there."""

    low: float = -1.0
    high: float = 1.0

    def draw_(self, x: Tensor, generator: Generators = None) -> Tensor:
        return uniform_(x, generator, self.low, self.high)

    def log_density(self, x: Tensor) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).flatten(1)
        value = -inside.shape[1] * math.log(self.high - self.low)
        return torch.where(inside.all(1), value, -torch.inf).to(x.dtype)


def noise_contrastive(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    noise: GaussianNoise | UniformNoise,
    ratio: int = 1,
    log_normaliser: Tensor | float = 0.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """The logistic loss of telling data from `ratio` times as many draws of `noise` (Gutmann & Hyvarinen 2010, eq. 3;
    2012, eq. 8), by the log-odds log p(x) - log noise(x) - log ratio with log p = -E - log_normaliser.

    Consistent, and the energy comes out normalised: an energy with a bias learns it, log_normaliser staying 0; for
    one without, give a tensor that requires gradients. Works where noise and data overlap, which in many dimensions
    they hardly do. "e_neg" are the energies of the noise. `x_neg`, `y_neg` are not used.
    """
    x_noise = noise.draw_(x_pos.new_empty(len(x_pos) * ratio, *x_pos.shape[1:]), generator)
    e_pos, e_neg = energies(energy, [x_pos, x_noise], [y_pos, y_pos])
    odds_pos = -e_pos - log_normaliser - noise.log_density(x_pos) - math.log(ratio)
    odds_neg = -e_neg - log_normaliser - noise.log_density(x_noise) - math.log(ratio)
    loss = softplus(-odds_pos).mean() + ratio * softplus(odds_neg).mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    right = torch.cat([odds_pos > 0, odds_neg < 0]).float().mean()
    return LossOutput(loss, terms(e_pos=e_pos, e_neg=e_neg, accuracy=right))
