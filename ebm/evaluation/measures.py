"""What `evaluate` can measure: a function from a run's sets to metrics each, and why a run does not support it.
Outliers are judged beside two Gaussian likelihoods."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.data.sources import DENSITIES, known_density
from ebm.errors import ConfigError, DataError, UserError
from ebm.evaluation import metrics
from ebm.evaluation.metrics import (
    Comparison,
    as_metrics,
    auroc,
    class_metrics,
    compare,
    density,
    energy_metrics,
    likelihood_metrics,
    named,
)
from ebm.evaluation.sets import Sets, length_name
from ebm.inference.images import to_states
from ebm.streams import generator

Energies = Callable[[Tensor], Tensor]  # uint8 images (N, C, H, W) -> (N,)
MADE_UP = ("flipped", "noise", "constant", "permuted")  # the sets of `ood_sets`
BIN = 2 / 256  # width of a level of an image in [-1, 1]
COMPONENTS = 64  # principal components of the PCA-Gaussian
MANY = 4096  # images that a log normaliser is taken of
SAMPLES = 2048  # images that its components are taken of, where there are more values than that in an image


class Rates(NamedTuple):
    """How well energies rank outliers above the data; outliers are the positives."""

    auroc: float
    aupr: float  # average precision
    fpr95: float  # share of the data flagged by the threshold that flags 95 % of the outliers


def rates(energies_in: Tensor, energies_out: Tensor) -> Rates:
    """Of energies (N,) of data and (M,) of outliers. Raises ValueError where a set is empty or not finite."""
    area = auroc(energies_in, energies_out)
    return Rates(area, _average_precision(energies_in, energies_out), _false_positives(energies_in, energies_out))


def _average_precision(energies_in: Tensor, energies_out: Tensor) -> float:
    """Sum over thresholds of (recall gained) x precision; equal energies share one threshold."""
    energies = torch.cat([energies_in, energies_out]).double()
    positive = torch.cat([torch.zeros(len(energies_in)), torch.ones(len(energies_out))]).double()
    energies, order = energies.sort(descending=True)
    found, flagged = positive[order].cumsum(0), torch.arange(1, len(energies) + 1)
    last = torch.cat([energies[1:] != energies[:-1], torch.tensor([True])])  # of each group of equal energies
    found, flagged = found[last], flagged[last]
    gained = found.diff(prepend=torch.zeros(1, dtype=torch.float64))
    return float((gained * found / flagged).sum() / len(energies_out))


def _false_positives(energies_in: Tensor, energies_out: Tensor, recall: float = 0.95) -> float:
    threshold = energies_out.sort(descending=True).values[math.ceil(recall * len(energies_out)) - 1]
    return float((energies_in >= threshold).double().mean())


def ood_sets(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Sets that are not the data, by name, each uint8 like the held-out `images` (N, C, H, W) and as many.

    flipped: upside down. noise: every value uniform. constant: each image one colour, drawn uniformly (as Du &
    Mordatch 2019). permuted: each image with its own pixels in a random order, so that its histogram is kept.
    """
    count, channels, height, width = images.shape

    def levels(shape: tuple[int, ...], purpose: str) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed, purpose))

    order = torch.rand(count, height * width, generator=generator(seed, "ood/permuted")).argsort(1)
    permuted = images.flatten(2).gather(2, order[:, None].expand(-1, channels, -1))
    noise = levels(tuple(images.shape), "ood/noise")
    constant = levels((count, channels, 1, 1), "ood/constant").expand(images.shape)
    return dict(zip(MADE_UP, (images.flip(2), noise, constant, permuted.reshape(images.shape)), strict=True))


def pixel_gaussian(train: Tensor) -> Energies:
    """-log likelihood in nats of a Gaussian with the mean and variance of each value of `train`: uint8 images, whose
    levels have the variance of their width as well, or states."""
    x = to_states(train).flatten(1).double()
    mean, variance = x.mean(0), x.var(0) + _level_variance(train)

    def energies(images: Tensor) -> Tensor:
        scaled = (to_states(images).flatten(1).double() - mean).square() / variance
        likelihood: Tensor = (scaled + (2 * math.pi * variance).log()).sum(1) / 2
        return likelihood

    return energies


class PrincipalComponents(NamedTuple):
    """A probabilistic PCA (Tipping & Bishop 1999, eq. 8): variance along R directions, one variance for the rest."""

    mean: Tensor  # (D,)
    values: Tensor  # (R,) ascending
    vectors: Tensor  # (D, R)
    rest: float


