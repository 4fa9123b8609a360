"""Potentials whose gradient carries noise to data: energy matching, whose Boltzmann density is then trained near the
data (Balcerak et al. 2025), and equilibrium matching (Wang & Du 2025). Both may be distilled from a trained field."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebm.losses.output import (
    Energy,
    LossOutput,
    energies,
    energy_and_gradient,
    energy_l2,
    output,
    per_state,
)
from ebm.streams import Generators, normal_, num_parts, uniform_

Field = Callable[[Tensor, Tensor], Tensor]  # v(x (B, *shape), t (B,)) -> dx/dt (B, *shape); noise at t = 0, data at 1


def energy_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    flow_weight: float = 1.0,
    contrastive_weight: float = 1e-3,
    floor: float | None = 0.02,
    trim: float = 0.1,
    separate_batch: bool = False,
    field: Field | None = None,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
    pairs: Tensor | None = None,
) -> LossOutput:
    """flow_weight * mean |-dE/dx(x_t) - (x1 - x0)|**2 / D, and with chains `x_neg` the contrastive term as well.

    Flow: x0 ~ N(0, I) is paired with the data x1 by optimal transport, x_t = (1 - t) x0 + t x1, t ~ U(0, 1), so that
    -dE/dx is the velocity of the flow (Balcerak et al. 2025, eq. 5; the mean over D components as in their code).
    Contrast: max(contrastive_weight * (mean E(x_pos) - mean E(x_neg)), -floor) (algorithm 2), without the share `trim`
    of chains of the highest energies, which have not come near the data. If the chains sample at temperature epsilon
    the density is exp(-E / epsilon), as far as the flow's term allows: flow_weight = 0 with trim = 0 is consistent.
    Pairing, floor and trim apply to each generator's part of the batch by itself. `separate_batch`: with chains the
    flow's data are the first half of each part, and those of the contrast the second, as their code has another batch.
    `field`: a trained velocity v(x, t), which takes the place of x1 - x0 as long as there are no chains (`flow_loss`).

    The pairing runs on the host and so waits for the device; no other loss does. `pairs`: what `flow_pairs` gave for
    the same arguments, in place of another pairing.
    """
    loss, terms, parts = x_pos.new_zeros(()), {}, num_parts(generator)
    x_flow, y_flow = x_pos, y_pos
    if separate_batch and x_neg is not None:
        x_flow, x_pos = halves(x_pos, parts)
        y_flow, y_pos = (None, None) if y_pos is None else halves(y_pos, parts)
    if flow_weight:
        terms["flow"] = flow_loss(energy, x_flow, y_flow, generator, field if x_neg is None else None, pairs)
        loss = loss + flow_weight * terms["flow"]
    if x_neg is None:
        return output(loss, **terms)
    e_pos, e_neg = energies(energy, [x_pos, x_neg.detach()], [y_pos, y_neg])
    kept = e_neg.view(parts, -1).sort(dim=1).values
    kept = kept[:, : kept.shape[1] - round(trim * kept.shape[1])]
    contrast = contrastive_weight * (e_pos.view(parts, -1).mean(1) - kept.mean(1))
    if floor is not None:
        contrast = contrast.clamp_min(-floor)
    terms["contrast"] = contrast.mean()
    loss = loss + terms["contrast"]
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg, **terms)


def halves(x: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """The first and the second half of each of `parts` equal parts of a batch."""
    first, second = x.reshape(parts, 2, -1, *x.shape[1:]).unbind(1)
    return first.flatten(0, 1), second.flatten(0, 1)


def flow_pairs(
    x_pos: Tensor, x_neg: Tensor | None = None, generator: Generators = None, *, separate_batch: bool = False
) -> Tensor:
    """The `pairing` in `energy_matching` of the same arguments, which begins with the draw that this takes."""
    parts = num_parts(generator)
    x1 = halves(x_pos, parts)[0] if separate_batch and x_neg is not None else x_pos
    return pairing(normal_(torch.empty_like(x1), generator), x1, parts)


def flow_loss(
    energy: Energy,
    x1: Tensor,
    y: Tensor | None = None,
    generator: Generators = None,
    field: Field | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """mean |-dE/dx(x_t) - (x1 - x0)|**2 / D: the first term of `energy_matching`.

    With a trained `field`, x1 - x0 is replaced by its mean at x_t, v(x_t, t). The expected gradient is the same where
    v is exact, and estimates of it vary less. -dE/dx becomes v's mean over t, as far as that is a gradient.
    """
    x0 = normal_(torch.empty_like(x1), generator)
    x0 = x0[pairing(x0, x1, num_parts(generator)) if pairs is None else pairs]
    t = uniform_(x1.new_empty(len(x1)), generator)
    x_t = torch.lerp(x0, x1, per_state(t, x1)).detach().requires_grad_(True)
    _, gradient = energy_and_gradient(energy, x_t, y)
    target = x1 - x0 if field is None else velocity(field, x_t, t)
    return (-gradient - target).square().mean()


@torch.no_grad()
def velocity(field: Field, x: Tensor, t: Tensor) -> Tensor:
    """v(x, t), (B, *shape), in x's type, at states (B, *shape) and times (B,) in [0, 1)."""
    return field(x.detach(), t).to(x.dtype)


def pairing(x0: Tensor, x1: Tensor, parts: int = 1) -> Tensor:
    """The permutation of `x0` that minimises the sum of |x0[permutation] - x1|**2, within each of `parts` equal parts.
    It is computed by SciPy on the host."""
    from scipy.optimize import linear_sum_assignment  # slow to load, and for this alone

    size = len(x0) // parts
    a, b = (x.detach().double().reshape(parts, size, -1) for x in (x0, x1))
    cost = torch.cdist(b, a).square().cpu().numpy()
    rows = [torch.from_numpy(linear_sum_assignment(c)[1]) + i * size for i, c in enumerate(cost)]
    return torch.cat(rows).to(x0.device)


def equilibrium_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    gradient_scale: float = 4.0,
    decay_start: float = 0.8,
    field: Field | None = None,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |dE/dx(x_t) + c(t) (x1 - x0)|**2 / D, with data x1, x0 ~ N(0, I), x_t = (1 - t) x0 + t x1, t ~ U(0, 1).

    Equilibrium matching (Wang & Du 2025, arXiv 2510.02300, with their truncated decay): c(t) = gradient_scale until
    t = decay_start, and then falls linearly to 0 at t = 1, so that the gradient vanishes at the data and gradient
    descent on E, from anywhere, ends there. E knows no time. It has its minima at the data, but exp(-E) is not their
    density. A trained velocity `field` v(x, t) takes the place of x1 - x0, whose mean at x_t it is (`flow_loss`).
    `x_neg` and `y_neg` are not used.
    """
    x0 = normal_(torch.empty_like(x_pos), generator)
    time = uniform_(x_pos.new_empty(len(x_pos)), generator)
    t = per_state(time, x_pos)
    x_t = torch.lerp(x0, x_pos, t).detach().requires_grad_(True)
    e, gradient = energy_and_gradient(energy, x_t, y_pos)
    scale = gradient_scale * ((1 - t) / (1 - decay_start)).clamp_max(1)
    target = x_pos - x0 if field is None else velocity(field, x_t, time)
    loss = (gradient + scale * target).square().mean()
    if l2:
        loss = loss + l2 * energy_l2(e)
    return output(loss)
