"""Energies: modules that map states (B, *shape) to energies (B,)."""

import importlib

import torch

from ebm.config import ConvConfig, ImportConfig, MLPConfig
from ebm.energies.base import BaseEnergyFunction, refuse_mixing_layers
from ebm.energies.conv import ConvolutionalEnergyFunction
from ebm.energies.folded import FoldedEnergy, chain_dtype
from ebm.energies.mlp import MLPEnergyFunction
from ebm.energies.resnet import ResNetEnergyFunction
from ebm.errors import ConfigError
from ebm.streams import derive_seed

__all__ = [
    "BaseEnergyFunction",
    "ConvolutionalEnergyFunction",
    "FoldedEnergy",
    "MLPEnergyFunction",
    "ResNetEnergyFunction",
    "build_energy",
    "chain_dtype",
]


def build_energy(config, shape: tuple[int, int, int], seed: int) -> BaseEnergyFunction:
    """The energy of `config.energy` for images of `shape` (C, H, W), its weights a function of `seed` alone."""
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        if isinstance(config, ImportConfig):
            return refuse_mixing_layers(_import(config), config.path)
        settings = config.model_dump(exclude={"kind"})
        if isinstance(config, MLPConfig):
            return MLPEnergyFunction(channels * height * width, **settings)
        if isinstance(config, ConvConfig):
            return ConvolutionalEnergyFunction(channels, width, height, **settings)
        return ResNetEnergyFunction(channels, height, width, **settings)


def _import(config: ImportConfig) -> BaseEnergyFunction:
    module, name = config.path.split(":")
    where = f"energy.path={config.path!r} with energy.settings={config.settings}"
    try:
        made_by = getattr(importlib.import_module(module), name)
        # Before the call: `subprocess:Popen` with its settings would be a program started by a config.
        if not (isinstance(made_by, type) and issubclass(made_by, torch.nn.Module)):
            raise ConfigError(f"{where}: {name} is no class of torch.nn.Module; derive it from BaseEnergyFunction")
        return made_by(**config.settings)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where}: {error}; the module must be importable from where the command runs") from error
