"""Energy discrepancy: tell each datum from draws near it, without chains or scores (Schroeder et al. 2023)."""

import math

import torch
from torch import Tensor

from ebm.losses.output import Energy, LossOutput, energies, terms
from ebm.losses.regularisers import energy_l2
from ebm.streams import Generators, normal_


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

    Schroeder et al. (2023), eq. 9, at temperature 1: z, z_j ~ N(0, I), the same z for all draws near a datum. At
    every `time` the density of the data is the minimum, in the limit of many draws for any w. At w = 1 it is for
    every M: the loss then is that of picking the datum out of M + 1 candidates given where they were centred, which
    is consistent (ranking noise contrastive estimation, Ma & Collins 2018). `time` is a variance, in units of x:
    a small one nears score matching, a large one maximum likelihood, with more variance. "e_neg" are the energies of
    the draws, (M B,). `x_neg`, `y_neg` are not used.
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
    return LossOutput(loss, terms(e_pos=e_pos, e_neg=e_neg))
