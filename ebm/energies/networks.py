"""What all networks share (head, spectral norm, activations), and the small ones: an MLP, convolutions, a vision
transformer, and the hybrid of a network with a prior. Their default sizes are those of the config
(ebm.config.energies).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ebm.config.energies import ConvConfig, HybridConfig, MLPConfig, NetworkConfig, TransformerConfig
from ebm.energies.analytic import GaussianEnergy
from ebm.energies.base import BaseEnergyFunction, WeightedSum, device_of, marginal_energy, require_batch

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),  # its second derivative is 0: not for score matching
}
NORMALISED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)

SHARED = NetworkConfig()
MLP, CONV, TRANSFORMER, HYBRID = MLPConfig(), ConvConfig(), TransformerConfig(), HybridConfig()

# Shared by all networks


class HeadOptions(TypedDict, total=False):
    """Keyword arguments of every network that NetworkEnergy.finish takes."""

    num_classes: int | None
    confine: float


class NetworkOptions(HeadOptions, total=False):
    spectral_norm: bool


class NetworkEnergy(BaseEnergyFunction):
    """E(x, y) = head(features(x), y) + confine / 2 |x|^2.

    A subclass builds its layers, calls `finish` at the end of its `__init__`, and defines `features`. Every network
    takes the options of `finish` as keyword arguments. Without labels a class-conditional network returns the marginal
    over the classes, -log sum_y exp(-E(x, y)).
    """

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """States (B, *shape) -> (B, dim)."""

    def finish(
        self,
        dim: int,
        *,
        spectral_norm: bool = SHARED.spectral_norm,
        num_classes: int | None = SHARED.num_classes,
        confine: float = SHARED.confine,
        energy_first: bool = False,
    ) -> None:
        """Adds the head, which maps features (B, dim) to energies; `energy_first` as in EnergyHead.

        `spectral_norm` normalises every layer, the head included. `num_classes` makes the energy class-conditional.
        `confine` >= 0 weighs a term that makes exp(-E) integrable on all of R^n if the features grow more slowly than
        |x|^2. Raises ValueError if `confine` is negative.
        """
        if confine < 0:
            raise ValueError(f"confine={confine} must be at least 0: a negative one drives chains to infinity")
        self.num_classes, self.confine = num_classes, confine
        self.head = EnergyHead(dim, num_classes, energy_first)
        if spectral_norm:
            spectrally_normalise(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        energy: Tensor = self.head(self.features(x), y)
        return energy + self._confining(x) if self.confine else energy

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes), by one pass through the body."""
        energies = self.head.class_energies(self.features(x))
        return energies + self._confining(x)[:, None] if self.confine else energies

    def _confining(self, x: Tensor) -> Tensor:
        return self.confine / 2 * x.flatten(1).square().sum(1)


