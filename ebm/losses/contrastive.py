"""Contrastive divergence: the gradient of the log-likelihood with samples in the place of the model's mean."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LossOutput(NamedTuple):
    """A loss to differentiate, and its terms: detached, float32, named as they are logged."""

    loss: Tensor
    terms: dict[str, Tensor]


def contrastive_divergence(
    energy: Callable[..., Tensor],
    x_pos: Tensor,
    x_neg: Tensor,
    *,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LossOutput:
    """mean E(x_pos) - mean E(x_neg) + l2 * (mean E(x_pos)**2 + mean E(x_neg)**2).

    The gradient of the first two terms is that of the negative log-likelihood where `x_neg` are samples of the model
    (Hinton 2002, eq. 4); the last keeps the energies' scale (Du & Mordatch 2019, eq. 4). One forward of `energy` on
    both batches. `x_neg` is a constant: no gradient flows into the chain that made it. `generator` is not used.
    """
    labels = () if y_pos is None else (torch.cat([y_pos, y_neg]),)
    energies = energy(torch.cat([x_pos, x_neg.detach()]), *labels).float()
    e_pos, e_neg = energies[: len(x_pos)], energies[len(x_pos) :]
    loss = e_pos.mean() - e_neg.mean()
    if l2:
        loss = loss + l2 * (e_pos.square().mean() + e_neg.square().mean())
    return LossOutput(loss, {"e_pos": e_pos.detach(), "e_neg": e_neg.detach()})
