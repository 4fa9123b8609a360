"""Losses with samples of the model: contrastive divergence, its improved form, recovery likelihood, JEM."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ebm.energies import marginal_energy
from ebm.losses.output import Energy, LossOutput, energies, energy_and_gradient, energy_l2, num_parts, output
from ebm.samplers.base import inside
from ebm.streams import Generators, normal_


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

    The gradient of the first two terms is that of the negative log-likelihood where `x_neg` are samples of the model
    (Hinton 2002, eq. 4); the last keeps the energies' scale (Du & Mordatch 2019, eq. 4). One forward of `energy` on
    both batches. `x_neg` is a constant: no gradient flows into the chain that made it. `generator` is not used.
    """
    e_pos, e_neg = energies(energy, [x_pos, x_neg.detach()], [y_pos, y_neg])
    loss = e_pos.mean() - e_neg.mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg)


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

    x are the chains `x_neg` after `kl_steps` more Langevin steps, which are differentiated: contrastive divergence
    ignores that its chains depend on the energy (Du et al. 2021, eq. 4). E' is a frozen copy: the weights get their
    gradient through x alone, which goes where the energy is low (eq. 6) and the chains stay apart (eq. 7, the
    nearest-neighbour estimate of the entropy of Kozachenko & Leonenko 1987). Neighbours are looked for within the
    part of a generator.

    With D components and chains at temperature T, kl_weight = 1 and entropy_weight = D * T is the whole of
    T * KL(chains || model), whose gradient vanishes where the chains are samples of the model. The authors drop D and
    take .3 for images. A component that `grad_clamp` or `bounds` hold gives no gradient.

    Args:
        step_size, noise_scale, grad_clamp, bounds, boundary: of the chain's last steps (`ebm.samplers.langevin`).

    Raises ValueError where a part has a single chain: it has no neighbour.
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
    (e,) = energies(energy, [a], [y])
    (slope,) = torch.autograd.grad(e.sum(), a)
    return e.detach().mean() + (slope * (x - a.detach())).sum() / len(x)


def log_distance(x: Tensor, parts: int = 1) -> Tensor:
    """mean log of the Euclidean distance to the nearest other state of the same part. Times D it is the entropy but
    for a constant; differentiated through both states of a pair."""
    if len(x) < 2 * parts:
        raise ValueError(
            f"{len(x)} chains in {parts} streams: a stream needs 2 for a chain to have a neighbour; raise "
            "train.batch_size or lower data.streams"
        )
    x = x.flatten(1).unflatten(0, (parts, -1))
    with torch.no_grad():
        squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        squared.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        nearest = squared.argmin(2, keepdim=True).expand_as(x)
    distance = (x - x.gather(1, nearest)).norm(dim=2)
    return distance.clamp_min(1e-6).log().mean()  # equal states (saturated ones): nowhere to push them


def noisy(x: Tensor, sigma: float, generator: Generators = None) -> Tensor:
    """x + sigma z: what the chains start from and are tied to."""
    return x + sigma * normal_(torch.empty_like(x), generator)


def tilted(energy: Energy, sigma: float) -> Callable[..., Tensor]:
    """The energy of x given its noisy copy: (x, centre, *labels) -> E(x, *labels) + |x - centre|**2 / (2 sigma**2)
    (Gao et al. 2021, eq. 5), at temperature 1."""

    def conditional(x: Tensor, centre: Tensor, *labels: Tensor) -> Tensor:
        (e,) = energies(energy, [x], labels or (None,))
        return e + (x - centre).square().flatten(1).sum(1) / (2 * sigma**2)

    return conditional


def recovery_likelihood(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean E(x_pos) - mean E(x_neg), where `x_neg` are chains at temperature 1 of `tilted(energy, sigma)`, centred and
    started at `noisy(x_pos, sigma)`: the gradient of -log p(x_pos | noisy x_pos) (Gao et al. 2021, eq. 8).

    The tilt has no weights, so it drops out of the gradient. Consistent at every sigma where the chains are at
    equilibrium, which they reach sooner the smaller sigma is; the smaller sigma, the less each pair tells.
    """
    return contrastive_divergence(energy, x_pos, x_neg, l2=l2, y_pos=y_pos, y_neg=y_neg)


def marginal(energy) -> Callable[[Tensor], Tensor]:
    """The energy of p(x): x -> -log sum_y exp(-E(x, y)), (B,) (Grathwohl et al. 2020, eq. 7)."""
    return lambda x: marginal_energy(_class_energies(energy, x))


def _class_energies(energy, x: Tensor) -> Tensor:
    values = energy.class_energies(x)
    return values.to(torch.promote_types(values.dtype, torch.float32))


def joint_energy(
    energy,
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    y_pos: Tensor,
    y_neg: Tensor | None = None,
    joint: bool = False,
    contrastive_weight: float = 1.0,
    l2: float = 0.0,
    generator: Generators = None,
) -> LossOutput:
    """-mean log p(y_pos | x_pos) + contrastive_weight * (mean E(x_pos) - mean E(x_neg)), in one pass.

    `energy.class_energies(x)` gives E(x, y) of all classes, (B, K); the logits are -E(x, y), and p(x) has the energy
    E(x) = -log sum_y exp(-E(x, y)) (Grathwohl et al. 2020, eq. 6 and 7). With both terms at weight 1 and `x_neg` from
    p(x) this is the likelihood of (x, y), at temperature 1. `joint`: E(x, y) of the chains' own labels `y_neg`
    instead, from chains of p(x, y).
    """
    values = _class_energies(energy, torch.cat([x_pos, x_neg.detach()]))
    logits = -values[: len(x_pos)]
    classification = cross_entropy(logits, y_pos)
    labels = torch.cat([y_pos, y_neg])[:, None] if joint else None
    e = values.gather(1, labels).squeeze(1) if joint else marginal_energy(values)
    e_pos, e_neg = e.split([len(x_pos), len(x_neg)])
    loss = classification + contrastive_weight * (e_pos.mean() - e_neg.mean())
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    right = (logits.argmax(1) == y_pos).float().mean()
    return output(loss, e_pos, e_neg, cross_entropy=classification, accuracy=right)
