"""Denoising score matching: the score of the data with noise added, from pairs of clean and noisy data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ebm.losses.output import Energy, LossOutput, energy_and_gradient, terms
from ebm.losses.regularisers import energy_l2
from ebm.streams import Generators, normal_, uniform_


def denoising_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    sigmas: float | Sequence[float],
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |sigma s(x + sigma z) + z|**2 / 2, z ~ N(0, I), with the score s = -dE/dx / temperature.

    Vincent (2011), eq. 9, weighted by sigma**2 (Song & Ermon 2019, eq. 6); with several `sigmas` each sample draws
    one (Li, Chen & Sommer 2019, as one energy for all levels). The result is not the density of the data but that
    density **smoothed** by N(0, sigma**2): of Gaussian data with covariance C it finds C + sigma**2 I, and of several
    sigmas C + (sum sigma**4 / sum sigma**2) I; subtract that to correct. "e_pos" are energies of the noisy data.
    """
    z = normal_(torch.empty_like(x_pos), generator)
    sigma = sigmas if isinstance(sigmas, float) else _drawn(sigmas, x_pos, generator)
    noisy = (x_pos + sigma * z).detach().requires_grad_(True)
    e_pos, gradient = energy_and_gradient(energy, noisy, y_pos)
    residual = z - sigma * gradient / temperature
    loss = residual.square().flatten(1).sum(1).mean() / 2
    if l2:
        loss = loss + l2 * energy_l2(e_pos)
    return LossOutput(loss, terms(e_pos=e_pos))


def _drawn(sigmas: Sequence[float], x: Tensor, generator: Generators) -> Tensor | float:
    """One of `sigmas` for each state of `x`, in a shape that multiplies it."""
    if len(sigmas) == 1:
        return sigmas[0]
    index = uniform_(x.new_empty(len(x)), generator, 0, len(sigmas)).long().clamp_max(len(sigmas) - 1)
    return x.new_tensor(sigmas)[index].view(-1, *[1] * (x.ndim - 1))
