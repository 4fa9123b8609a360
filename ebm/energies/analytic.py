"""Densities known in closed form, for use as priors and to test samplers and objectives against.

Each energy has `log_normaliser()`, which returns log Z with Z the integral of exp(-E), and `sample(n, generator)`,
which returns independent samples (n, *shape). The generator must be on the energy's device. Constants are buffers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm.energies.base import BaseEnergyFunction, require_batch
from ebm.streams import Generators, normal_, uniform_

Values = Tensor | float | Sequence["Values"]  # a tensor, a number, or nested lists of numbers


class GaussianEnergy(BaseEnergyFunction):
    """E(x) = 1/2 (x - mean)' P (x - mean), where P is the inverse of the covariance.

    `mean`: any shape, D elements. `cov`: one variance for all elements, a variance for each element of `mean`, or a
    covariance matrix (D, D).

    `trainable`: mean and P are learned. P = L L', where L is lower triangular and stored with the logarithms of its
    diagonal, so that P is positive definite for any value of the parameters.
    """

    mean: Tensor
    log_diagonal: Tensor  # (D,) of L
    below_diagonal: Tensor  # (D, D), the rest of L; only where cov is a matrix (`full`)

    def __init__(self, mean: Values, cov: Values, trainable: bool = False):
        super().__init__()
        centre, covariance = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()
        dim = centre.numel()
        if covariance.ndim and covariance.shape not in (centre.shape, (dim, dim)):
            raise ValueError(
                f"cov has shape {tuple(covariance.shape)} and mean {tuple(centre.shape)}: cov is one variance, a "
                f"variance an element of mean, or a matrix ({dim}, {dim})"
            )
        self.shape = tuple(centre.shape)
        self.full = bool(covariance.ndim) and covariance.shape != centre.shape
        if self.full:
            root = _precision_root(covariance)
            tensors = {"mean": centre, "log_diagonal": root.diagonal().log(), "below_diagonal": root.tril(-1)}
        else:
            variances = _positive("cov", covariance.expand(centre.shape).flatten())
            tensors = {"mean": centre, "log_diagonal": variances.rsqrt().log()}
        for name, tensor in tensors.items():
            tensor = tensor.to(torch.get_default_dtype())
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        z = (require_batch(x, self.shape) - self.mean).flatten(1)
        if not self.full:
            return 0.5 * (z * self.log_diagonal.exp()).square().sum(1)
        with torch.autocast(x.device.type, enabled=False):
            return 0.5 * (z @ self._root().to(z.dtype)).square().sum(1)

    def _root(self) -> Tensor:
        """L, (D, D). Values above the diagonal of the parameter are ignored, so a gradient step can't change P
        there."""
        diagonal = self.log_diagonal.exp().diag()
        return self.below_diagonal.tril(-1) + diagonal if self.full else diagonal

    @property
    def precision(self) -> Tensor:
        """The inverse of the covariance, (D, D)."""
        root = self._root()
        return root @ root.T

    @property
    def cov(self) -> Tensor:
        """The covariance, (D, D)."""
        return torch.cholesky_inverse(self._root())

    def log_normaliser(self) -> Tensor:
        return 0.5 * self.mean.numel() * math.log(2 * math.pi) - self.log_diagonal.sum()

    @torch.no_grad()
    def sample(self, n: int, generator: Generators) -> Tensor:
        z = normal_(self.mean.new_empty(n, self.mean.numel()), generator)
        if self.full:
            z = torch.linalg.solve_triangular(self._root(), z, upper=False, left=False)  # each row is L'^-1 z
        else:
            z = z * (-self.log_diagonal).exp()
        return self.mean + z.view(n, *self.shape)


class GaussianMixtureEnergy(BaseEnergyFunction):
    """E(x) = -log sum_k w_k N(x; mean_k, cov_k) of vectors (B, D). The density is normalised: log Z = 0.

    `means` (K, D). `covs`: one variance for all, or matrices (K, D, D). `weights` (K,): the share of each component;
    above 0, scaled to sum to 1, equal by default.
    """

    means: Tensor
    roots: Tensor  # (K, D, D), lower triangular L_k; the precision of component k is L_k L_k'
    log_weights: Tensor
    log_norms: Tensor  # (K,), logarithm of the factor in front of each component's exponential

    def __init__(self, means: Values, covs: Values, weights: Values | None = None):
        super().__init__()
        centres, matrices = torch.as_tensor(means).double(), torch.as_tensor(covs).double()
        k, dim = centres.shape
        if matrices.ndim == 0:
            matrices = matrices * torch.eye(dim, dtype=torch.float64).expand(k, -1, -1)
        shares = torch.ones(k) if weights is None else torch.as_tensor(weights)
        if matrices.shape != (k, dim, dim) or shares.shape != (k,):
            raise ValueError(
                f"means are ({k}, {dim}), so covs is one variance or ({k}, {dim}, {dim}), and weights ({k},)"
            )
        shares = _positive("weights", shares.double())
        roots = torch.stack([_precision_root(cov) for cov in matrices])
        log_norms = roots.diagonal(dim1=1, dim2=2).log().sum(1) - 0.5 * dim * math.log(2 * math.pi)
        log_weights = (shares / shares.sum()).log()
        self.register_buffer("means", centres.to(torch.get_default_dtype()))
        self.register_buffer("roots", roots.to(torch.get_default_dtype()))
        self.register_buffer("log_weights", log_weights.to(torch.get_default_dtype()))
        self.register_buffer("log_norms", log_norms.to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        x = require_batch(x, self.means.shape[1:])
        with torch.autocast(x.device.type, enabled=False):
            z = torch.einsum("bkd,kde->bke", x[:, None] - self.means, self.roots.to(x.dtype))
        return -torch.logsumexp(self.log_weights + self.log_norms - 0.5 * z.square().sum(2), 1)

    def log_normaliser(self) -> Tensor:
        return self.log_weights.new_zeros(())

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        cumulative = self.log_weights.exp().cumsum(0)
        u = uniform_(self.means.new_empty(n), generator) * cumulative[-1]
        k = torch.searchsorted(cumulative, u, right=True).clamp_max(len(cumulative) - 1)
        z = normal_(self.means.new_empty(n, self.means.shape[1], 1), generator)
        offsets: Tensor = torch.linalg.solve_triangular(self.roots[k].mT, z, upper=True).squeeze(2)
        return self.means[k] + offsets


class DoubleWellEnergy(BaseEnergyFunction):
    """E(x) = barrier sum_i ((x_i / well)^2 - 1)^2 of vectors (B, dim), with independent coordinates. Each has its
    minima at +`well` and -`well`, with an energy barrier of height `barrier` between them."""

    barrier: Tensor
    well: Tensor

    def __init__(self, dim: int = 2, barrier: float = 2.0, well: float = 1.0):
        super().__init__()
        self.register_buffer("barrier", _positive("barrier", torch.tensor(float(barrier))))
        self.register_buffer("well", _positive("well", torch.tensor(float(well))))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return self.barrier * ((require_batch(x, (self.dim,)) / self.well).square() - 1).square().sum(1)

    def log_normaliser(self) -> Tensor:
        """Computed by the trapezoidal rule, whose error for a smooth density that decays at both ends is below
        float32's."""
        x, density = self._grid()
        return self.dim * (density.sum().log() + (x[1] - x[0]).log()).to(self.well.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Inverts the cumulative distribution function, which is interpolated linearly between 20,001 points."""
        x, density = self._grid()
        cumulative = torch.cat([density.new_zeros(1), ((density[1:] + density[:-1]) / 2).cumsum(0)])
        u = uniform_(density.new_empty(n, self.dim), generator) * cumulative[-1]
        right = torch.searchsorted(cumulative, u).clamp(1, len(x) - 1)
        share = (u - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
        return (x[right - 1] + share * (x[1] - x[0])).to(self.well.dtype)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Points of one coordinate and the unnormalised density at them, both float64 (20001,). The interval reaches to
        where the density is below e^-40."""
        barrier, well = self.barrier.double(), self.well.double()
        unit = torch.linspace(-1, 1, 20_001, dtype=torch.float64, device=well.device)
        reach: Tensor = (1 + (40 / barrier).sqrt()).sqrt()
        x = unit * reach
        return x * well, (-barrier * (x.square() - 1).square()).exp()


class RingEnergy(BaseEnergyFunction):
    """E(x) = (|x|^2 - radius^2)^2 / (2 (2 radius width)^2) of vectors (B, 2): a ring. Where `width` is well below
    `radius`, |x| has a standard deviation of about `width`.

    A function of |x|^2 is smooth at the origin, which a function of |x| is not. |x|^2 follows a Gaussian cut off at 0,
    so normaliser and samples are exact.
    """

    radius: Tensor
    width: Tensor

    def __init__(self, radius: float = 2.0, width: float = 0.2):
        super().__init__()
        self.register_buffer("radius", _positive("radius", torch.tensor(float(radius))))
        self.register_buffer("width", _positive("width", torch.tensor(float(width))))

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self._moments_of_square()
        return 0.5 * ((require_batch(x, (2,)).square().sum(1) - mean) / std).square()

    def log_normaliser(self) -> Tensor:
        """Z is pi times the integral over u = |x|^2 > 0, since dx = du dangle / 2."""
        mean, std = self._moments_of_square()
        log_share_above_0: Tensor = torch.special.log_ndtr(mean / std)
        return (math.pi * std * math.sqrt(2 * math.pi)).log() + log_share_above_0

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        mean, std = (value.double() for value in self._moments_of_square())
        u = uniform_(mean.new_empty(n, 2), generator)
        above = torch.special.ndtr(mean / std) * (1 - u[:, 0])  # P(|x|^2 is larger), in (0, P(|x|^2 > 0)]
        r = (mean - std * torch.special.ndtri(above)).clamp_min(0).sqrt()
        angle = 2 * math.pi * u[:, 1]
        return torch.stack([r * angle.cos(), r * angle.sin()], 1).to(self.radius.dtype)

    def _moments_of_square(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation that |x|^2 would have if it were not cut off at 0."""
        return self.radius.square(), self.radius * 2 * self.width


class FourPeaksEnergy(BaseEnergyFunction):
    """Four peaks of different heights on a wide Gaussian, for vectors (B, 2):

    E(x) = -sum_k h_k exp(-a_k |x - c_k|^2) + .1 |x|^2, with heights h = 2, 3, 1, 4 and rates a = .2, .2, .3, .2 at the
    centres c = (2, 2), (-2, 2), (2, -2), (-2, -2).
    """

    centres: Tensor
    heights: Tensor
    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]]))
        self.register_buffer("heights", torch.tensor([2.0, 3.0, 1.0, 4.0]))
        self.register_buffer("rates", torch.tensor([0.2, 0.2, 0.3, 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * require_batch(x, (2,)).square().sum(1) - self._peaks(x)

    def _peaks(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.centres).square().sum(2)
        return ((-self.rates * distances).exp() * self.heights).sum(1)

    def log_normaliser(self) -> Tensor:
        """Computed by the trapezoidal rule on [-20, 20]^2 with spacing .1, whose error for this smooth and decaying
        density is below float32's."""
        axis = torch.linspace(-20, 20, 401, dtype=torch.float64, device=self.centres.device)
        return (torch.logsumexp(-self(torch.cartesian_prod(axis, axis)), 0) + 2 * math.log(0.1)).to(self.centres.dtype)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact rejection sampling: a proposal from the wide Gaussian N(0, 5 I) is kept with probability
        exp(peaks(x) - 4.2). This is at most 1, since the peaks sum to at most 4.15 at any x."""
        kept, missing = [], n
        while missing > 0:
            x = normal_(self.centres.new_empty(8 * missing + 1024, 2), generator) * math.sqrt(5)
            x = x[uniform_(x.new_empty(len(x)), generator) < (self._peaks(x) - 4.2).exp()][:missing]
            kept.append(x)
            missing -= len(x)
        return torch.cat(kept) if kept else self.centres.new_empty(0, 2)


def _positive(name: str, value: Tensor) -> Tensor:
    if not ((value > 0).all() and value.isfinite().all()):
        raise ValueError(f"{name}={value.tolist()} must be above 0 and finite")
    return value


def _precision_root(cov: Tensor) -> Tensor:
    """The lower triangular L with L L' = cov^-1, (D, D) float64."""
    root, failed = torch.linalg.cholesky_ex(cov)
    if failed or not torch.allclose(cov, cov.T):
        raise ValueError(f"cov must be symmetric and positive definite, not {cov.tolist()}")
    precision_root: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(root))
    return precision_root
