"""Densities exp(-E / T) whose expectations are known, in closed form or by quadrature."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Density(NamedTuple):
    energy: Callable[[Tensor], Tensor]  # (B, D) -> (B,)
    statistics: Callable[[Tensor], Tensor]  # (B, D) -> (B, S)
    expected: Tensor  # (S,), their expectations
    dim: int = 1

    def z_scores(self, x: Tensor) -> Tensor:
        """(S,): how many standard errors independent samples' means are off."""
        values = self.statistics(x).double()
        return (values.mean(0) - self.expected) / (values.std(0) / len(x) ** 0.5)


def gaussian(temperature: float = 1.0) -> Density:
    mean, cov = torch.tensor([1.0, -2.0]), torch.tensor([[1.0, 0.8], [0.8, 1.5]])
    precision = cov.inverse()

    def statistics(x):
        x = x - mean
        return torch.cat([x, x.square(), x.prod(1, keepdim=True)], dim=1)

    def energy(x):
        return ((x - mean) @ precision * (x - mean)).sum(1) / 2

    return Density(energy, statistics, torch.tensor([0, 0, 1.0, 1.5, 0.8]).double() * temperature, dim=2)


def on_the_line(
    energy: Callable[[Tensor], Tensor], temperature: float = 1.0, low=-12.0, high=12.0, edge=0.0
) -> Density:
    """exp(-energy / T) on [low, high]: mean, second moment and mass above `edge`, by the midpoint rule."""

    def statistics(x):
        return torch.cat([x, x.square(), (x > edge).to(x.dtype)], dim=1)

    width = (high - low) / 100_000
    grid = torch.arange(low + width / 2, high, width, dtype=torch.float64).unsqueeze(1)
    weights = torch.softmax(-energy(grid) / temperature, 0)
    return Density(energy, statistics, weights @ statistics(grid))


def mixture(distance: float, temperature: float = 1.0) -> Density:
    """.3 N(-distance, .5^2) + .7 N(distance, .5^2)."""

    def energy(x):
        squares = torch.cat([x + distance, x - distance], dim=1).square() / 0.5
        return -torch.logsumexp(torch.tensor([0.3, 0.7]).log() - squares, 1)

    return on_the_line(energy, temperature)


def double_well(temperature: float = 1.0) -> Density:
    """E = 2 (x^2 - 1)^2 + x / 2: a barrier of about 2 between wells of unequal depth."""
    return on_the_line(lambda x: (2 * (x.square() - 1).square() + x / 2).sum(1), temperature)


def truncated(low: float, high: float, temperature: float = 1.0) -> Density:
    """A standard normal at T = 1, cut to [low, high]; its third statistic is the mass of the upper tenth."""
    return on_the_line(lambda x: x.square().sum(1) / 2, temperature, low, high, edge=high - (high - low) / 10)
