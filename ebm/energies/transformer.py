"""A small vision transformer (Dosovitskiy et al. 2021), positions fixed and tokens averaged (Beyer et al. 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm.energies.base import require_batch
from ebm.energies.network import NetworkEnergy, make_activation, sum_over


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
