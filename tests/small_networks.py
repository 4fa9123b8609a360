"""Small energies for the tests: one of each kind of network, and one with all that a user's module may hold."""

import torch
from torch import nn
from torch.nn.utils import parametrizations

from ebm.config import ConvConfig, MLPConfig, ResNetConfig
from ebm.config.energies import GraphConfig, TransformerConfig, UNetConfig, WideResNetConfig
from ebm.energies import BaseEnergyFunction, build_energy

SMALL = {
    "mlp": MLPConfig(hidden_dim=16),
    "conv": ConvConfig(features=(4, 8, 8), hidden_dim=8),
    "resnet": ResNetConfig(features=(4, 8, 8), blocks=1),
    "wide_resnet": WideResNetConfig(depth=10, widen=1),
    "unet": UNetConfig(features=(4, 8), attention=(1,), num_heads=2),
    "transformer": TransformerConfig(dim=8, depth=2, num_heads=2),
    "graph": GraphConfig(hidden_dim=8, num_layers=2),
}


def images(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small(kind, shape=(3, 8, 8), **changes):
    return build_energy(SMALL[kind].model_copy(update=changes), shape, seed=0)


def reach_fixed_point(energy, *inputs):
    """Run the power iterations of a module in training mode until they stand still."""
    energy.train()
    with torch.no_grad():
        for _ in range(200):
            energy(*inputs)
    return energy


class AwkwardEnergy(BaseEnergyFunction):
    """Has what users' modules have: parameters and buffers of its own, norms, tied weights, a shared layer, no
    EnergyHead."""

    def __init__(self, width: int = 8, spectral: bool = True):
        super().__init__()
        self.register_buffer("centre", torch.linspace(-0.5, 0.5, 3).view(3, 1, 1))
        self.register_buffer("nothing", None)
        self.register_buffer("passing", torch.full((), 1.5), persistent=False)
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.group = nn.GroupNorm(2, width)
        self.shared = nn.Linear(width, width, bias=False)
        self.alias = self.shared
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.shared.weight
        self.layer = nn.LayerNorm(width)
        self.last = nn.Linear(width, width)
        if spectral:
            parametrizations.spectral_norm(self.first)
            parametrizations.weight_norm(self.last)

    def forward(self, x):
        h = self.group(self.first(x - self.centre)).mean((2, 3))
        h = self.layer(self.alias(torch.tanh(self.shared(h))) + self.tied(h))
        return self.passing * (self.last(h) * self.weights).square().sum(1)
