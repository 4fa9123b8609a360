"""Improved contrastive divergence: contrastive divergence with the term that it leaves out (Du et al. 2021)."""

import torch
from torch import Tensor

from ebm.losses.contrastive import contrastive_divergence
from ebm.losses.output import Energy, LossOutput, energies, energy_and_gradient, num_parts, terms
from ebm.streams import Generators, normal_


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
    loss, logged = contrastive_divergence(energy, x_pos, x_neg, l2=l2, y_pos=y_pos, y_neg=y_neg)
    x = x_neg.detach().requires_grad_(True)
    for _ in range(kl_steps):
        _, gradient = energy_and_gradient(energy, x, y_neg)
        if grad_clamp is not None:
            gradient = gradient.clamp(-grad_clamp, grad_clamp)
        x = x - step_size * gradient + noise_scale * normal_(torch.empty_like(gradient), generator)
        if bounds is not None:
            x = _inside(x, *bounds, boundary)
    low_energy, entropy = _frozen_energy(energy, x, y_neg), log_distance(x, num_parts(generator))
    loss = loss + kl_weight * low_energy - entropy_weight * entropy
    return LossOutput(loss, logged | terms(kl_energy=low_energy, entropy=entropy))


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


def _inside(x: Tensor, low: float, high: float, boundary: str) -> Tensor:
    """`x` in the bounds, by clamping or reflection as in the chain."""
    if boundary == "reflect":
        width = high - low
        x = high - ((x - low).remainder(2 * width) - width).abs()
    return x.clamp(low, high)
