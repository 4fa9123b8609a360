"""Recovery likelihood: maximum likelihood of data given a noisy copy, whose short chains mix (Gao et al. 2021)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebm.losses.contrastive import contrastive_divergence
from ebm.losses.output import Energy, LossOutput, energies
from ebm.streams import Generators, normal_


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
