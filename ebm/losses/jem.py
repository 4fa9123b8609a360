"""JEM: a classifier that is an energy-based model too (Grathwohl et al. 2020)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ebm.losses.output import LossOutput, terms
from ebm.losses.regularisers import energy_l2
from ebm.streams import Generators


def marginal(energy) -> Callable[[Tensor], Tensor]:
    """The energy of p(x): x -> -log sum_y exp(-E(x, y)), (B,) (Grathwohl et al. 2020, eq. 7)."""
    return lambda x: -torch.logsumexp(-_class_energies(energy, x), dim=1)


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
    e = values.gather(1, labels).squeeze(1) if joint else -torch.logsumexp(-values, dim=1)
    e_pos, e_neg = e.split([len(x_pos), len(x_neg)])
    loss = classification + contrastive_weight * (e_pos.mean() - e_neg.mean())
    if l2:
        loss = loss + l2 * energy_l2(e_pos, e_neg)
    right = (logits.argmax(1) == y_pos).float().mean()
    return LossOutput(loss, terms(e_pos=e_pos, e_neg=e_neg, cross_entropy=classification, accuracy=right))