class EnergyHead(nn.Module):
    """Features h (B, dim) -> energies (B,): `scale * (w h + b)`, plus `scale * <embedding(y), h>` for a class condition
    (the projection of Miyato & Koyama 2018, eq. 3). `scale` is learned.

    `energy_first`: the first feature is an energy already. It takes the place of `w h + b`, the others are projected on
    the classes, and `scale` stays 1.

    Without labels a class-conditional head returns the marginal over the classes. It computes in the type of its own
    weights, float32, whatever the autocast type.
    """

    scale: Tensor

    def __init__(self, dim: int, num_classes: int | None = SHARED.num_classes, energy_first: bool = False):
        super().__init__()
        self.linear = None if energy_first else nn.Linear(dim, 1)
        if energy_first:
            self.register_buffer("scale", torch.ones(()), persistent=False)
        else:
            self.scale = nn.Parameter(torch.ones(()))
        self.classes = nn.Embedding(num_classes, dim - energy_first) if num_classes else None

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None and self.classes is not None:
            return marginal_energy(self.class_energies(h))
        if y is not None and self.classes is None:
            raise ValueError("labels y go with num_classes: this energy has none")
        with torch.autocast(h.device.type, enabled=False):
            common, h = self._common(h)
            energy = common.squeeze(1)
            if y is not None and self.classes is not None:
                energy = energy + (self.classes(y) * h).sum(1)
            return self.scale * energy

    def class_energies(self, h: Tensor) -> Tensor:
        """The energy of every class, (B, num_classes)."""
        if self.classes is None:
            raise ValueError("class_energies: this energy has no classes; give it num_classes")
        with torch.autocast(h.device.type, enabled=False):
            common, h = self._common(h)
            energies: Tensor = common + h @ self.classes.weight.T
            return self.scale * energies

    def _common(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the energy that all classes share, (B, 1), and the features that the classes see."""
        h = h.to(self.scale.dtype)
        return (h[:, :1], h[:, 1:]) if self.linear is None else (self.linear(h), h)


def spectrally_normalise(module: nn.Module) -> nn.Module:
    """Constrains the largest singular value of every linear, convolutional and embedding weight to 1, in place.

    A weight is seen as a matrix (out, rest). The singular value is estimated by one step of power iteration at each
    forward in training mode (Miyato et al. 2018, algorithm 1).
    """
    for layer in list(module.modules()):
        if isinstance(layer, NORMALISED):
            parametrizations.spectral_norm(layer, "weight", n_power_iterations=1)
    return module


def make_activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def sum_over(h: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The sum over `dims`, in float32 or wider: a sum of hundreds of terms in bfloat16 has only two correct digits."""
    return h.sum(dims, dtype=torch.promote_types(h.dtype, torch.float32))


class LatentEnergy(BaseEnergyFunction):
    """E(x) = |f(x)|^2 / 2 with a latent f, linear in the network's features, and what trains f besides: a projection of
    f, and the code of an encoder of the same kind (CLEL, Lee et al. 2023, with the joint energy's weight in the loss).

    Args:
        network, encoder: lose their heads.
        dim: of latent, projection and code.
    """

    def __init__(self, network: NetworkEnergy, encoder: NetworkEnergy, dim: int):
        super().__init__()
        linear = network.head.linear
        assert linear is not None, "the config refuses heads that are energies already"
        width = linear.in_features
        del network.head, encoder.head
        self.network, self.encoder = network, encoder
        self.latent = nn.Linear(width, dim)
        self.projection, self.code = (
            nn.Sequential(nn.Linear(first, dim), make_activation("silu"), nn.Linear(dim, dim)) for first in (dim, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.of_latents(self.latents(x), x)

    def latents(self, x: Tensor) -> Tensor:
        """f(x), (B, dim), in the type of its own weights, float32."""
        h = self.network.features(x)
        with torch.autocast(h.device.type, enabled=False):
            f: Tensor = self.latent(h.to(self.latent.weight.dtype))
        return f

    def of_latents(self, f: Tensor, x: Tensor) -> Tensor:
        """The energies (B,) of states whose latents are known."""
        energy = f.square().sum(1) / 2
        return energy + self.network._confining(x) if self.network.confine else energy

    def codes(self, x: Tensor) -> Tensor:
        """What the encoder says of states, of unit length, (B, dim)."""
        code: Tensor = F.normalize(self.code(self.encoder.features(x)), dim=1)
        return code


# Multilayer perceptron


class MLPEnergyFunction(NetworkEnergy):
    """E(x) of vectors (B, input_dim), or of any (B, *shape) with input_dim elements: `num_layers` hidden layers of
    width `hidden_dim`. `options`: see NetworkEnergy.finish."""

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = MLP.hidden_dim,
        num_layers: int = MLP.num_layers,
        *,
        activation: str = MLP.activation,
        **options: Unpack[NetworkOptions],
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
        h: Tensor = self.body(flat)
        return h


# Convolutions


class ConvolutionalEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width): 3x3 convolutions, all but the first with stride 2, then two linear
    layers.

    A layer with stride 2 reduces a side of s pixels to ceil(s / 2), so images of every size work. `options`: see
    NetworkEnergy.finish.
    """

    def __init__(
        self,
        channels: int = 1,
        width: int = 28,
        height: int = 28,
        features: Sequence[int] = CONV.features,
        hidden_dim: int = CONV.hidden_dim,
        *,
        activation: str = CONV.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__()
        self.shape = (channels, height, width)
        layers: list[nn.Module] = [nn.Conv2d(channels, features[0], 3, padding=1), make_activation(activation)]
        h, w = height, width
        for narrow, wide in pairwise(features):
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), make_activation(activation)]
            h, w = -(-h // 2), -(-w // 2)
        layers += [nn.Flatten(), nn.Linear(features[-1] * h * w, hidden_dim), make_activation(activation)]
        self.body = nn.Sequential(*layers)
        self.finish(hidden_dim, **options)

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.body(require_batch(x, self.shape))
        return h


# Vision transformer


class VisionTransformer(nn.Module):
    """Images (B, channels, height, width) -> features (B, dim): the mean over tokens of a vision transformer."""

    positions: Tensor  # (tokens, dim)

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        patch_size: int = TRANSFORMER.patch_size,
        dim: int = TRANSFORMER.dim,
        depth: int = TRANSFORMER.depth,
        num_heads: int = TRANSFORMER.num_heads,
        *,
        activation: str = TRANSFORMER.activation,
    ):
        super().__init__()
        if dim % num_heads or dim % 4:
            raise ValueError(f"dim={dim} must be divisible by num_heads={num_heads}, and by 4 for the positions")
        self.shape = (channels, height, width)
        self.padding = (0, -width % patch_size, 0, -height % patch_size)
        self.patches = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        rows, columns = -(-height // patch_size), -(-width // patch_size)
        self.register_buffer("positions", sine_positions(rows, columns, dim), persistent=False)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, num_heads, activation) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)

    def features(self, x: Tensor) -> Tensor:
        patches = self.patches(F.pad(require_batch(x, self.shape), self.padding))
        tokens: Tensor = self.norm(self.blocks(patches.flatten(2).transpose(1, 2) + self.positions))
        return sum_over(tokens, 1) / tokens.shape[1]


class TransformerEnergyFunction(VisionTransformer, NetworkEnergy):
    """E(x) of images (B, channels, height, width) by a vision transformer with pre-norm blocks.

    Patches of `patch_size` x `patch_size` pixels become tokens of width `dim`, which pass through `depth` blocks with
    `num_heads` attention heads and a final LayerNorm, and are averaged. Images of any size work: the last patches are
    filled with zeros.

    LayerNorm bounds the features and so the energy: sample it inside bounds, or with `confine`. Spectral norm applies
    to every linear layer; dot-product attention has no Lipschitz constant on all of R^n even so (Kim et al. 2021).
    `options`: see NetworkEnergy.finish.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        patch_size: int = TRANSFORMER.patch_size,
        dim: int = TRANSFORMER.dim,
        depth: int = TRANSFORMER.depth,
        num_heads: int = TRANSFORMER.num_heads,
        *,
        activation: str = TRANSFORMER.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__(channels, height, width, patch_size, dim, depth, num_heads, activation=activation)
        self.finish(dim, **options)


class TransformerBlock(nn.Module):
    """Tokens t (B, N, dim) -> the same shape: t + attention(LN(t)), then t + MLP(LN(t)) with hidden width 4 dim. There
    is no dropout."""

    def __init__(self, dim: int, num_heads: int, activation: str):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries_keys_values, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), make_activation(activation), nn.Linear(4 * dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        t = t + self.out(self._attention(self.norm1(t)))
        t = t + self.mlp(self.norm2(t))
        return t

    def _attention(self, t: Tensor) -> Tensor:
        return attend(self.queries_keys_values(t), self.num_heads)


def attend(queries_keys_values: Tensor, num_heads: int) -> Tensor:
    """Dot-product attention among tokens, (B, N, 3 dim) -> (B, N, dim). It is written out, because the fused kernels of
    scaled_dot_product_attention have no second derivative."""
    split = queries_keys_values.reshape(*queries_keys_values.shape[:2], 3, num_heads, -1)
    q, k, v = split.permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
    mixed: Tensor = (attention @ v).transpose(1, 2).flatten(2)
    return mixed


def sine_positions(rows: int, columns: int, dim: int) -> Tensor:
    """Encodes the places of a grid, (rows * columns, dim): sines and cosines of row and column at dim / 4 frequencies
    (Vaswani et al. 2017)."""
    frequencies: Tensor = 10_000 ** (-torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles: list[Tensor] = [place.flatten()[:, None] * frequencies for place in (row, column)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)


# Hybrid


class HybridEnergyFunction(WeightedSum):
    """E(x) = E_prior(x) + w E_network(x), with w learned: p(x) is the prior's density, tilted by the network.

    The prior keeps its temperature. In the other common form, alpha E_prior + (1 - alpha) E_network, alpha is an
    inverse temperature: learning it heats the prior to 1 / alpha, so that the knowledge put into the prior no longer
    holds. Here the network learns what differs from the prior, and where w E_network is constant the density is the
    prior's.

    `prior`: by default a Gaussian in `input_dim` dimensions with the config's mean and standard deviation, N(0, I).
    `network`: by default an MLP with `num_layers` hidden layers of width `hidden_dim`. `weight`: the initial w.
    """

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = MLP.hidden_dim,
        num_layers: int = MLP.num_layers,
        *,
        prior: BaseEnergyFunction | None = None,
        network: BaseEnergyFunction | None = None,
        weight: float = HYBRID.weight,
    ):
        if prior is None:
            prior = GaussianEnergy(torch.full((input_dim,), HYBRID.prior.mean), HYBRID.prior.std**2)
        if network is None:
            network = MLPEnergyFunction(input_dim, hidden_dim, num_layers)
        super().__init__([prior, network], [1.0, nn.Parameter(torch.tensor(float(weight), device=device_of(network)))])

    @property
    def prior(self) -> BaseEnergyFunction:
        return self.parts[0]

    @property
    def network(self) -> BaseEnergyFunction:
        return self.parts[1]
