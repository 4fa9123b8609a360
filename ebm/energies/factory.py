"""From `config.energy` to a module."""

import importlib
import math

import torch

from ebm.config import energies as kinds
from ebm.energies.analytic import GaussianEnergy
from ebm.energies.base import BaseEnergyFunction, refuse_mixing_layers
from ebm.energies.graph import PixelGraphEnergyFunction, PointGraphEnergyFunction
from ebm.energies.networks import (
    ConvolutionalEnergyFunction,
    HybridEnergyFunction,
    MLPEnergyFunction,
    TransformerEnergyFunction,
)
from ebm.energies.resnet import ResNetEnergyFunction, WideResNetEnergyFunction
from ebm.errors import ConfigError
from ebm.streams import derive_seed

IMAGE_NETWORKS = {
    "conv": ConvolutionalEnergyFunction,
    "resnet": ResNetEnergyFunction,
    "wide_resnet": WideResNetEnergyFunction,
    "transformer": TransformerEnergyFunction,
}


def build_energy(config, shape: tuple[int, ...], seed: int) -> BaseEnergyFunction:
    """The energy of `config.energy` for images of `shape` (C, H, W) or vectors of `shape` (D,), its weights a function
    of `seed` alone. Raises ConfigError where the kind does not go with the shape."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        return _build(config, tuple(shape))


def _build(config, shape: tuple[int, ...], key: str = "energy") -> BaseEnergyFunction:
    """The energy of the section that `key` names."""
    if isinstance(config, kinds.ImportConfig):
        return refuse_mixing_layers(_import(config, key), config.path)
    if isinstance(config, kinds.HybridConfig):
        prior, network = _gaussian(config.prior, shape), _build(config.network, shape, f"{key}.network")
        return HybridEnergyFunction(prior=prior, network=network, weight=config.weight)
    if isinstance(config, kinds.GaussianConfig):
        return _gaussian(config, shape, full=config.covariance == "full", trainable=True)
    settings, of = config.model_dump(exclude={"kind"}), f"{key}.kind={config.kind} with data.shape={list(shape)}"
    if isinstance(config, kinds.MLPConfig):
        return MLPEnergyFunction(math.prod(shape), **settings)
    if isinstance(config, kinds.GraphConfig):
        return _graph(shape, key, of, **settings)
    if len(shape) != 3:
        raise ConfigError(f"{of}: it takes images (C, H, W); use {key}.kind=mlp or graph for vectors")
    channels, height, width = shape
    return IMAGE_NETWORKS[config.kind](channels=channels, height=height, width=width, **settings)


def _gaussian(config, shape: tuple[int, ...], full: bool = False, trainable: bool = False) -> GaussianEnergy:
    variance = config.std**2
    cov = variance * torch.eye(math.prod(shape)) if full else torch.tensor(variance)
    return GaussianEnergy(torch.full(shape, config.mean), cov, trainable=trainable)


def _graph(shape, key: str, of: str, point_dim: int, neighbours: int | None, **settings) -> BaseEnergyFunction:
    if len(shape) == 3:
        if neighbours is not None:
            raise ConfigError(f"{of}: {key}.neighbours={neighbours} is for point sets; use null: the pixels around")
        return PixelGraphEnergyFunction(*shape, **settings)
    if shape[0] % point_dim:
        raise ConfigError(f"{of}: {key}.point_dim={point_dim} does not divide a vector of {shape[0]} into points")
    try:
        return PointGraphEnergyFunction(shape[0] // point_dim, point_dim, neighbours=neighbours, **settings)
    except ValueError as error:
        raise ConfigError(f"{of}: {key}.{error}") from error


def _import(config: kinds.ImportConfig, key: str) -> BaseEnergyFunction:
    module, name = config.path.split(":")
    where = f"{key}.path={config.path!r} with {key}.settings={config.settings}"
    try:
        made_by = getattr(importlib.import_module(module), name)
        # Before the call: `subprocess:Popen` with its settings would be a program started by a config.
        if not (isinstance(made_by, type) and issubclass(made_by, torch.nn.Module)):
            raise ConfigError(f"{where}: {name} is no class of torch.nn.Module; derive it from BaseEnergyFunction")
        energy = made_by(**config.settings)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where}: {error}; the module must be importable from where the command runs") from error
    if config.num_classes:
        if not isinstance(energy, BaseEnergyFunction):
            raise ConfigError(f"{where}: with {key}.num_classes, {name} must be derived from BaseEnergyFunction")
        energy.num_classes = config.num_classes
    return energy
