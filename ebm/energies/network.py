"""What the networks share: features, head, classes, the confining term, spectral normalisation, activations."""

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ebm.energies.base import BaseEnergyFunction

ACTIVATIONS = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),  # its second derivative is 0: not for score matching
}
NORMALISED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class NetworkEnergy(BaseEnergyFunction):
    """E(x, y) = head(features(x), y) + confine / 2 |x|^2. A subclass builds its layers, ends its `__init__` with
    `finish`, and has `features`; the options of `finish` are keyword arguments of every network.

    Without labels a class-conditional network gives the marginal, -log sum_y exp(-E(x, y)).
    """

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """States (B, *shape) -> (B, dim)."""

    def finish(
        self, dim: int, *, spectral_norm: bool = False, num_classes: int | None = None, confine: float = 0.0
    ) -> None:
        """Add the head on features (B, dim). `spectral_norm`: of every layer, the head's too. `confine` >= 0: weight
        of a term that makes exp(-E) integrable on all of R^n where features grow slower than |x|^2."""
        if confine < 0:
            raise ValueError(f"confine={confine} must be at least 0: a negative one drives chains to infinity")
        self.num_classes, self.confine = num_classes, confine
        self.head = EnergyHead(dim, num_classes)
        if spectral_norm:
            spectrally_normalise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        energy = self.head(self.features(x), y)
        return energy + self._confining(x) if self.confine else energy

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes), by one pass of the body."""
        energies = self.head.class_energies(self.features(x))
        return energies + self._confining(x)[:, None] if self.confine else energies

    def _confining(self, x: Tensor) -> Tensor:
        return self.confine / 2 * x.flatten(1).square().sum(1)


class EnergyHead(nn.Module):
    """Features (B, D) -> energies (B,), in the head's own type (float32) whatever the autocast type:
    `scale * (w h + b)`, and for a class condition the projection `+ <embedding(y), h>` (Miyato & Koyama 2018, eq. 3).
    `scale` is learned. Without labels: the marginal over the classes."""

    def __init__(self, dim: int, num_classes: int | None = None):
        super().__init__()
        self.linear = nn.Linear(dim, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.classes = nn.Embedding(num_classes, dim) if num_classes else None

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if y is not None and self.classes is None:
            raise ValueError("labels y go with num_classes: this energy has none")
        if y is None and self.classes is not None:
            return -torch.logsumexp(-self.class_energies(h), 1)
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.scale.dtype)
            energy = self.linear(h).squeeze(1)
            if y is not None:
                energy = energy + (self.classes(y) * h).sum(1)
            return self.scale * energy

    def class_energies(self, h: Tensor) -> Tensor:
        """(B, num_classes): the energy of every class."""
        if self.classes is None:
            raise ValueError("class_energies: this energy has no classes; give it num_classes")
        with torch.autocast(h.device.type, enabled=False):
            h = h.to(self.scale.dtype)
            return self.scale * (self.linear(h) + h @ self.classes.weight.T)


def spectrally_normalise(module: nn.Module) -> nn.Module:
    """Give every linear, convolutional and embedding weight, seen as a matrix (out, rest), a largest singular value
    of 1 by power iteration at each forward in training mode (Miyato et al. 2018, algorithm 1). In place."""
    for layer in list(module.modules()):
        if isinstance(layer, NORMALISED):
            parametrizations.spectral_norm(layer, "weight", n_power_iterations=1)
    return module


def make_activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def sum_over(h: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The sum over `dims`, taken in float32 at least: hundreds of terms in bfloat16 keep two digits."""
    return h.sum(dims, dtype=torch.promote_types(h.dtype, torch.float32))
