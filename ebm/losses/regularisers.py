"""Regularisers: what can be added to any objective."""

import torch
from torch import Tensor

from ebm.losses.output import Energy, energy_and_gradient
from ebm.streams import Generators, uniform_


def energy_l2(*energies: Tensor) -> Tensor:
    """The sum over batches of mean E**2: keeps the energies' scale (Du & Mordatch 2019, eq. 4)."""
    return torch.stack([e.square().mean() for e in energies]).sum()


def gradient_penalty(energy: Energy, x: Tensor, y: Tensor | None = None) -> Tensor:
    """mean |dE/dx|**2 / 2 over `x`: R1 where these are data (Mescheder et al. 2018, eq. 9 with gamma = 1)."""
    _, gradient = energy_and_gradient(energy, x.detach().requires_grad_(True), y)
    return gradient.square().flatten(1).sum(1).mean() / 2


def interpolate(x_pos: Tensor, x_neg: Tensor, generator: Generators = None) -> Tensor:
    """A point drawn uniformly from the line between each pair (Gulrajani et al. 2017, algorithm 1)."""
    u = uniform_(x_pos.new_empty(len(x_pos)), generator).view(-1, *[1] * (x_pos.ndim - 1))
    return torch.lerp(x_neg, x_pos, u)