def principal_components(x: Tensor, components: int) -> PrincipalComponents:
    """Of states `x` (N, D) float64; at most `components`, and fewer than N or D of them."""
    mean, dim = x.mean(0), x.shape[1]
    total = float(x.var(0).sum())
    centred = x - mean
    if dim <= SAMPLES:
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    else:  # of fewer images than values: the eigenvectors of the small product give those of the large one
        few = centred[:: -(-len(x) // SAMPLES)]
        values, inner = torch.linalg.eigh(few @ few.T / (len(few) - 1))
        vectors = torch.nn.functional.normalize(few.T @ inner, dim=0)
    kept = min(components, dim - 1, len(x) - 1)
    values, vectors = values[len(values) - kept :].clamp(min=0), vectors[:, vectors.shape[1] - kept :]
    return PrincipalComponents(mean, values, vectors, max(total - float(values.sum()), 0.0) / (dim - kept))


def pca_gaussian(train: Tensor, components: int = COMPONENTS) -> Energies:
    """-log likelihood in nats of `principal_components` of `train` as in `pixel_gaussian`."""
    x = to_states(train).flatten(1).double()
    mean, values, vectors, rest = principal_components(x, components)
    values, rest = values + _level_variance(train), rest + _level_variance(train)
    dim, kept = vectors.shape
    volume = (values.log().sum() + (dim - kept) * math.log(rest) + dim * math.log(2 * math.pi)) / 2

    def energies(images: Tensor) -> Tensor:
        centred = to_states(images).flatten(1).double() - mean
        along = centred @ vectors
        outside = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0)
        likelihood: Tensor = (along.square() / values).sum(1) / 2 + outside / (2 * rest) + volume
        return likelihood

    return energies


def pca_mixture(train: Tensor, seed: int = 0) -> Energies:
    """-log likelihood in nats of a mixture of `pca_gaussian`, one for each cluster of `train` (Tipping & Bishop 1999b,
    with clusters fixed by k-means). A cluster of n data has at most n / 4 components."""
    numbers = metrics.clusters(train, seed)(train)
    parts = [train[numbers == k] for k in range(metrics.CLUSTERS)]
    parts = [part for part in parts if len(part) >= 8]  # fewer tell nothing of a covariance
    count = sum(map(len, parts))
    fitted = [(math.log(len(part) / count), pca_gaussian(part, min(COMPONENTS, len(part) // 4))) for part in parts]

    def energies(images: Tensor) -> Tensor:
        likelihood: Tensor = -torch.logsumexp(torch.stack([share - part(images) for share, part in fitted]), 0)
        return likelihood

    return energies


def _level_variance(data: Tensor) -> float:
    """The variance within a level of uint8 images; 0 for states."""
    return BIN**2 / 12 if data.dtype == torch.uint8 else 0.0


def ood_metrics(
    energies: Energies,
    heldout: Tensor,
    seed: int = 0,
    outliers: Mapping[str, Tensor] | None = None,
    train: Tensor | None = None,
) -> dict[str, float]:
    """How well `energies` tell the held-out images from those of `ood_sets` and from `outliers`, uint8 (M, C, H, W) by
    name: ood/NAME_auroc, _aupr, _fpr95. With `train`, also ood/NAME_auroc_pixel_gaussian and _auroc_pca_gaussian: the
    AUROC of likelihoods that were fitted to these images, which an energy should beat."""
    baselines = {} if train is None else {"pixel_gaussian": pixel_gaussian(train), "pca_gaussian": pca_gaussian(train)}
    inside = {name: function(heldout) for name, function in {"": energies, **baselines}.items()}
    values: dict[str, float] = {}
    for name, images in {**ood_sets(heldout, seed), **(outliers or {})}.items():
        own = rates(inside[""], energies(images))
        values |= {f"ood/{name}_{rate}": value for rate, value in own._asdict().items()}
        for model, function in baselines.items():
            values[f"ood/{name}_auroc_{model}"] = auroc(inside[model], function(images))
    return values


def below_the_data(values: Mapping[str, float]) -> list[str]:
    """A sentence for each set of outliers of `ood_metrics` that the energy takes for likelier than the data."""
    found = {key: value for key, value in values.items() if key.startswith("ood/") and key.endswith("_auroc")}
    return [
        f"{key[4:-6]}: lies below the data: the energy takes these outliers for likelier than held-out images in "
        f"{1 - value:.0%} of pairs"
        for key, value in found.items()
        if value < 0.5
    ]


Metrics = dict[str, float | str]

OF_IMAGES = ("frechet", "classes", "ood", "lengths")
OF_LABELS = ("frechet", "classes", "lengths")
NEEDS_HELDOUT = ("frechet", "ood", "lengths")
OF_SOME_RUNS = ("accuracy", "likelihood")  # left out of the others without a word


class Measured(NamedTuple):
    """What a measurement found: metrics, and sentences for the reader."""

    values: Metrics
    words: list[str] = []  # noqa: RUF012 - never changed


def problem_with(metric: str, sets: Sets) -> UserError | None:
    """Why the run does not support a metric; None where it does."""
    config = sets.run.config
    if metric in OF_IMAGES and not sets.of_images:
        return ConfigError(f"data.shape={list(sets.run.shape)}: {metric} is of images; use --metrics energy,density")
    if metric == "likelihood" and not _has_bits(sets) and config.data.source not in DENSITIES:
        return ConfigError(
            f"data.source={config.data.source} with loss.kind={config.loss.kind}: likelihood needs images whose energy "
            "is normalised by noise levels (loss.kind=dual_score_matching), or a density that is known, on the plane: "
            f"{', '.join(DENSITIES)}"
        )
    if metric == "accuracy" and not sets.run.num_classes:
        return ConfigError("energy.num_classes=None: accuracy is of class-conditional energies")
    if metric == "accuracy" and (sets.heldout is None or sets.heldout.labels is None):
        return ConfigError(f"evaluate.shards={config.evaluate.shards}: accuracy needs labelled held-out data")
    if metric in NEEDS_HELDOUT and sets.heldout is None:
        return ConfigError(
            f"evaluate.shards=None: {metric} needs held-out images; set evaluate.shards in the run's config.yaml "
            "to a directory of shards, or evaluate.source too, to have them read from a source"
        )
    if metric in OF_LABELS and sets.train.labels is None:
        return DataError(
            f"data.shards={config.data.shards}: {metric} trains a classifier, which needs images of two or "
            "more classes with a label each; shard a labelled source, or use --metrics ood,energy,density"
        )
    return None


def measure_frechet(sets: Sets) -> Measured:
    result, words = sets.comparison, []
    values: Metrics = {**as_metrics(_without_lengths(sets, result), len(_heldout(sets)))}
    if sets.noise:
        words.append(f"chains are compared with data that has their noise ({sets.noise:g})")
        if abs(sets.run.temperature - 1) < 0.5:
            values |= _denoised(sets)
    return Measured(values, words)


def _denoised(sets: Sets) -> Metrics:
    """Fresh chains, denoised by the energy itself, beside clean data."""
    clean = sets.as_data(sets.run.denoised(sets.fresh), "denoised chains")
    features = {"fresh_denoised": sets.ruler.features(clean)}
    result = compare(sets.ruler.features(sets.train.data), sets.ruler.features(_heldout(sets)), features, sets.seed)
    found = as_metrics(result, len(_heldout(sets)))
    return {key: value for key, value in found.items() if "fresh_denoised" in key}


def measure_lengths(sets: Sets) -> Measured:
    """The Fréchet ratio and the mean energy of fresh chains after each of the asked numbers of steps."""
    values: Metrics = {}
    centre, deviation = _data_energy(sets)
    ratios = [sets.comparison.ratios[length_name(length)] for length in sets.lengths]
    for length, ratio in zip(sets.lengths, ratios, strict=True):
        energy = float(sets.energies(sets.of_lengths[0][length]).mean())
        values |= {**named(f"length/{length}", ratio), f"length/{length}_energy": (energy - centre) / deviation}
    best, worst = (choose(ratio.value for ratio in ratios) for choose in (min, max))
    values["length/worst_over_best"] = worst / max(best, 1e-12)
    return Measured(values)


def measure_classes(sets: Sets) -> Measured:
    labelled = None
    if sets.heldout is not None and sets.heldout.labels is not None:
        labelled = sets.noisy(sets.heldout.data), sets.heldout.labels
    chains = {name: sets.as_data(x, f"{name} chains") for name, x in sets.chains.items()}
    return Measured({**class_metrics(sets.ruler, sets.train.num_classes, chains, labelled)})


def measure_ood(sets: Sets, outliers: Mapping[str, Tensor]) -> Measured:
    values = ood_metrics(sets.energies, _heldout(sets), sets.seed, outliers, sets.train.data)
    return Measured({**values}, below_the_data(values))


def measure_energy(sets: Sets) -> Measured:
    heldout = {} if sets.heldout is None else {"heldout": sets.heldout.data}
    return Measured({**energy_metrics(sets.energies, {"train": sets.train.data, **heldout, **sets.chains})})


def measure_density(sets: Sets) -> Measured:
    """Whether exp(-E / T) is the density of what the chains visit: a Metropolis test of their own steps; the energy of
    the longest chains in deviations of the data's from its mean; the class that they lose most."""
    run, length = sets.run, max([sets.steps, *sets.lengths])
    long, sampler = sets.of_lengths[0][length], run.config.sampler
    function = run.marginal if run.num_classes else run.network
    accepted = {
        f"density/acceptance_{name}": metrics.acceptance(function, x[: 8 * 512].to(run.device), sampler, sets.seed)
        for name, x in (("persistent", sets.persistent), ("long", long))
        if x is not None
    }
    acceptance = min(accepted.values(), key=lambda value: -math.inf if math.isnan(value) else value)
    centre, deviation = _data_energy(sets)
    drift = (float(sets.energies(long).mean()) - centre) / deviation
    word = metrics.verdict(acceptance, drift)
    values: Metrics = {**accepted, "density/acceptance": acceptance, "density/long_steps": length}
    values |= {"density/long_energy": drift, "density/verdict": word}
    words = [f"{word}: a Metropolis test would accept {acceptance:.0%} of the sampler's own steps"]
    if word == "walk":
        words[0] += "; its samples are those of the walk, and its energies no log-densities: lower sampler.step_size"
    if word == "hole":
        words[0] += f", but chains of {length} steps lie {-drift:.1f} deviations below the data: where no data is"
    worst = _worst_share(sets, long)
    return Measured(values | {"density/class_shares_worst": worst}, words)


def _worst_share(sets: Sets, long: Tensor) -> float:
    x = sets.as_data(long, "long chains")
    data = sets.noisy((sets.heldout or sets.train).data)
    predict: Callable[[Tensor], Tensor]
    if sets.of_images and sets.train.labels is not None:
        predict, count = sets.ruler.predict, sets.train.num_classes
    else:
        predict, count = metrics.clusters(sets.noisy(sets.train.data), sets.seed), metrics.CLUSTERS
    return metrics.worst_share(metrics.shares(predict(x), count), metrics.shares(predict(data), count))


def measure_accuracy(sets: Sets) -> Measured:
    assert sets.heldout is not None and sets.heldout.labels is not None, "the caller checks"
    predicted = sets.run.class_energies(to_states(sets.heldout.data)).argmin(1)
    return Measured({"accuracy/heldout": float((predicted == sets.heldout.labels).double().mean())})


def measure_likelihood(sets: Sets) -> Measured:
    """Of images bits per dimension; on the plane the learned density beside the true one, by quadrature."""
    if _has_bits(sets):
        return measure_bits(sets)
    energy, modes = known_density(str(sets.run.config.data.source))
    learned = density(sets.energies, sets.run.temperature)
    return Measured({**likelihood_metrics(density(energy), learned, modes)})


def _has_bits(sets: Sets) -> bool:
    return sets.of_images and sets.run.config.loss.kind == "dual_score_matching"


def measure_bits(sets: Sets) -> Measured:
    """Bits per dimension of held-out images (of training images where there are none), in one forward each, beside
    Gaussians that are fitted to the training images. All of them see the images dequantised and with the run's lowest
    noise, and count bits at the width of a level."""
    run, dim = sets.run, math.prod(sets.run.shape)
    train = sets.with_run_noise(sets.train.data, "train")
    x = train if sets.heldout is None else sets.with_run_noise(sets.heldout.data, "heldout")

    def bits(nats: Tensor) -> float:
        return float(nats.double().mean()) / (dim * math.log(2)) - math.log2(BIN)

    values: Metrics = {"likelihood/bpd": bits(sets.energies(x) + run.log_normaliser(train[:MANY], sets.seed))}
    baselines = {"diagonal_gaussian": pixel_gaussian(train), "pca_mixture": pca_mixture(train, sets.seed)}
    if len(train) > 2 * dim and dim <= SAMPLES:
        baselines["full_gaussian"] = pca_gaussian(train, dim - 1)
    values |= {f"likelihood/bpd_{name}": bits(energies(x)) for name, energies in baselines.items()}
    noise = run.data_noise
    return Measured(values, [f"bits per dimension are of images with noise of {noise:g}, {noise / BIN:.1f} levels"])


MEASURES: dict[str, Callable[[Sets], Measured]] = {
    "frechet": measure_frechet,
    "classes": measure_classes,
    "energy": measure_energy,
    "density": measure_density,
    "accuracy": measure_accuracy,
    "likelihood": measure_likelihood,
    "lengths": measure_lengths,
}


def _heldout(sets: Sets) -> Tensor:
    assert sets.heldout is not None, "problem_with says so before"
    return sets.heldout.data


def _without_lengths(sets: Sets, result: Comparison) -> Comparison:
    lengths = {length_name(length) for length in sets.lengths}
    return result._replace(distances={name: d for name, d in result.distances.items() if name not in lengths})


def _data_energy(sets: Sets) -> tuple[float, float]:
    """Mean and standard deviation of E over data as training saw it."""
    energies = sets.energies(sets.data_states).double()
    return float(energies.mean()), max(float(energies.std()), 1e-12)
