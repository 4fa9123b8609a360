"""Measures of samples and energies: detection, class shares, densities on the plane by quadrature, Fréchet distances in
the features of the ruler's classifier with as many images a set, and whether an energy is a density at all."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm.config import HMCConfig, SamplerConfig
from ebm.errors import DataError
from ebm.evaluation.classifier import Classifier
from ebm.inference.images import to_states
from ebm.samplers import MetropolisInfo, hmc, mala
from ebm.streams import generator, stream_sources

HALF_WIDTH = 12.0  # of the square that is integrated over
CELLS = 480  # a side: cells of .05, far below the width of any mode of the densities in `ebm.data.sources`


class Density(NamedTuple):
    """A density on the centres of a square grid, rows from low y to high y."""

    points: Tensor  # (CELLS**2, 2) float32
    log_p: Tensor  # (CELLS**2,) float64, normalised over the square
    cell: float  # area of a cell

    @property
    def mass(self) -> Tensor:
        """Probability of each cell, (CELLS**2,) float64."""
        return self.log_p.exp() * self.cell

    @property
    def energies(self) -> np.ndarray:
        """-log p, (CELLS, CELLS), rows from low y to high y."""
        return -self.log_p.view(math.isqrt(len(self.log_p)), -1).numpy()


def density(
    energy: Callable[[Tensor], Tensor], temperature: float = 1.0, half_width: float = HALF_WIDTH, cells: int = CELLS
) -> Density:
    """exp(-energy(x) / temperature), normalised over [-half_width, half_width]^2; `energy` maps (N, 2) to (N,)."""
    centres = (torch.arange(cells) + 0.5) / cells * 2 * half_width - half_width
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points, cell = torch.stack([x.flatten(), y.flatten()], 1), (2 * half_width / cells) ** 2
    with torch.no_grad():
        log_p = -torch.cat([energy(part) for part in torch.split(points, 1 << 16)]).double().cpu() / temperature
    return Density(points, log_p - torch.logsumexp(log_p, 0) - math.log(cell), cell)


def kl_divergence(true: Density, learned: Density) -> float:
    """KL(true || learned) in nats, 0 or more up to the error of the rule (below 1e-6 for smooth densities)."""
    return float((true.mass * (true.log_p - learned.log_p)).sum())


def mode_weights(density: Density, modes: Tensor) -> Tensor:
    """The mass nearest to each of `modes` (M, 2): (M,) float64, of sum 1."""
    nearest = torch.cdist(density.points, modes.float()).argmin(1)
    return torch.zeros(len(modes), dtype=torch.float64).index_add_(0, nearest, density.mass)


PRESENT = 0.01  # a class is present among chains if this share of them is predicted to be of it


def auc(e_pos: Tensor, e_neg: Tensor) -> Tensor:
    """P(E(x_neg) > E(x_pos)), ties half, from energies (P,) and (N,): .5 where chains and data can't be told apart,
    1 where every chain lies above all data. A scalar on the energies' device (Mann & Whitney 1947)."""
    ordered = e_pos.sort().values
    below = torch.searchsorted(ordered, e_neg.contiguous())
    up_to = torch.searchsorted(ordered, e_neg.contiguous(), right=True)
    return (below + up_to).double().mean() / (2 * len(e_pos))


def auroc(energies_in: Tensor, energies_out: Tensor) -> float:
    """`auc` of energies (N,) of data and (M,) of others, as a number, in [0, 1].

    1: every out-of-distribution image has a higher energy than every image of the data; 0.5: as likely as not. Raises
    ValueError where a set is empty or not finite.
    """
    if not len(energies_in) or not len(energies_out):
        raise ValueError(f"AUROC of {len(energies_in)} and {len(energies_out)} energies: needs one of each or more")
    if not (energies_in.isfinite().all() and energies_out.isfinite().all()):
        raise ValueError("AUROC of non-finite energies: the network is broken, use an earlier checkpoint")
    return float(auc(energies_in.double(), energies_out.double()))


