"""What the networks share, and the small ones: MLP, convolutions, a vision transformer, the hybrid with a prior."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ebm.energies.analytic import GaussianEnergy
from ebm.energies.base import BaseEnergyFunction, WeightedSum, device_of, require_batch

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


class MLPEnergyFunction(NetworkEnergy):
    """E(x) of (B, input_dim), or of any (B, *shape) with input_dim elements, by layers of `hidden_dim`. `options`:
    spectral_norm, num_classes, confine (NetworkEnergy.finish)."""

    def __init__(
        self, input_dim: int = 2, hidden_dim: int = 64, num_layers: int = 2, *, activation: str = "silu", **options
    ):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * num_layers
        layers = [m for a, b in pairwise(dims) for m in (nn.Linear(a, b), make_activation(activation))]
        self.input_dim = input_dim
        self.body = nn.Sequential(*layers)
        self.finish(hidden_dim, **options)

    def features(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) if x.ndim > 1 else x
        if flat.ndim != 2 or flat.shape[1] != self.input_dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; this energy takes (batch, {self.input_dim})")
        return self.body(flat)


class ConvolutionalEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width): 3x3 convolutions, all but the first of stride 2, then two layers.

    A stride-2 layer takes a side s to ceil(s / 2), so every size works; the head's width is computed from it.
    `options`: spectral_norm, num_classes, confine (NetworkEnergy.finish).
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 28,
        height: int = 28,
        features: Sequence[int] = (16, 32, 32, 64),
        hidden_dim: int = 64,
        *,
        activation: str = "silu",
        **options,
    ):
        super().__init__()
        self.shape = (channels, height, width)
        layers = [nn.Conv2d(channels, features[0], 3, padding=1), make_activation(activation)]
        h, w = height, width
        for narrow, wide in pairwise(features):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), make_activation(activation)]
            h, w = -(-h // 2), -(-w // 2)
        layers += [nn.Flatten(), nn.Linear(features[-1] * h * w, hidden_dim), make_activation(activation)]
        self.body = nn.Sequential(*layers)
        self.finish(hidden_dim, **options)

    def features(self, x: Tensor) -> Tensor:
        return self.body(require_batch(x, self.shape))


class TransformerEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width): patches of `patch_size` squared as tokens of width `dim`, `depth`
    pre-norm blocks of `num_heads`, a last LayerNorm, tokens averaged. Any size: the last patches are filled with zeros.

    LayerNorm bounds the features and so the energy: sample it in bounds, or with `confine`. Spectral norm holds for
    every linear layer; dot-product attention has no Lipschitz constant on all of R^n even so (Kim et al. 2021).
    `options`: spectral_norm, num_classes, confine (NetworkEnergy.finish).
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        patch_size: int = 4,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        *,
        activation: str = "silu",
        **options,
    ):
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ValueError(f"dim={dim} must be divisible by num_heads={num_heads}, and by 4 for the positions")
        self.shape = (channels, height, width)
        self.fill = (0, -width % patch_size, 0, -height % patch_size)
        self.patches = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        rows, columns = -(-height // patch_size), -(-width // patch_size)
        self.register_buffer("positions", sine_positions(rows, columns, dim), persistent=False)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, num_heads, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.finish(dim, **options)

    def features(self, x: Tensor) -> Tensor:
        patches = self.patches(F.pad(require_batch(x, self.shape), self.fill))
        tokens = self.norm(self.blocks(patches.flatten(2).transpose(1, 2) + self.positions))
        return sum_over(tokens, 1) / tokens.shape[1]


class TransformerBlock(nn.Module):
    """Tokens (B, N, dim) -> the same: t + attention(LN(t)), then t + MLP(LN(t)) of hidden width 4 dim. No dropout."""

    def __init__(self, dim: int, num_heads: int, activation: str = "silu"):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), make_activation(activation), nn.Linear(4 * dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        t = t + self.out(self._attention(self.norm1(t)))
        return t + self.mlp(self.norm2(t))

    def _attention(self, t: Tensor) -> Tensor:
        """Written out: the fused kernels of scaled_dot_product_attention have no second derivative."""
        q, k, v = self.queries_keys_values(t).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        return (attention @ v).transpose(1, 2).flatten(2)


def sine_positions(rows: int, columns: int, dim: int) -> Tensor:
    """(rows * columns, dim): sines and cosines of row and column at dim / 4 frequencies (Vaswani et al. 2017)."""
    frequencies = 10_000 ** (-torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [at.flatten()[:, None] * frequencies for at in (row, column)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)


class HybridEnergyFunction(WeightedSum):
    """E(x) = E_prior(x) + w E_network(x), with w learned: p(x) is the prior's density, tilted by the network.

    The prior stands as it is. In alpha E_prior + (1 - alpha) E_network, a form one meets often, alpha is an inverse
    temperature: learning it heats the prior to 1 / alpha, and what was put in as knowledge does not hold any more. Here
    the network has to say what differs, and where it says nothing (w E_network = constant) the density is the prior's.

    `prior`: N(0, I) in `input_dim` dimensions by default. `network`: an MLP of `num_layers` of `hidden_dim` by default.
    """

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = 64,
        num_layers: int = 2,
        *,
        prior: BaseEnergyFunction | None = None,
        network: BaseEnergyFunction | None = None,
        weight: float = 1.0,
    ):
        prior = GaussianEnergy(torch.zeros(input_dim), 1.0) if prior is None else prior
        network = MLPEnergyFunction(input_dim, hidden_dim, num_layers) if network is None else network
        super().__init__([prior, network], [1.0, nn.Parameter(torch.tensor(float(weight), device=device_of(network)))])

    @property
    def prior(self) -> BaseEnergyFunction:
        return self.energies[0]

    @property
    def network(self) -> BaseEnergyFunction:
        return self.energies[1]
