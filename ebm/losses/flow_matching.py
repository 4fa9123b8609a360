"""Energy matching: a potential whose gradient flow carries noise to data, then sampled as an energy near the data
(Balcerak et al. 2025)."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ebm.losses.output import Energy, LossOutput, energies, energy_and_gradient, energy_l2, num_parts, output
from ebm.streams import Generators, normal_, uniform_


def energy_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    flow_weight: float = 1.0,
    contrastive_weight: float = 1e-3,
    floor: float | None = 0.02,
    trim: float = 0.1,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """flow_weight * mean |-dE/dx(x_t) - (x1 - x0)|**2 / D, and with chains `x_neg` the contrastive term as well.

    Flow: x0 ~ N(0, I) is paired with the data x1 by optimal transport, x_t = (1 - t) x0 + t x1, t ~ U(0, 1), so that
    -dE/dx is the velocity of the flow (Balcerak et al. 2025, eq. 5; the mean over D components as in their code).
    Contrastive: max(contrastive_weight * (mean E(x_pos) - mean E(x_neg)), -floor) (algorithm 2), without the share
    `trim` of chains that lie highest: those are lost, not near the data. Of chains that sample at temperature epsilon
    the density is exp(-E / epsilon), as far as the flow, which knows nothing of it, leaves room:
    flow_weight = 0 and trim = 0 are consistent. Pairs, floor and trim look within the part of a generator.
    """
    loss, terms = x_pos.new_zeros(()), {}
    if flow_weight:
        terms["flow"] = flow_loss(energy, x_pos, y_pos, generator)
        loss = loss + flow_weight * terms["flow"]
    if x_neg is None:
        return output(loss, **terms)
    e_pos, e_neg = energies(energy, [x_pos, x_neg.detach()], [y_pos, y_neg])
    parts = num_parts(generator)
    kept = e_neg.unflatten(0, (parts, -1)).sort(dim=1).values
    kept = kept[:, : kept.shape[1] - round(trim * kept.shape[1])]
    contrast = contrastive_weight * (e_pos.unflatten(0, (parts, -1)).mean(1) - kept.mean(1))
    if floor is not None:
        contrast = contrast.clamp_min(-floor)
    terms["contrast"] = contrast.mean()
    loss = loss + terms["contrast"]
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    return output(loss, e_pos, e_neg, **terms)


def flow_loss(energy: Energy, x1: Tensor, y: Tensor | None = None, generator: Generators = None) -> Tensor:
    """mean |-dE/dx(x_t) - (x1 - x0)|**2 / D: the warm-up of `energy_matching`."""
    x0 = normal_(torch.empty_like(x1), generator)
    x0 = x0[pairing(x0, x1, num_parts(generator))]
    t = uniform_(x1.new_empty(len(x1)), generator).view(-1, *[1] * (x1.ndim - 1))
    x_t = torch.lerp(x0, x1, t).detach().requires_grad_(True)
    _, gradient = energy_and_gradient(energy, x_t, y)
    return (-gradient - (x1 - x0)).square().mean()


def pairing(x0: Tensor, x1: Tensor, parts: int = 1) -> Tensor:
    """The permutation of `x0`, within each part, for which the sum of |x0[permutation] - x1|**2 is least (SciPy, on
    the host: the only loss that waits for the device)."""
    a, b = (x.detach().flatten(1).double().unflatten(0, (parts, -1)) for x in (x0, x1))
    cost = torch.cdist(b, a).square().cpu().numpy()
    size = a.shape[1]
    rows = [torch.from_numpy(linear_sum_assignment(c)[1]) + i * size for i, c in enumerate(cost)]
    return torch.cat(rows).to(x0.device)
