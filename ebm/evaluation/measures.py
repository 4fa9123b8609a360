"""What `evaluate` can measure: a function from a run's sets to metrics each, and why a run does not support it."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from ebm.data.toys import DENSITIES, known_density
from ebm.errors import ConfigError, DataError, UserError
from ebm.evaluation import trust
from ebm.evaluation.frechet import Comparison, as_metrics, compare, named
from ebm.evaluation.metrics import class_metrics, energy_metrics, likelihood_metrics
from ebm.evaluation.outliers import below_the_data, ood_metrics
from ebm.evaluation.quadrature import density
from ebm.evaluation.sets import Sets, length_name
from ebm.inference.images import to_states

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
    if metric == "likelihood" and config.data.source not in DENSITIES:
        return ConfigError(
            f"data.source={config.data.source}: likelihood needs a density that is known, on the plane; use one of "
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
        f"density/acceptance_{name}": trust.acceptance(function, x[: 8 * 512].to(run.device), sampler, sets.seed)
        for name, x in (("persistent", sets.persistent), ("long", long))
        if x is not None
    }
    acceptance = min(accepted.values(), key=lambda value: -math.inf if math.isnan(value) else value)
    centre, deviation = _data_energy(sets)
    drift = (float(sets.energies(long).mean()) - centre) / deviation
    word = trust.verdict(acceptance, drift)
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
        predict, count = trust.clusters(sets.noisy(sets.train.data), sets.seed), trust.CLUSTERS
    return trust.worst_share(trust.shares(predict(x), count), trust.shares(predict(data), count))


def measure_accuracy(sets: Sets) -> Measured:
    assert sets.heldout is not None and sets.heldout.labels is not None, "the caller checks"
    predicted = sets.run.class_energies(to_states(sets.heldout.data)).argmin(1)
    return Measured({"accuracy/heldout": float((predicted == sets.heldout.labels).double().mean())})


def measure_likelihood(sets: Sets) -> Measured:
    """The learned density beside the true one, by quadrature."""
    energy, modes = known_density(str(sets.run.config.data.source))
    learned = density(sets.energies, sets.run.temperature)
    return Measured({**likelihood_metrics(density(energy), learned, modes)})


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
