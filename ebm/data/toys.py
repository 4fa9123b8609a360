"""Samples of densities on the plane that are known exactly: float32 (N, 2), a function of the seed alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ebm.energies import BaseEnergyFunction, FourPeaksEnergy, GaussianMixtureEnergy
from ebm.streams import generator

SAMPLES = 20_000  # of each split


def four_peaks(n: int, gen: torch.Generator) -> tuple[Tensor, None]:
    """Of `FourPeaksEnergy`, on all of the plane."""
    return FourPeaksEnergy().sample(n, gen), None


def eight_gaussians(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight N(m_k, .2^2 I) of equal weight, m_k = 2 (cos, sin)(pi k / 4); the label is k."""
    label = torch.randint(8, (n,), generator=gen)
    return EIGHT[label] + 0.2 * _normal(n, gen), label


def rings(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three rings of equal weight: the angle uniform, the radius N(1 + k, .1^2); the label is k."""
    label = torch.randint(3, (n,), generator=gen)
    radius = 1 + label + 0.1 * torch.randn(n, generator=gen, dtype=torch.float64)
    return radius[:, None] * _circle(_angle(n, gen, 2)), label


def two_moons(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half circles of radius 1 that interlock, as scikit-learn's, centred, plus N(0, .1^2 I); the label says which."""
    label = torch.randint(2, (n,), generator=gen)
    upper = _circle(_angle(n, gen, 1))
    lower = upper.new_tensor([1.0, 0.5]) - upper
    x = torch.where(label[:, None] == 0, upper, lower) - upper.new_tensor([0.5, 0.25])
    return x + 0.1 * _normal(n, gen), label


def _normal(n: int, gen: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=gen, dtype=torch.float64)


def _angle(n: int, gen: torch.Generator, half_turns: int) -> Tensor:
    return half_turns * math.pi * torch.rand(n, generator=gen, dtype=torch.float64)


def _circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


EIGHT = 2 * _circle(torch.arange(8, dtype=torch.float64) * math.pi / 4)  # the means of eight_gaussians

TOYS: dict[str, Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]] = {
    "four_peaks": four_peaks,
    "eight_gaussians": eight_gaussians,
    "rings": rings,
    "two_moons": two_moons,
}

DENSITIES = ("four_peaks", "eight_gaussians")


def sample_toy(name: str, split: str, n: int = SAMPLES) -> tuple[Tensor, Tensor | None]:
    """(float32 (n, 2), int64 labels (n,) or None) of a toy density; each split has a seed of its own."""
    x, labels = TOYS[name](n, generator(0, f"toy/{name}/{split}"))
    return x.float(), labels


def known_density(name: str) -> tuple[BaseEnergyFunction, Tensor]:
    """The energy that a toy of `DENSITIES` has at temperature 1, and its modes (M, 2)."""
    if name == "four_peaks":
        energy = FourPeaksEnergy()
        return energy, energy.centres
    return GaussianMixtureEnergy(EIGHT, 0.2**2), EIGHT.float()
