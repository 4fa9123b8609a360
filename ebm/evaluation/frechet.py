"""Fréchet distances in the features of the ruler's classifier, as many images a set, with intervals."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.errors import DataError
from ebm.evaluation.classifier import Classifier
from ebm.streams import generator

DRAWS = 8  # subsets of a set that is larger than the others, whose distances are averaged
RESAMPLES = 100  # of the bootstrap
INTERVAL = (0.025, 0.975)


class Gaussian(NamedTuple):
    """The moments of a set's features, and what every distance to it needs."""

    mean: Tensor  # (D,) float64
    cov: Tensor  # (D, D) float64
    root: Tensor  # symmetric square root of `cov`


class Distance(NamedTuple):
    """A Fréchet distance and the interval that 95 % of resamplings of both sets lie in."""

    value: float
    low: float
    high: float


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians with the moments of (N, D) and (M, D) features.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) (Heusel et al. 2017, eq. 6), in float64, 0 or more. The
    estimate from few samples is too large, by about the same amount for sets of the same size.
    """
    return _between(_gaussian(features_a), _gaussian(features_b))


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: a covariance needs (N, D) with N of 2 or more")
    if not features.isfinite().all():
        raise ValueError("features hold non-finite values: the network or the images they come from are broken")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _gaussian(features: Tensor) -> Gaussian:
    mean, cov = moments(features)
    return Gaussian(mean, cov, _square_root(cov))


def _between(a: Gaussian, b: Gaussian) -> float:
    """tr (C_a C_b)^{1/2} is the sum of the singular values of C_a^{1/2} C_b^{1/2}: real and stable for singular C."""
    cross = torch.linalg.svdvals(a.root @ b.root).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(float(distance), 0.0)  # equal sets give 0 up to rounding


def _square_root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance; eigenvalues that rounding took below 0 are 0."""
    values, vectors = torch.linalg.eigh(cov)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


class Comparison(NamedTuple):
    """Distances of sets to the held-out images, each of `images` images, beside the floor: that of training images."""

    images: int
    floor: Distance
    distances: dict[str, Distance]
    ratios: dict[str, Distance]  # to the floor


def compare(train: Tensor, heldout: Tensor, sets: Mapping[str, Tensor], seed: int = 0) -> Comparison:
    """Distances of the features (N, D) of `sets` and of `train` to those of `heldout`, all of equally many.

    A distance falls with the number of images that it is taken of: `images` is the smallest of all but `heldout`, and
    the distance of a larger set is the mean over DRAWS subsets. Intervals: a bootstrap over both sides (Efron 1979).
    Resampling adds a bias of its own, so its quantiles are centred on the value. Of a ratio, numerator and denominator
    see the same resampled held-out images.
    """
    draws, target = generator(seed, "frechet/draws"), _gaussian(heldout)
    everything = {"floor": train, **{f"set {name}": features for name, features in sets.items()}}
    count = min(map(len, everything.values()))
    values = {name: _mean_distance(features, target, count, draws) for name, features in everything.items()}
    if values["floor"] < 1e-9:
        raise DataError("the held-out images are the training images: evaluate.shards needs others than data.shards")
    again: dict[str, list[float]] = {name: [] for name in everything}
    for _ in range(RESAMPLES):
        resampled = _gaussian(_resample(heldout, len(heldout), draws))
        for name, features in everything.items():
            again[name].append(_between(_gaussian(_resample(features, count, draws)), resampled))
    spread = {name: torch.tensor(them, dtype=torch.float64) for name, them in again.items()}
    distances, ratios = {}, {}
    for name in sets:
        key = f"set {name}"
        distances[name] = _with_interval(values[key], spread[key])
        ratios[name] = _with_interval(values[key] / values["floor"], spread[key] / spread["floor"].clamp(min=1e-12))
    return Comparison(count, _with_interval(values["floor"], spread["floor"]), distances, ratios)


def _mean_distance(features: Tensor, target: Gaussian, count: int, draws: torch.Generator) -> float:
    if len(features) == count:
        return _between(_gaussian(features), target)
    subsets = (torch.randperm(len(features), generator=draws)[:count] for _ in range(DRAWS))
    return sum(_between(_gaussian(features[subset]), target) for subset in subsets) / DRAWS


def _resample(features: Tensor, count: int, draws: torch.Generator) -> Tensor:
    return features[torch.randint(len(features), (count,), generator=draws)]


def _with_interval(value: float, again: Tensor) -> Distance:
    """`again`: the values of resamplings; their spread about their mean, as a share of it, is that about `value`."""
    relative = again.quantile(torch.tensor(INTERVAL, dtype=torch.float64)) / again.mean().clamp(min=1e-12)
    return Distance(value, *(value * relative).tolist())


def frechet_metrics(
    classifier: Classifier, train: Tensor, heldout: Tensor, chains: Mapping[str, Tensor], seed: int = 0
) -> dict[str, float]:
    """`compare` of uint8 images (N, C, H, W), as metrics: frechet/n, frechet/floor, and for each set of chains
    frechet/NAME and its ratio to the floor, with _low and _high of each interval."""
    features = {name: classifier.features(images) for name, images in chains.items()}
    result = compare(classifier.features(train), classifier.features(heldout), features, seed)
    return as_metrics(result, len(heldout))


def as_metrics(result: Comparison, heldout: int) -> dict[str, float]:
    """The metrics of a comparison with `heldout` images."""
    values: dict[str, float] = {"frechet/n": result.images, "frechet/n_heldout": heldout}
    values |= named("frechet/floor", result.floor)
    for name, distance in result.distances.items():
        values |= named(f"frechet/{name}", distance) | named(f"frechet/{name}_ratio", result.ratios[name])
    return values


def named(key: str, distance: Distance) -> dict[str, float]:
    """{key: value, key_low: ..., key_high: ...}."""
    return {key: distance.value, f"{key}_low": distance.low, f"{key}_high": distance.high}