def class_metrics(
    classifier: Classifier, num_classes: int, chains: Mapping[str, Tensor], heldout: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """The share of each predicted class among chains, and how many classes are present (a share of 1 % or more).

    `heldout`, images and labels, says how far the predictions can be trusted: `classes/classifier_accuracy`.
    """
    values: dict[str, float] = {}
    if heldout is not None:
        images, labels = heldout
        values["classes/classifier_accuracy"] = float((classifier.predict(images) == labels).double().mean())
    for name, images in chains.items():
        shares = torch.bincount(classifier.predict(images), minlength=num_classes).double() / len(images)
        values[f"classes/{name}_present"] = int((shares >= PRESENT).sum())
        values |= {f"classes/{name}_share_{number}": float(share) for number, share in enumerate(shares)}
    return values


def energy_metrics(energies: Callable[[Tensor], Tensor], sets: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean energy of each set of images or states. Of a well-trained model all lie close together."""
    return {f"energy/{name}": float(energies(images).double().mean()) for name, images in sets.items()}


def likelihood_metrics(true: Density, learned: Density, modes: Tensor) -> dict[str, float]:
    """KL(true || learned) in nats, and the share of each of `modes` (M, 2), beside the true one. By quadrature."""
    values = {"likelihood/kl": kl_divergence(true, learned)}
    weights = zip(mode_weights(true, modes).tolist(), mode_weights(learned, modes).tolist(), strict=True)
    for number, (should, share) in enumerate(weights):
        values |= {f"likelihood/mode_{number}": share, f"likelihood/mode_{number}_ratio": share / should}
    return values


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


ACCEPTED = 0.6  # mean acceptance from which chains sample the energy that they follow
HOLE = 1.0  # standard deviations of the data's energies by which long chains may lie below the data
CLUSTERS = 10  # stand-ins for classes, where there are no labels
WARM = 0.1  # temperature from which chains keep the noise of the data that they were trained on


def acceptance(energy: Callable[[Tensor], Tensor], x: Tensor, sampler: SamplerConfig, seed: int = 0) -> float:
    """Mean probability with which a Metropolis test accepts one step of the sampler, at its own step size and
    temperature, from states `x` (N, *shape) on the energy's device.

    An unadjusted chain samples exp(-E / T) up to a bias that falls with the step size. Where nearly all of its steps
    would be accepted the bias is small, and the energy is the density of what the chain visits; where few would, the
    chain visits another density than exp(-E / T) (Roberts & Tweedie 1996). NaN at temperature 0.
    """
    if sampler.implied_temperature <= 0:
        return math.nan
    settings: dict[str, Any] = {"temperature": sampler.implied_temperature, "bounds": sampler.bounds}
    if isinstance(sampler, HMCConfig):
        move: Callable[..., tuple[Tensor, MetropolisInfo]] = hmc
        settings |= {"step_size": sampler.step_size, "num_leapfrog": sampler.num_leapfrog}
    else:
        move, settings = mala, settings | {"step_size": sampler.last_step_size}
    settings |= {
        "num_steps": 1,
        "boundary": "reflect",
        "generator": stream_sources(seed, "acceptance", device=x.device),
    }
    inside = x if sampler.bounds is None else x.clamp(*sampler.bounds)
    found = [move(energy, part, **settings)[1].acceptance * len(part) for part in torch.split(inside, 512)]
    return float(torch.stack(found).sum()) / len(x)


def verdict(acceptance: float, drift: float = 0.0) -> str:
    """One word for an energy, from the acceptance of its chains' steps, and from the mean energy of long chains less
    that of training data, in standard deviations of the data's energies.

    `walk`: chains do not sample the energy that they follow, and its values are no log-densities. `hole`: they sample
    it, and find it low where no data is. `density`: neither.
    """
    if not acceptance >= ACCEPTED:
        return "walk"
    return "hole" if drift < -HOLE else "density"


def shares(classes: Tensor, num_classes: int) -> Tensor:
    """Share of each class among `classes` (N,), (num_classes,) float64."""
    return torch.bincount(classes, minlength=num_classes).double() / max(len(classes), 1)


def worst_share(of_chains: Tensor, of_data: Tensor) -> float:
    """The smallest share of a class among chains over its share in the data: 1 is right, 0 a class that is lost."""
    present = of_data > 0
    return float((of_chains[present] / of_data[present]).min())


def clusters(train: Tensor, seed: int = 0, number: int = CLUSTERS, most: int = 5000) -> Callable[[Tensor], Tensor]:
    """k-means of uint8 images, or vectors, (N, ...) as a function to cluster numbers (M,): classes of a set that has no
    labels (Lloyd 1982; starts by Arthur & Vassilvitskii 2007). Images are told apart by their principal components."""
    from sklearn.cluster import KMeans  # slow to load, and for data without labels alone

    x = to_states(train[:: max(1, len(train) // most)]).flatten(1).double()
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd((x - mean)[:2000], full_matrices=False)
    directions = directions[:32].T
    fitted = KMeans(number, n_init=4, random_state=seed % 2**32).fit(((x - mean) @ directions).numpy())
    centres = torch.from_numpy(fitted.cluster_centers_)

    def nearest(data: Tensor) -> Tensor:
        return torch.cdist((to_states(data).flatten(1).double() - mean) @ directions, centres).argmin(1)

    return nearest
