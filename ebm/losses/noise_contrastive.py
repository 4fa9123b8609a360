"""Losses that tell data from draws of a known distribution: noise contrastive estimation and energy discrepancy."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ebm.losses.output import Energy, LossOutput, energies, energy_l2, output, squared_norm
from ebm.streams import Generators, normal_, uniform_


class GaussianNoise(NamedTuple):
    """N(mean, std**2) with independent components. `mean` and `std` are numbers, or tensors that broadcast to a state's
    shape, on the device of the states."""

    mean: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def draw_(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Fills `x` (B, *shape) with draws, in place."""
        return normal_(x, generator).mul_(self.std).add_(self.mean)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), (B,), in nats."""
        size = x[0].numel()
        if isinstance(self.std, Tensor):
            log_std: Tensor | float = self.std.log().expand(x.shape[1:]).sum()
        else:
            log_std = size * math.log(self.std)  # not by a tensor: made on the host, it would wait for the device
        return -squared_norm((x - self.mean) / self.std) / 2 - log_std - size * math.log(2 * math.pi) / 2


class UniformNoise(NamedTuple):
    """Uniform in [low, high) in every component. Data outside have no influence on the loss."""

    low: float = -1.0
    high: float = 1.0

    def draw_(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Fills `x` (B, *shape) with draws, in place."""
        return uniform_(x, generator, self.low, self.high)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x), (B,), in nats; -inf where a component is outside."""
        outside = ((x < self.low) | (x > self.high)).flatten(1)
        value = -outside.shape[1] * math.log(self.high - self.low)
        return x.new_full((len(x),), value).masked_fill(outside.any(1), -math.inf)


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
    2012, eq. 8). The log-odds are log p(x) - log noise(x) - log ratio with log p = -E - log_normaliser.

    The loss is consistent, and the energy becomes normalised: an energy with a bias learns it, while log_normaliser
    stays 0. For an energy without a bias, give a tensor that requires gradients. Noise and data must overlap, which
    in many dimensions they hardly do. `e_neg` are the energies of the noise. `x_neg` and `y_neg` are not used.
    """
    x_noise = noise.draw_(x_pos.new_empty(len(x_pos) * ratio, *x_pos.shape[1:]), generator)
    e_pos, e_neg = energies(energy, [x_pos, x_noise], [y_pos, y_pos])
    odds_pos = -e_pos - log_normaliser - noise.log_density(x_pos) - math.log(ratio)
    odds_neg = -e_neg - log_normaliser - noise.log_density(x_noise) - math.log(ratio)
    loss = softplus(-odds_pos).mean() + ratio * softplus(odds_neg).mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    right = torch.cat([odds_pos > 0, odds_neg < 0]).float().mean()
    return output(loss, e_pos, e_neg, accuracy=right)


def energy_discrepancy(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    time: float,
    num_samples: int = 16,
    stabiliser: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean log(w/M + 1/M sum_j exp(E(x) - E(x_j))), x_j = x + sqrt(time) (z + z_j), w = `stabiliser`, M = num_samples.

    Schroeder et al. (2023), eq. 9, at temperature 1: z, z_j ~ N(0, I), with the same z for all draws near a datum. At
    every `time` the minimum is the density of the data, for any w in the limit of many draws. For w = 1 it is so at
    every M: the loss is then that of picking the datum out of M + 1 candidates, given their common centre, which is
    consistent (ranking noise contrastive estimation, Ma & Collins 2018). `time` is a variance, in squared units of x.
    A small one is close to score matching; a large one is close to maximum likelihood, with more variance. `e_neg`
    are the energies of the draws, (M B,). `x_neg` and `y_neg` are not used.
    """
    scale = math.sqrt(time)
    centre = x_pos + scale * normal_(torch.empty_like(x_pos), generator)
    draws = normal_(x_pos.new_empty(len(x_pos), num_samples, *x_pos.shape[1:]), generator)
    draws = (centre[:, None] + scale * draws).flatten(0, 1)
    e_pos, e_neg = energies(energy, [x_pos, draws], [y_pos, y_pos])
    exponents = e_pos[:, None] - e_neg.view(-1, num_samples)
    if stabiliser:
        constant = torch.full_like(e_pos[:, None], math.log(stabiliser))
        exponents = torch.cat([constant, exponents], dim=1)
    loss = (exponents.logsumexp(1) - math.log(num_samples)).mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg)
