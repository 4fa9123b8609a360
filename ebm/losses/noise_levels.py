"""Dual score matching, and contrastive divergence of the joint density of states and noise levels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm.energies.noise_conditional import conditioned_on_noise, with_noise_level
from ebm.losses.output import (
    Energy,
    LossOutput,
    energies,
    energy_and_gradient,
    energy_l2,
    output,
    per_state,
    squared_norm,
)
from ebm.streams import Generators, normal_, uniform_


def dual_score_matching(
    energy: nn.Module,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    contrastive_weight: float = 0.0,
    log_variances: Sequence[float] = (),
    lowest_share: float | None = None,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean_D |sqrt(t) dE/dx - z|^2 + ((1 - mean_D z^2) / 2 - (1 / D) dE/d log t)^2 at x + sqrt(t) z, of E(x, t).

    Guth, Kadkhodaie & Simoncelli (2025), eq. 9: both the score and the change with the noise's variance t are matched,
    so that E(., t) is -log p_t up to one constant for all levels: the weights of far modes, which the score at one
    level hardly sees, follow from the levels at which they overlap. log t is uniform over the energy's range.

    With chains `x_neg`, states that carry their levels (`ebm.samplers.noise_levels`), `contrastive_weight` times
    mean E(x + sqrt(t) z, t) - mean E(x_neg) is added, t drawn from `log_variances` with the chains' `lowest_share`:
    the gradient of the likelihood of the joint density of states and levels (Zhang, Tan & Ou 2023, eq. 9).
    """
    e_pos, score, change = dual_terms(energy, x_pos, conditioned_on_noise(energy).log_variances, y_pos, generator)
    loss, terms = score + change, {"score": score, "level": change}
    if x_neg is None:
        return output(loss if not l2 else loss + l2 * energy_l2(e_pos), e_pos, **terms)
    noisy = at_noise_levels(x_pos, log_variances, lowest_share, generator)
    e_pos, e_neg = energies(energy, [noisy, x_neg.detach()], [y_pos, y_neg])
    contrast = e_pos.mean() - e_neg.mean()
    loss = loss + contrastive_weight * contrast
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg, **terms, contrast=contrast)


def dual_terms(
    energy: Energy,
    x_pos: Tensor,
    log_variances: tuple[float, float],
    y_pos: Tensor | None = None,
    generator: Generators = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """E (B,) of noisy data that carry their levels, and the terms of `dual_score_matching` in x and in t, scalars.

    Given the noisy state, the mean of z / sqrt(t) is minus the score of p_t, and the mean of (D - |z|^2) / 2 is
    -d log p_t / d log t. `log_variances`: the range of log t.
    """
    level = uniform_(x_pos.new_empty(len(x_pos)), generator, *log_variances)
    x, z = _with_noise(x_pos, level, generator)
    e, gradient = energy_and_gradient(energy, with_noise_level(x, level).requires_grad_(True), y_pos)
    in_x, in_level = gradient[:, :-1], gradient[:, -1:].flatten(1).sum(1)
    scores = (per_state(level / 2, x).exp() * in_x - z).flatten(1).square().mean(1)
    changes = ((1 - z.flatten(1).square().mean(1)) / 2 - in_level / x[0].numel()).square()
    return e, scores.mean(), changes.mean()


def log_normaliser(
    energy: Energy, x_pos: Tensor, t_max: float, y_pos: Tensor | None = None, generator: Generators = None
) -> Tensor:
    """The constant C with -log p_t(x) = E(x, t) + C in nats, a scalar, for an energy trained by `dual_score_matching`.

    At a variance of noise t_max far above the data's, the noisy data are almost Gaussian. C is the mean of
    -log N(x; m, (t_max + v) I) - E(x, t_max) over them, with m the data's mean and v the mean variance of a component
    (Guth et al. 2025, who leave m and v out). `x_pos`: (B, *shape), the more the better.
    """
    mean = x_pos.mean(0)
    variance = t_max + (x_pos - mean).square().mean()
    level = x_pos.new_full((len(x_pos),), math.log(t_max))
    x, _ = _with_noise(x_pos, level, generator)
    with torch.no_grad():
        (e,) = energies(energy, [with_noise_level(x, level)], [y_pos])
    gaussian = squared_norm(x - mean) / (2 * variance) + x[0].numel() / 2 * torch.log(2 * math.pi * variance)
    return (gaussian - e).mean()


def at_noise_levels(
    x: Tensor, log_variances: Sequence[float], lowest_share: float | None = None, generator: Generators = None
) -> Tensor:
    """Data `x` with noise of a level drawn for each datum, and that level in a further plane: a draw of the joint
    density of states and levels. `log_variances` ascend evenly; `lowest_share` is the probability of the lowest, None:
    that of the others."""
    low, spacing, highest = log_variances[0], log_variances[1] - log_variances[0], len(log_variances) - 1
    share = 1 / (highest + 1) if lowest_share is None else lowest_share
    u = uniform_(x.new_empty(len(x)), generator)
    indices = ((u - share) / (1 - share) * highest + 1).floor().clamp(0, highest)
    level = low + spacing * indices
    return with_noise_level(_with_noise(x, level, generator)[0], level)


def _with_noise(x: Tensor, level: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """x + sqrt(t) z and z, for log variances `level` (B,)."""
    z = normal_(torch.empty_like(x), generator)
    return x + per_state(level / 2, x).exp() * z, z
