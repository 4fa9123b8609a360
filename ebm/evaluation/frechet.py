"""The Fréchet distance between two sets of feature vectors."""

import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians with the moments of (N, D) and (M, D) features.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) (Heusel et al. 2017, eq. 6), in float64, 0 or more. The
    estimate from few samples is too large, by about the same amount for sets of the same size.
    """
    (mean_a, cov_a), (mean_b, cov_b) = moments(features_a), moments(features_b)
    return _between_gaussians(mean_a, cov_a, mean_b, cov_b)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: a covariance needs (N, D) with N of 2 or more")
    if not features.isfinite().all():
        raise ValueError("features hold non-finite values: the network or the images they come from are broken")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _between_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """tr (C_a C_b)^{1/2} is the sum of the singular values of C_a^{1/2} C_b^{1/2}: real and stable for singular C."""
    cross = torch.linalg.svdvals(_square_root(cov_a) @ _square_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # equal sets give 0 up to rounding


def _square_root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance; eigenvalues that rounding took below 0 are 0."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
