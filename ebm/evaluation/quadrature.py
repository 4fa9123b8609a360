"""Densities on the plane, exactly: normalisers, Kullback-Leibler divergence and mode weights by the midpoint rule."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

HALF_WIDTH = 12.0  # of the square that is integrated over
CELLS = 480  # a side: cells of .05, far below the width of any mode of the densities in `ebm.data.toys`


class Density(NamedTuple):
    """A density on the centres of a square grid, rows from low y to high y."""

    points: Tensor  # (CELLS**2, 2) float32
    log_p: Tensor  # (CELLS**2,) float64, normalised over the square
    cell: float  # area of a cell

    @property
    def mass(self) -> Tensor:
        """Probability of each cell, (CELLS**2,) float64."""
        return self.log_p.exp() * self.cell

    @property
    def energies(self) -> np.ndarray:
        """-log p, (CELLS, CELLS), rows from low y to high y."""
        return -self.log_p.view(math.isqrt(len(self.log_p)), -1).numpy()


def density(
    energy: Callable[[Tensor], Tensor], temperature: float = 1.0, half_width: float = HALF_WIDTH, cells: int = CELLS
) -> Density:
    """exp(-energy(x) / temperature), normalised over [-half_width, half_width]^2; `energy` maps (N, 2) to (N,)."""
    centres = (torch.arange(cells) + 0.5) / cells * 2 * half_width - half_width
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points, cell = torch.stack([x.flatten(), y.flatten()], 1), (2 * half_width / cells) ** 2
    with torch.no_grad():
        log_p = -torch.cat([energy(part) for part in torch.split(points, 1 << 16)]).double().cpu() / temperature
    return Density(points, log_p - torch.logsumexp(log_p, 0) - math.log(cell), cell)


def kl_divergence(true: Density, learned: Density) -> float:
    """KL(true || learned) in nats, 0 or more up to the error of the rule (below 1e-6 for smooth densities)."""
    return float((true.mass * (true.log_p - learned.log_p)).sum())


def mode_weights(density: Density, modes: Tensor) -> Tensor:
    """The mass nearest to each of `modes` (M, 2): (M,) float64, of sum 1."""
    nearest = torch.cdist(density.points, modes.float()).argmin(1)
    return torch.zeros(len(modes), dtype=torch.float64).index_add_(0, nearest, density.mass)
