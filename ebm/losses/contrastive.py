"""Losses that compare data with samples. Of the model: contrastive divergence, its improved form, recovery likelihood
and JEM. Of a known distribution: noise contrastive estimation and energy discrepancy."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, softplus

from ebm.energies import LatentEnergy, marginal_energy
from ebm.energies.base import conditioned_on_noise, split_noise_level
from ebm.losses.output import (
    Energy,
    LossOutput,
    at_least_float32,
    energies,
    energy_and_gradient,
    energy_l2,
    output,
    per_state,
    squared_norm,
)
from ebm.losses.score_matching import spread
from ebm.samplers.base import inside
from ebm.streams import Generators, normal_, num_parts, uniform_


class HasClasses(Protocol):
    """An energy E(x, y) that gives the energies of all classes in one pass."""

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes)."""


def contrastive_divergence(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean E(x_pos) - mean E(x_neg) + l2 * (mean E(x_pos)**2 + mean E(x_neg)**2).

    Where `x_neg` are samples of the model, the first two terms have the gradient of the negative log-likelihood
    (Hinton 2002, eq. 4). The last term keeps the energies' scale (Du & Mordatch 2019, eq. 4). `energy` runs once, on
    both batches together. `x_neg` is a constant: no gradient flows into the chain that made it. `generator` is not
    used.
    """
    e_pos, e_neg = energies(energy, [x_pos, x_neg.detach()], [y_pos, y_neg])
    loss = e_pos.mean() - e_neg.mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg)


def contrastive_latent(
    energy: LatentEnergy,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    views: Callable[[Tensor, Generators], Tensor],
    latent_weight: float = 0.01,
    similarity_temperature: float = 0.2,
    l2: float = 1.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """`contrastive_divergence` - latent_weight * mean cos(projection of f(x_pos), code of x_pos) + the encoder's loss.

    The latent f of the energy |f|^2 / 2 is drawn to the code of an encoder (Lee et al. 2023, CLEL). The encoder is
    trained by `similarity_loss` of two random `views` of each datum; the cosine does not reach it. `y_pos` and `y_neg`
    are not used.
    """
    x = torch.cat([x_pos, x_neg.detach()])
    f = energy.latents(x)
    e_pos, e_neg = torch.split(energy.of_latents(f, x), [len(x_pos), len(x_neg)])
    seen = torch.cat([x_pos, *(views(x_pos, generator) for _ in range(2))])
    code, first, second = energy.codes(seen).chunk(3)
    cosine = cosine_similarity(energy.projection(f[: len(x_pos)]), code.detach()).mean()
    similarity = similarity_loss(first, second, similarity_temperature, num_parts(generator))
    loss = e_pos.mean() - e_neg.mean() - latent_weight * cosine + similarity
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg, cosine=cosine, similarity=similarity)


def similarity_loss(first: Tensor, second: Tensor, temperature: float, parts: int = 1) -> Tensor:
    """The cross-entropy of finding the other view of a datum among the views of all data of its part (Chen et al. 2020,
    SimCLR, eq. 1). `first`, `second`: codes of unit length (B, dim)."""
    codes = torch.cat([code.reshape(parts, -1, code.shape[1]) for code in (first, second)], 1)
    count = codes.shape[1]
    logits = codes @ codes.transpose(1, 2) / temperature
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool, device=codes.device), -torch.inf)
    other = (torch.arange(count, device=codes.device) + count // 2) % count
    return cross_entropy(logits.flatten(0, 1), other.repeat(parts))


def improved_contrastive_divergence(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    step_size: float,
    noise_scale: float,
    grad_clamp: float | None = None,
    bounds: tuple[float, float] | None = None,
    boundary: str = "clamp",
    kl_steps: int = 1,
    kl_weight: float = 1.0,
    entropy_weight: float = 0.3,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """Contrastive divergence + kl_weight * mean E'(x) - entropy_weight * mean log |x - nearest other x|.

    x are the chains `x_neg` after `kl_steps` more Langevin steps, and these steps are differentiated: contrastive
    divergence ignores that its chains depend on the energy (Du et al. 2021, eq. 4). E' is the energy with frozen
    weights, so that the second term trains the weights only through x. It moves the chains to low energies (eq. 6),
    while the third keeps them apart (eq. 7, the nearest-neighbour estimate of the entropy of Kozachenko & Leonenko
    1987). A chain's neighbours are the chains of the same generator.

    With D components and chains at temperature T, kl_weight = 1 and entropy_weight = D * T give
    T * KL(chains || model), whose gradient vanishes where the chains are samples of the model. The authors drop D and
    take .3 for images. A component at the limit of `grad_clamp` or `bounds` gives no gradient.

    Args:
        step_size, noise_scale, grad_clamp, bounds, boundary: settings of the differentiated steps, as in
            `ebm.samplers.langevin`.

    Raises ValueError where a generator has a single chain, which has no neighbour.
    """
    loss, e_pos, e_neg, _ = contrastive_divergence(energy, x_pos, x_neg, l2=l2, y_pos=y_pos, y_neg=y_neg)
    x = x_neg.detach().requires_grad_(True)
    for _ in range(kl_steps):
        _, gradient = energy_and_gradient(energy, x, y_neg)
        if grad_clamp is not None:
            gradient = gradient.clamp(-grad_clamp, grad_clamp)
        x = x - step_size * gradient + noise_scale * normal_(torch.empty_like(gradient), generator)
        x = inside(x, bounds, boundary)
    low_energy, entropy = _frozen_energy(energy, x, y_neg), log_distance(x, num_parts(generator))
    loss = loss + kl_weight * low_energy - entropy_weight * entropy
    return output(loss, e_pos, e_neg, kl_energy=low_energy, entropy=entropy)


def _frozen_energy(energy: Energy, x: Tensor, y: Tensor | None) -> Tensor:
    """mean E(x), with a gradient through `x` but none to the weights: to first order, E(a) + dE/da (x - a) at a = x."""
    a = x.detach().requires_grad_(True)
    e, slope = energy_and_gradient(energy, a, y, create_graph=False)
    return e.detach().mean() + (slope * (x - a.detach())).sum() / len(x)


def log_distance(x: Tensor, parts: int = 1) -> Tensor:
    """The mean log of each state's Euclidean distance to the nearest other state of its part. Times the number of
    components it estimates the entropy up to a constant. Gradients flow to both states of a pair.

    Raises ValueError where a part has a single state.
    """
    if len(x) < 2 * parts:
        raise ValueError(
            f"{len(x)} chains in {parts} streams: a stream needs 2 for a chain to have a neighbour; raise "
            "train.batch_size or lower data.streams"
        )
    x = x.reshape(parts, len(x) // parts, -1)
    with torch.no_grad():
        squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        squared.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        nearest = squared.argmin(2, keepdim=True).expand_as(x)
    distance: Tensor = torch.linalg.vector_norm(x - x.gather(1, nearest), dim=2)
    return distance.clamp_min(1e-6).log().mean()  # equal states, such as saturated ones, get no gradient


def noisy(x: Tensor, sigma: float, generator: Generators = None) -> Tensor:
    """x + sigma z, z ~ N(0, I): the states that recovery chains start from and are tied to."""
    return x + sigma * normal_(torch.empty_like(x), generator)


def tilted(energy: Energy, sigma: float) -> Callable[..., Tensor]:
    """The energy of x given its noisy copy `centre`: the function (x, centre, *labels) -> E(x, *labels) +
    |x - centre|**2 / (2 sigma**2) (Gao et al. 2021, eq. 5), at temperature 1. Over levels: `ebm.samplers.levels.tied`.
    """

    def conditional(x: Tensor, centre: Tensor, *labels: Tensor) -> Tensor:
        (e,) = energies(energy, [x], labels or (None,))
        return e + squared_norm(x - centre) / (2 * sigma**2)

    return conditional


def noisy_pairs(
    x: Tensor, log_variances: Sequence[float], generator: Generators = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_s = x + sqrt(s) z and x_t = x_s + sqrt(t - s) z', (B, *shape), and log s, (B,), for data `x`: the states of a
    level and of the next, which is what recovery likelihood over levels learns from.

    `log_variances` ascend evenly; s is one of all but the last and t the one above it. In each generator's part of the
    batch the levels ascend, each with an equal share of the data (`spread`).
    """
    low, spacing, count = log_variances[0], log_variances[1] - log_variances[0], len(log_variances) - 1
    level = low + spacing * (spread(x, generator) * count).floor().clamp(max=count - 1)
    scale = per_state((level / 2).exp(), x)
    x_s = x + scale * normal_(torch.empty_like(x), generator)
    x_t = x_s + scale * math.sqrt(math.expm1(spacing)) * normal_(torch.empty_like(x), generator)
    return x_s, x_t, level


def recovery_likelihood(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    centres: Tensor | None = None,
    spacing: float = 0.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean E(x_pos) - mean E(x_neg), which has the gradient of -log p(x_pos | noisy x_pos) (Gao et al. 2021, eq. 8).

    `x_neg` are chains at temperature 1 of `tilted(energy, sigma)`, centred and started at `noisy(x_pos, sigma)`. The
    tilt has no weights, so it drops out of the gradient. The loss is consistent at every sigma if the chains reach
    equilibrium. With a smaller sigma they do so sooner, but a pair of states says less about the energy.

    Over levels of noise `x_pos` are the x_s of `noisy_pairs` and `x_neg` chains that are `tied` to their x_t. Both
    carry their level, at each of which the energy becomes that of the data with its noise, up to a constant of its own.

    `centres`: the x_t of chains whose start an initialiser proposes (CDRL, Zhu et al. 2023, eq. 9), with the `spacing`
    of the log variances. Added is then minus the log-likelihood of the chains' ends under the proposal, a mean over
    components and without its constant: |x_neg - g|**2 / (2 (1 - s/t) s) with g = `energy.propose(centres, ...)`. The
    chains are constants: they teach the initialiser, which never reaches the energy.
    """
    plain = contrastive_divergence(energy, x_pos, x_neg, l2=l2, y_pos=y_pos, y_neg=y_neg)
    if centres is None:
        return plain
    end, level = split_noise_level(x_neg.detach())
    labels = () if y_neg is None else (y_neg,)
    mean = at_least_float32(conditioned_on_noise(energy).propose(centres, level, spacing, *labels))
    variance = level.exp() * -math.expm1(-spacing)
    fit = ((end - mean).square().flatten(1).mean(1) / variance).mean() / 2
    return output(plain.loss + fit, plain.e_pos, plain.e_neg, initialiser=fit)


def marginal(energy: HasClasses) -> Callable[[Tensor], Tensor]:
    """The energy of p(x): x -> -log sum_y exp(-E(x, y)), (B,) (Grathwohl et al. 2020, eq. 7)."""
    return lambda x: marginal_energy(at_least_float32(energy.class_energies(x)))


def joint_energy(
    energy: HasClasses,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    y_pos: Tensor,
    y_neg: Tensor | None = None,
    joint: bool = False,
    contrastive_weight: float = 1.0,
    bounded: bool = False,
    l2: float = 0.0,
    generator: Generators = None,
) -> LossOutput:
    """-mean log p(y_pos | x_pos) + contrastive_weight * (mean E(x_pos) - mean E(x_neg)), from one forward.

    The logits are -E(x, y), and p(x) has the energy E(x) = -log sum_y exp(-E(x, y)) (Grathwohl et al. 2020, eq. 6 and
    7). If both terms have weight 1 and `x_neg` are samples of p(x), this is the negative log-likelihood of (x, y) at
    temperature 1. `joint`: `x_neg` are samples with labels `y_neg`, of p(x | y_neg), and E(x, y) takes the place of
    E(x).

    `bounded`: the contrast is -mean log s(-E(x_pos)) - mean log(1 - s(-E(x_neg))) with the logistic function s, the
    loss of telling data from chains (arXiv 2510.13872). It is never negative, so it can't diverge. For samples x_neg of
    a fixed density q its minimum is E(x) = log q(x) - log p(x), which is 0 where the chains have become the data.

    Raises ValueError for `joint` without `y_neg`.
    """
    values = at_least_float32(energy.class_energies(torch.cat([x_pos, x_neg.detach()])))
    logits = -values[: len(x_pos)]
    classification = cross_entropy(logits, y_pos)
    if not joint:
        e = marginal_energy(values)
    elif y_neg is None:
        raise ValueError("joint=True compares E(x, y), which needs y_neg, the labels of x_neg")
    else:
        e = values.gather(1, torch.cat([y_pos, y_neg])[:, None]).squeeze(1)
    e_pos, e_neg = torch.split(e, [len(x_pos), len(x_neg)])
    contrast = softplus(e_pos).mean() + softplus(-e_neg).mean() if bounded else e_pos.mean() - e_neg.mean()
    loss = classification + contrastive_weight * contrast
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    right = (logits.argmax(1) == y_pos).float().mean()
    return output(loss, e_pos, e_neg, cross_entropy=classification, accuracy=right)


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
