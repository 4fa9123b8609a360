"""The noise level as a further input of an energy: E(x, t) for data with Gaussian noise of variance t.

A state may carry its level along: (C + 1, H, W), or (D + 1,) for a vector, whose last plane holds log t. Chains,
buffers and losses pass such states on as they pass any other.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm.energies.base import BaseEnergyFunction, marginal_energy

PLANES = 8  # of sines and cosines of log t that the network sees beside the state
MAX_FULL = 1024  # components up to which the data's whole covariance is kept
FREQUENCIES = (0.2, 1.5)  # in radians per unit of log t; a range of variances of 1 to 1000 spans 7 units


def with_noise_level(x: Tensor, log_variance: Tensor) -> Tensor:
    """States (B, *shape) and levels (B,) in one tensor, with one plane more than `x`."""
    level = log_variance.view(-1, *[1] * (x.ndim - 1)).expand(-1, 1, *x.shape[2:])
    return torch.cat([x, level.to(x.dtype)], 1)


def split_noise_level(z: Tensor) -> tuple[Tensor, Tensor]:
    """The states (B, *shape) and levels (B,) of `with_noise_level`."""
    return z[:, :-1], z[:, -1].flatten(1)[:, 0] if z.ndim > 2 else z[:, -1]


class NoiseConditionalEnergy(BaseEnergyFunction):
    """E(x, t) = -log N(x; m, C + t I) + s sqrt(D / t) / 2 f((x - m) / sqrt(s^2 + t), t).

    The first term is the normalised energy of the data's Gaussian with noise of variance t; the network f says what
    differs. `fit` takes m and C from data. Before, m = 0 and C = s^2 I, and C stays so with more than MAX_FULL
    components. The factor makes an f whose gradient is of order 1 give scores of order sqrt(D / t), as denoising needs
    at every level (Karras et al. 2022, table 1).

    `forward` takes states (B, *shape), whose level is the lowest, or states that carry their levels along. So the
    energy scores, samples and composes as the density of data with noise `sigma_min`.

    Args:
        network: takes (B, C + PLANES, H, W), or (B, D + PLANES).
        shape: of a state without its level.
        sigma_min, sigma_max: range of the noise's standard deviation, in units of x.
        data_std: s, about the standard deviation of the data.
    """

    frequencies: Tensor
    mean: Tensor  # shape of a state
    variances: Tensor  # eigenvalues of C, (D,)
    basis: Tensor  # its eigenvectors in columns, (D, D); empty where C is s^2 I

    def __init__(
        self,
        network: BaseEnergyFunction,
        shape: tuple[int, ...],
        sigma_min: float = 0.1,
        sigma_max: float = 3.0,
        data_std: float = 0.7,
    ):
        super().__init__()
        self.network, self.num_classes, self.planes = network, network.num_classes, shape[0]
        self.log_variances = (2 * math.log(sigma_min), 2 * math.log(sigma_max))
        self.data_variance, self.dim = data_std**2, math.prod(shape)
        self.register_buffer("frequencies", torch.linspace(*FREQUENCIES, PLANES // 2), persistent=False)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variances", torch.full((self.dim,), self.data_variance))
        self.register_buffer("basis", torch.eye(self.dim if self.dim <= MAX_FULL else 0))
        _initialise(network)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and covariance of the Gaussian term from data (N, *shape)."""
        flat = x.flatten(1).double()
        self.mean.copy_(flat.mean(0).view_as(self.mean))
        if len(self.basis):
            values, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(self.dim, self.dim))
            self.variances.copy_(values.clamp(min=0))
            self.basis.copy_(vectors)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None and self.num_classes:  # the factor is outside of each class's f, so the sum over classes is too
            return marginal_energy(self.class_energies(x))
        gaussian, scale, inputs = self._terms(x)
        return gaussian + scale * self.network(inputs, *(() if y is None else (y,)))

    def class_energies(self, x: Tensor) -> Tensor:
        gaussian, scale, inputs = self._terms(x)
        return gaussian[:, None] + scale[:, None] * self.network.class_energies(inputs)

    def _terms(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The Gaussian's energies (B,), the network's factors (B,), and the network's input."""
        if x.shape[1] == self.planes:
            level = x.new_full((len(x),), self.log_variances[0])
        else:
            x, level = split_noise_level(x)
        centred = x - self.mean
        along = centred.flatten(1) @ self.basis if len(self.basis) else centred.flatten(1)
        spread = self.variances + level.exp()[:, None]
        gaussian = (along.square() / spread + (2 * math.pi * spread).log()).sum(1) / 2
        total = level.exp() + self.data_variance
        scale = (self.dim * self.data_variance / 4) ** 0.5 * (-level / 2).exp()
        over = [1] * (x.ndim - 1)
        angles = level[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], 1).view(-1, PLANES, *over[1:]).expand(-1, -1, *x.shape[2:])
        return gaussian, scale, torch.cat([centred / total.sqrt().view(-1, *over), waves.to(x.dtype)], 1)


def conditioned_on_noise(energy: nn.Module) -> NoiseConditionalEnergy:
    """`energy`, which must be conditional on the noise level. Raises ValueError for any other."""
    if not isinstance(energy, NoiseConditionalEnergy):
        raise ValueError(f"{type(energy).__name__} does not take a noise level: set energy.noise_conditional={{}}")
    return energy


def _initialise(network: nn.Module) -> None:
    """Initial weights of variance 2 / inputs (He et al. 2015), in place of torch's 1 / (3 inputs).

    What the Gaussian leaves to the network has no linear or quadratic part. With torch's weights a new network has
    nothing else, since its activations stay where SiLU is nearly linear, and does not learn in a thousand steps.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and not parametrize.is_parametrized(layer):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
