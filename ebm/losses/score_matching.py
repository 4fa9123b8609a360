"""Score matching: implicit, sliced, denoising, multi-level denoising and dual. None needs samples of the model or its
normaliser. Contrastive divergence of the joint density of states and noise levels goes on where dual score matching
ends."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm.energies.base import conditioned_on_noise, split_noise_level, with_noise_level
from ebm.losses.output import (
    Energy,
    LossOutput,
    energies,
    energy_and_gradient,
    energy_l2,
    gradient_of,
    output,
    per_state,
    squared_norm,
)
from ebm.streams import Generators, normal_, num_parts, uniform_

PIECEWISE_LINEAR = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold)


def implicit_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    trace: str = "exact",
    num_projections: int = 1,
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |s|**2 / 2 + tr(ds/dx), with the score s = -dE/dx / temperature (Hyvarinen 2005, eq. 4).

    The loss is consistent for densities on all of R^n. Discrete data must be dequantised. `trace="exact"` runs one
    backward for each component of x; "hutchinson" estimates the trace by v' (ds/dx) v with `num_projections` draws of
    v = +-1 (Hutchinson 1990), one backward for each. `x_neg` and `y_neg` are not used.

    Raises ValueError for a piecewise linear energy (`refuse_piecewise_linear`), and for another `trace`.
    """
    refuse_piecewise_linear(energy)
    x, e_pos, score = _score(energy, x_pos, y_pos, temperature)
    if trace == "exact":
        divergence = _trace(score, x)
    elif trace == "hutchinson":
        signs = (uniform_(_repeated(x, num_projections), generator, -1, 1) >= 0).to(x.dtype) * 2 - 1
        divergence = torch.stack([_curvature(score, x, v) for v in signs.unbind(1)]).mean(0)
    else:
        raise ValueError(f"trace={trace!r} must be 'exact' or 'hutchinson'")
    return _output(e_pos, squared_norm(score), divergence, l2)


