"""Out-of-distribution detection: how well energies tell data from outliers, beside two Gaussian likelihoods."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.evaluation.metrics import auroc
from ebm.inference.images import to_states
from ebm.streams import generator

Energies = Callable[[Tensor], Tensor]  # uint8 images (N, C, H, W) -> (N,)
MADE_UP = ("flipped", "noise", "constant", "permuted")  # the sets of `ood_sets`
BIN = 2 / 256  # width of a level of an image in [-1, 1]
COMPONENTS = 64  # principal components of the PCA-Gaussian
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
    """-log likelihood, up to a constant, of a Gaussian with the mean and variance of each value of uint8 `train`."""
    x = to_states(train).flatten(1).double()
    mean, variance = x.mean(0), x.var(0) + BIN**2 / 12

    def energies(images: Tensor) -> Tensor:
        likelihood: Tensor = ((to_states(images).flatten(1).double() - mean).square() / (2 * variance)).sum(1)
        return likelihood

    return energies


def pca_gaussian(train: Tensor) -> Energies:
    """-log likelihood, up to a constant, of a probabilistic PCA of uint8 `train` (Tipping & Bishop 1999, eq. 8): full
    variance along the first COMPONENTS, one variance for the rest."""
    x = to_states(train).flatten(1).double()
    mean, dim = x.mean(0), x.shape[1]
    total = float(x.var(0).sum())
    centred = x - mean
    if dim <= SAMPLES:
        values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    else:  # of fewer images than values: the eigenvectors of the small product give those of the large one
        few = centred[:: -(-len(x) // SAMPLES)]
        values, inner = torch.linalg.eigh(few @ few.T / (len(few) - 1))
        vectors = torch.nn.functional.normalize(few.T @ inner, dim=0)
    kept = min(COMPONENTS, dim - 1, len(x) - 1)
    values, vectors = values[-kept:].clamp(min=0), vectors[:, -kept:]
    rest = max(total - float(values.sum()), 0.0) / (dim - kept) + BIN**2 / 12
    values = values + BIN**2 / 12

    def energies(images: Tensor) -> Tensor:
        centred = to_states(images).flatten(1).double() - mean
        along = centred @ vectors
        outside = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0)
        likelihood: Tensor = (along.square() / values).sum(1) / 2 + outside / (2 * rest)
        return likelihood

    return energies


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
