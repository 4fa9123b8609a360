"""Energies: modules that map states (B, *shape) to energies (B,)."""

from ebm.energies.analytic import (
    DoubleWellEnergy,
    FourPeaksEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    RingEnergy,
)
from ebm.energies.base import BaseEnergyFunction
from ebm.energies.build import build_energy
from ebm.energies.composition import HybridEnergyFunction, MixtureEnergy, WeightedSum, mixture
from ebm.energies.conv import ConvolutionalEnergyFunction
from ebm.energies.folded import FoldedEnergy, chain_dtype
from ebm.energies.graph import PixelGraphEnergyFunction, PointGraphEnergyFunction
from ebm.energies.mlp import MLPEnergyFunction
from ebm.energies.network import NetworkEnergy
from ebm.energies.resnet import ResNetEnergyFunction
from ebm.energies.transformer import TransformerEnergyFunction
from ebm.energies.wide_resnet import WideResNetEnergyFunction

__all__ = [
    "BaseEnergyFunction",
    "ConvolutionalEnergyFunction",
    "DoubleWellEnergy",
    "FoldedEnergy",
    "FourPeaksEnergy",
    "GaussianEnergy",
    "GaussianMixtureEnergy",
    "HybridEnergyFunction",
    "MLPEnergyFunction",
    "MixtureEnergy",
    "NetworkEnergy",
    "PixelGraphEnergyFunction",
    "PointGraphEnergyFunction",
    "ResNetEnergyFunction",
    "RingEnergy",
    "TransformerEnergyFunction",
    "WeightedSum",
    "WideResNetEnergyFunction",
    "build_energy",
    "chain_dtype",
    "mixture",
]
