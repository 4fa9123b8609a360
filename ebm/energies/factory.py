"""Builds the energy that `config.energy` describes."""

import importlib
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ebm.config import energies as sections
from ebm.config.energies import EnergyConfig, Network
from ebm.energies.analytic import GaussianEnergy
from ebm.energies.base import BaseEnergyFunction
from ebm.energies.graph import PixelGraphEnergyFunction, PointGraphEnergyFunction
from ebm.energies.networks import (
    ConvolutionalEnergyFunction,
    HybridEnergyFunction,
    MLPEnergyFunction,
    NetworkEnergy,
    TransformerEnergyFunction,
)
from ebm.energies.noise_conditional import PLANES, NoiseConditionalEnergy
from ebm.energies.resnet import ResNetEnergyFunction, WideResNetEnergyFunction
from ebm.errors import ConfigError
from ebm.streams import derive_seed

IMAGE_NETWORKS: dict[str, type[NetworkEnergy]] = {
    "conv": ConvolutionalEnergyFunction,
    "resnet": ResNetEnergyFunction,
    "wide_resnet": WideResNetEnergyFunction,
    "transformer": TransformerEnergyFunction,
}


def build_energy(config: EnergyConfig, shape: tuple[int, ...], seed: int) -> BaseEnergyFunction:
    """The energy of `config.energy` for images of `shape` (C, H, W) or vectors of `shape` (D,).

    Its initial weights depend on `seed` alone, and torch's global generator is left as it was. Raises ConfigError if
    the kind does not go with the shape, or if a class of the user can't be imported or made.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        return _build(config, tuple(shape))


def _build(config: EnergyConfig, shape: tuple[int, ...]) -> BaseEnergyFunction:
    if isinstance(config, sections.HybridConfig):
        prior, network = _gaussian(config.prior, shape), _network(config.network, shape, "energy.network")
        return HybridEnergyFunction(prior=prior, network=network, weight=config.weight)
    if isinstance(config, sections.GaussianConfig):
        return _gaussian(config, shape, full=config.covariance == "full", trainable=True)
    return _network(config, shape, "energy")


def _network(config: Network, shape: tuple[int, ...], key: str) -> BaseEnergyFunction:
    """The network of the section that `key` names."""
    if isinstance(config, sections.ImportConfig):
        return _imported(config, key)
    if config.noise_conditional is not None:
        plain = config.model_copy(update={"noise_conditional": None})
        network = _network(plain, (shape[0] + PLANES, *shape[1:]), key)
        return NoiseConditionalEnergy(network, shape, **config.noise_conditional.model_dump())
    settings = config.model_dump(exclude={"kind", "noise_conditional"})
    where = f"{key}.kind={config.kind} with data.shape={list(shape)}"
    if isinstance(config, sections.MLPConfig):
        return MLPEnergyFunction(math.prod(shape), **settings)
    if isinstance(config, sections.GraphConfig):
        return _graph(shape, key, where, **settings)
    if len(shape) != 3:
        raise ConfigError(f"{where}: it takes images (C, H, W); use {key}.kind=mlp or graph for vectors")
    channels, height, width = shape
    return IMAGE_NETWORKS[config.kind](channels=channels, height=height, width=width, **settings)


def _gaussian(
    config: sections.GaussianPriorConfig, shape: tuple[int, ...], full: bool = False, trainable: bool = False
) -> GaussianEnergy:
    variance = config.std**2
    cov = variance * torch.eye(math.prod(shape)) if full else torch.tensor(variance)
    return GaussianEnergy(torch.full(shape, config.mean), cov, trainable=trainable)


def _graph(
    shape: tuple[int, ...], key: str, where: str, point_dim: int, neighbours: int | None, **settings: Any
) -> BaseEnergyFunction:
    """A graph of pixels for images, of points for vectors."""
    if len(shape) == 3:
        if neighbours is not None:
            raise ConfigError(f"{where}: {key}.neighbours={neighbours} is for point sets; use null: the pixels around")
        return PixelGraphEnergyFunction(*shape, **settings)
    if shape[0] % point_dim:
        raise ConfigError(f"{where}: {key}.point_dim={point_dim} does not divide a vector of {shape[0]} into points")
    try:
        return PointGraphEnergyFunction(shape[0] // point_dim, point_dim, neighbours=neighbours, **settings)
    except ValueError as error:
        raise ConfigError(f"{where}: {key}.{error}") from error


# Classes of the user (energy.kind=import)


def _imported(config: sections.ImportConfig, key: str) -> BaseEnergyFunction:
    """An instance of the class that `config.path` names."""
    module, name = config.path.split(":")
    where = f"{key}.path={config.path!r} with {key}.settings={config.settings}"
    try:
        with _working_directory_first():  # also while the class is made: its constructor may import more
            energy = _energy_class(getattr(importlib.import_module(module), name), where)(**config.settings)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: {error}; the module must be importable: installed, or in the directory where the command runs"
        ) from error
    if config.num_classes:
        energy.num_classes = config.num_classes
    _refuse_mixing_layers(energy, config.path)
    return energy


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Imports look in the working directory first, as under `python -m`. A console script and train.py look only
    in their own folder."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _energy_class(found: object, where: str) -> type[BaseEnergyFunction]:
    """`found`, if it is a class of energies. An nn.Module that is not derived from BaseEnergyFunction becomes one, with
    the same parameters and the same names for them."""
    # Checked before it is called: `subprocess:Popen` with its settings would be a program started by a config.
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{where}: it is no class of torch.nn.Module; derive it from BaseEnergyFunction")
    if issubclass(found, BaseEnergyFunction):
        return found
    return type(found.__name__, (found, BaseEnergyFunction), {"__module__": found.__module__})


def _refuse_mixing_layers(energy: nn.Module, where: str) -> None:
    """Raises ConfigError if a layer makes the energy of one sample depend on the others, or on chance."""
    for name, layer in energy.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}: it makes the energy of an image depend on "
                "the others in its batch; use GroupNorm, LayerNorm or spectral normalisation"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}: it makes the energy random, while chains "
                "sample the one without it; use weight decay or spectral normalisation"
            )
