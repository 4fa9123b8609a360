"""Contrastive divergence: the gradient of the log-likelihood with samples in the place of the model's mean."""

from torch import Tensor

from ebm.losses.output import Energy, LossOutput, energies, terms
from ebm.losses.regularisers import energy_l2
from ebm.streams import Generators


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
    return LossOutput(loss, terms(e_pos=e_pos, e_neg=e_neg))
