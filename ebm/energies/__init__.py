"""Energies: modules that map states (B, *shape) to energies (B,)."""

from ebm.energies.analytic import (
    DoubleWellEnergy,
    FourPeaksEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    RingEnergy,
)
from ebm.energies.base import (
    BaseEnergyFunction,
    MixtureEnergy,
    NoiseConditionalEnergy,
    WeightedSum,
    marginal_energy,
    mixture,
    split_noise_level,
    with_noise_level,
)
from ebm.energies.factory import EnergyOfTensors, FoldedEnergy, SpectralNorms, build_energy, chain_dtype
from ebm.energies.graph import PixelGraphEnergyFunction, PointGraphEnergyFunction
from ebm.energies.networks import (
    ConvolutionalEnergyFunction,
    HybridEnergyFunction,
    LatentEnergy,
    MLPEnergyFunction,
    NetworkEnergy,
    TransformerEnergyFunction,
)
from ebm.energies.resnet import ResNetEnergyFunction, UNetEnergyFunction, WideResNetEnergyFunction

__all__ = [
    "BaseEnergyFunction",
    "ConvolutionalEnergyFunction",
    "DoubleWellEnergy",
    "EnergyOfTensors",
    "FoldedEnergy",
    "FourPeaksEnergy",
    "GaussianEnergy",
    "GaussianMixtureEnergy",
    "HybridEnergyFunction",
    "LatentEnergy",
    "MLPEnergyFunction",
    "MixtureEnergy",
    "NetworkEnergy",
    "NoiseConditionalEnergy",
    "PixelGraphEnergyFunction",
    "PointGraphEnergyFunction",
    "ResNetEnergyFunction",
    "RingEnergy",
    "SpectralNorms",
    "TransformerEnergyFunction",
    "UNetEnergyFunction",
    "WeightedSum",
    "WideResNetEnergyFunction",
    "build_energy",
    "chain_dtype",
    "marginal_energy",
    "mixture",
    "split_noise_level",
    "with_noise_level",
]