def sliced_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    num_projections: int = 1,
    variance_reduction: bool = True,
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean (v's)**2 / 2 + v' (ds/dx) v over v ~ N(0, I), with the score s = -dE/dx / temperature.

    This is sliced score matching (Song et al. 2019, eq. 7). Variance reduction replaces (v's)**2 by its mean, |s|**2
    (eq. 8). The loss is consistent where `implicit_score_matching` is, and refuses the same energies.
    """
    refuse_piecewise_linear(energy)
    x, e_pos, score = _score(energy, x_pos, y_pos, temperature)
    directions = normal_(_repeated(x, num_projections), generator)
    divergence = torch.stack([_curvature(score, x, v) for v in directions.unbind(1)]).mean(0)
    if variance_reduction:
        squared = squared_norm(score)
    else:
        squared = (directions * score[:, None]).flatten(2).sum(2).square().mean(1)
    return _output(e_pos, squared, divergence, l2)


def refuse_piecewise_linear(energy: Energy) -> None:
    """Raises ValueError if `energy` holds a layer such as ReLU, whose second derivative is 0 wherever it exists: the
    trace vanishes, and a constant minimises the loss. Functions that `forward` calls are not noticed."""
    for name, layer in energy.named_modules() if isinstance(energy, nn.Module) else ():
        if isinstance(layer, PIECEWISE_LINEAR):
            raise ValueError(
                f"{name} is a {type(layer).__name__}: the second derivatives that score matching needs are 0; "
                "use nn.SiLU or nn.Softplus, or loss.kind=denoising, which needs none"
            )


def _score(energy: Energy, x_pos: Tensor, y_pos: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x as a leaf, E(x) (B,) and the score at x (B, *shape)."""
    x = x_pos.detach().requires_grad_(True)
    e_pos, gradient = energy_and_gradient(energy, x, y_pos)
    return x, e_pos, -gradient / temperature


def _repeated(x: Tensor, times: int) -> Tensor:
    """Empty memory for `times` draws a state, (B, times, *shape), with the draws of a state next to each other."""
    return x.new_empty(len(x), times, *x.shape[1:])


def _curvature(score: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """v' (ds/dx) v, (B,)"""
    product = gradient_of((score * v).sum(), x)
    return (product * v).flatten(1).sum(1)


def _trace(score: Tensor, x: Tensor) -> Tensor:
    """tr(ds/dx), (B,)"""
    rows = score.flatten(1).sum(0)  # a state's score depends on that state alone
    columns = [gradient_of(s, x).flatten(1) for s in rows]
    return torch.stack([column[:, i] for i, column in enumerate(columns)]).sum(0)


def _output(e_pos: Tensor, squared: Tensor, divergence: Tensor, l2: float) -> LossOutput:
    loss = (squared / 2 + divergence).mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos)
    return output(loss, e_pos, score_squared=squared.mean(), trace=divergence.mean())


def denoising_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    sigma: float,
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |sigma s(x + sigma z) + z|**2 / 2, z ~ N(0, I), with the score s = -dE/dx / temperature.

    This is Vincent (2011), eq. 9, times sigma**2. Its minimum is not the density of the data but that density smoothed
    by N(0, sigma**2): for Gaussian data with covariance C it has covariance C + sigma**2 I. `e_pos` are energies of
    the noisy data. `x_neg` and `y_neg` are not used.
    """
    z = normal_(torch.empty_like(x_pos), generator)
    x = (x_pos + sigma * z).detach().requires_grad_(True)
    e_pos, gradient = energy_and_gradient(energy, x, y_pos)
    loss = squared_norm(z - sigma * gradient / temperature).mean() / 2
    if l2:
        loss = loss + l2 * energy_l2(e_pos)
    return output(loss, e_pos)


def multilevel_denoising(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    sigma: float,
    sigma_min: float,
    sigma_max: float,
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |(sigma**2 / sigma_i) s(x + sigma_i z) + z|**2 / 2, z ~ N(0, I), with the score s = -dE/dx / temperature.

    Multi-level denoising (Li, Chen & Sommer 2019, arXiv 1910.07762, times sigma**4): the data get noise of many levels
    sigma_i, and at all of them the target of s is the displacement divided by the one variance sigma**2. It does not
    contradict itself between levels: a state far from the data has a gradient in proportion to its distance, whereas
    the target z / sigma_i of denoising score matching differs at one state with the level it was drawn at.

    In many dimensions a noisy state's distance from the data tells its level. The minimum then has the score of the
    data smoothed by N(0, sigma**2) where that density has its mass, and around the levels sigma_i the score of the
    data smoothed by N(0, sigma_i**2), times (sigma_i / sigma)**2. For sigma_min = sigma_max = sigma this is
    `denoising_score_matching`. The levels are those of `spread_levels`. `e_pos` are energies of the noisy data.
    `x_neg` and `y_neg` are not used.
    """
    z = normal_(torch.empty_like(x_pos), generator)
    level = per_state(spread_levels(x_pos, sigma_min, sigma_max, generator), x_pos)
    x = (x_pos + level * z).detach().requires_grad_(True)
    e_pos, gradient = energy_and_gradient(energy, x, y_pos)
    loss = squared_norm(z - sigma**2 / level * gradient / temperature).mean() / 2
    if l2:
        loss = loss + l2 * energy_l2(e_pos)
    return output(loss, e_pos)


def spread_levels(x: Tensor, low: float, high: float, generator: Generators = None) -> Tensor:
    """A level in [low, high] for each state of `x`, (B,), log-uniform as `spread` has it."""
    return low * torch.exp(spread(x, generator) * math.log(high / low))


def spread(x: Tensor, generator: Generators = None) -> Tensor:
    """A number for each state of `x`, (B,). In each generator's part of n states the i-th is drawn uniformly from the
    i-th of n equal intervals of [0, 1]."""
    size = len(x) // num_parts(generator)
    interval = torch.arange(len(x), device=x.device) % size
    return (interval + uniform_(x.new_empty(len(x)), generator)) / size


def dual_score_matching(
    energy: nn.Module,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    contrastive_weight: float = 0.0,
    log_variances: Sequence[float] | None = None,
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

    With chains `x_neg`, states that carry their levels (`ebm.samplers.levels`), `contrastive_weight` times
    mean E(x + sqrt(t) z, t) - mean E(x_neg) is added, t drawn from `log_variances` with the chains' `lowest_share`:
    the gradient of the likelihood of the joint density of states and levels (Zhang, Tan & Ou 2023, eq. 9), within each
    class where there are labels (`contrast_of`). Without `log_variances` each chain is compared with a datum that has
    noise of its level (`beside_chains`): the gradient of the likelihood at each level that the chains are at, which
    leaves the weights of the levels to the term in t.
    """
    e_pos, score, change = dual_terms(energy, x_pos, conditioned_on_noise(energy).log_variances, y_pos, generator)
    loss, terms = score + change, {"score": score, "level": change}
    if x_neg is None:
        return output(loss if not l2 else loss + l2 * energy_l2(e_pos), e_pos, **terms)
    if log_variances is None:
        noisy, found = beside_chains(x_pos, x_neg, y_pos, y_neg, generator)
        e_pos, e_neg = energies(energy, [noisy, x_neg.detach()], [y_neg, y_neg])
        contrast = (found * (e_pos - e_neg)).mean()
    else:
        noisy = at_noise_levels(x_pos, log_variances, lowest_share, generator)
        e_pos, e_neg = energies(energy, [noisy, x_neg.detach()], [y_pos, y_neg])
        contrast = contrast_of(e_pos, e_neg, y_pos, y_neg, num_parts(generator))
    loss = loss + contrastive_weight * contrast
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg, **terms, contrast=contrast)


def beside_chains(
    x_pos: Tensor, x_neg: Tensor, y_pos: Tensor | None, y_neg: Tensor | None, generator: Generators = None
) -> tuple[Tensor, Tensor]:
    """For each chain `x_neg` (B, *chain_shape) a datum of its generator's part, drawn from those of the chain's class,
    with noise of the chain's level; and whether there is one, 1 or 0, (B,)."""
    level, parts = split_noise_level(x_neg.detach())[1], num_parts(generator)
    share = len(x_pos) // parts
    preference = uniform_(x_pos.new_empty(len(x_pos), share), generator).view(parts, share, share)
    same = torch.ones_like(preference)
    if y_pos is not None and y_neg is not None:
        same = (y_neg.view(parts, -1, 1) == y_pos.view(parts, 1, -1)).to(preference.dtype)
    best, chosen = (same * (1 + preference)).max(2)
    first = share * torch.arange(parts, device=x_pos.device).unsqueeze(1)
    noisy, _ = _with_noise(x_pos[(chosen + first).flatten()], level, generator)
    return with_noise_level(noisy, level), (best > 0).to(x_pos.dtype).flatten()


def contrast_of(e_pos: Tensor, e_neg: Tensor, y_pos: Tensor | None, y_neg: Tensor | None, parts: int = 1) -> Tensor:
    """mean E(data) - mean E(chains), a scalar. With labels each datum is compared with its class's chains of its part.

    Chains that never restart keep their classes, whose shares then differ from the data's for the whole run. The plain
    difference would push the energies of whole classes apart for ever.
    """
    if y_pos is None or y_neg is None:
        return e_pos.mean() - e_neg.mean()
    same = (y_pos.view(parts, -1, 1) == y_neg.view(parts, 1, -1)).to(e_pos.dtype)
    of_class = same.sum(2, keepdim=True)
    weights = (same / of_class.clamp(min=1)).sum(1).flatten()  # a chain's share of the data of its class
    matched = (of_class > 0).to(e_pos.dtype).flatten()
    return (matched * e_pos).mean() - (weights * e_neg).sum() / len(e_pos)


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
    above = (u - share) / (1 - share) if share < 1 else u - 1
    indices = (above * highest + 1).floor().clamp(0, highest)
    level = low + spacing * indices
    return with_noise_level(_with_noise(x, level, generator)[0], level)


def _with_noise(x: Tensor, level: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
    """x + sqrt(t) z and z, for log variances `level` (B,)."""
    z = normal_(torch.empty_like(x), generator)
    return x + per_state(level / 2, x).exp() * z, z
