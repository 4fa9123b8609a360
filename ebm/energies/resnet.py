"""Residual networks for natural images: a plain one (after Du & Mordatch 2019, appendix A), JEM's wide one, and U-Nets,
whose output is an image. Their default sizes are those of the config (ebm.config.energies)."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ebm.config.energies import ResNetConfig, UNetConfig, WideResNetConfig
from ebm.energies.base import require_batch
from ebm.energies.networks import (
    HeadOptions,
    NetworkEnergy,
    NetworkOptions,
    VisionTransformer,
    attend,
    make_activation,
    sum_over,
)

RESNET, WIDE_RESNET, UNET = ResNetConfig(), WideResNetConfig(), UNetConfig()


def halve(h: Tensor) -> Tensor:
    """Means over windows of 2x2 pixels side by side, (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)). At an odd size
    the last windows take the mean of the pixels that exist.

    This is `avg_pool2d(h, 2, ceil_mode=True)`, whose gradient inductor computes wrongly at odd sizes (torch 2.11 to
    2.14), and whose own backward kernel for channels-last tensors took a quarter of a chain's time on a GPU. On a CPU
    its one call is faster than several slices, mostly two or three times.
    """
    if h.device.type == "cpu" and not torch.compiler.is_compiling():
        return avg_pool2d(h, 2, ceil_mode=True)
    means: Tensor = _Halve.apply(h)
    return means


class _Halve(torch.autograd.Function):
    """Linear; its derivative is the adjoint map, `_Spread`, so both can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.size = rows, columns = h.shape[2:]
        means = h[:, :, ::2, ::2] * 0.25
        means[..., : columns // 2].add_(h[:, :, ::2, 1::2], alpha=0.25)
        means[:, :, : rows // 2].add_(h[:, :, 1::2, ::2], alpha=0.25)
        means[:, :, : rows // 2, : columns // 2].add_(h[:, :, 1::2, 1::2], alpha=0.25)
        return _double_edges(means, rows, columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # torch's own signature: one gradient an output
        spread: Tensor = _Spread.apply(*grads, *ctx.size)
        return spread


class _Spread(torch.autograd.Function):
    """Gives each pixel its share of the value of its window: the adjoint of `_Halve` for images of rows x columns."""

    @staticmethod
    def forward(ctx: Any, means: Tensor, rows: int, columns: int) -> Tensor:
        shares = _double_edges(means * 0.25, rows, columns).permute(0, 2, 3, 1)  # channels last, as the copy below is
        b, h, w, c = shares.shape
        lines = shares[:, :, :, None].expand(b, h, w, 2, c).reshape(b, h, 1, 2 * w * c)
        pixels = lines.expand(b, h, 2, 2 * w * c).reshape(b, 2 * h, 2 * w, c)
        return pixels[:, :rows, :columns].contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        means: Tensor = _Halve.apply(*grads)
        return means, None, None


def _double_edges(quarters: Tensor, rows: int, columns: int) -> Tensor:
    """Doubles in place what was divided by the four pixels of a window, where an edge at an odd size has fewer."""
    if columns % 2:
        quarters[..., -1] *= 2
    if rows % 2:
        quarters[:, :, -1] *= 2
    return quarters


def double(h: Tensor, rows: int, columns: int) -> Tensor:
    """Repeats each pixel as 2x2 pixels, and cuts off what is beyond rows x columns: (B, C, H, W) -> (B, C, rows,
    columns). Its backward is a sum, which is deterministic and can be differentiated."""
    pixels = h.permute(0, 2, 3, 1)  # channels last
    b, height, width, c = pixels.shape
    doubled = pixels[:, :, None, :, None].expand(b, height, 2, width, 2, c).reshape(b, 2 * height, 2 * width, c)
    return doubled[:, :rows, :columns].permute(0, 3, 1, 2)


def group_norm(channels: int, bias: bool = True) -> nn.GroupNorm:
    """A norm over groups of at least 4 channels, at most 32 groups. Without `bias` it has factors only."""
    norm = nn.GroupNorm(math.gcd(32, max(channels // 4, 1), channels), channels)
    if not bias:
        norm.register_parameter("bias", None)
    return norm


class ResidualBlock(nn.Module):
    """h -> h + conv(a(conv(a(h)))), where `a` is the activation, from `narrow` to `wide` channels. The second
    convolution has the stride. The shortcut has a 1x1 convolution if width or resolution change. `norm`: a group norm
    before each activation; by default there is none."""

    def __init__(self, narrow: int, wide: int, activation: str, stride: int = 1, norm: bool = False, bias: bool = True):
        super().__init__()
        self.activation = make_activation(activation)
        self.norm1, self.norm2 = (group_norm(width, bias) if norm else nn.Identity() for width in (narrow, wide))
        self.conv1 = nn.Conv2d(narrow, wide, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, bias=bias)
        same = narrow == wide and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(narrow, wide, 1, stride=stride, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        inner = self.conv1(self.activation(self.norm1(h)))
        out: Tensor = self.shortcut(h) + self.conv2(self.activation(self.norm2(inner)))
        return out


class ResNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width) of 8x8 pixels or more.

    Each width of `features` is a stage of `blocks` residual blocks, after which the resolution is halved. The head
    takes the last features summed over space. `options`: see NetworkEnergy.finish.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        features: Sequence[int] = RESNET.features,
        blocks: int = RESNET.blocks,
        spectral_norm: bool = RESNET.spectral_norm,
        *,
        activation: str = RESNET.activation,
        **options: Unpack[HeadOptions],
    ):
        super().__init__()
        self.shape = (channels, height, width)
        self.stem = nn.Conv2d(channels, features[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(narrow if i == 0 else wide, wide, activation) for i in range(blocks)))
            for narrow, wide in pairwise([features[0], *features])
        )
        self.activation = make_activation(activation)
        self.finish(features[-1], spectral_norm=spectral_norm, **options)

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.stem(require_batch(x, self.shape))
        for stage in self.stages:
            h = stage(h)
            if min(h.shape[2:]) > 1:
                h = halve(h)
        return sum_over(self.activation(h), (2, 3))


class WideResNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width) of 8x8 pixels or more.

    There are three stages of (depth - 4) / 6 residual blocks, with 16, 32 and 64 times `widen` channels. The second and
    the third halve the resolution. The head takes the last features averaged over space.

    JEM's network is WRN-28-10 with `activation="leaky_relu"` (Grathwohl et al. 2020). The default, SiLU, has the second
    derivative that score matching needs. `options`: see NetworkEnergy.finish.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        depth: int = WIDE_RESNET.depth,
        widen: int = WIDE_RESNET.widen,
        *,
        activation: str = WIDE_RESNET.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth={depth} must be 6 n + 4 with n blocks a stage: 10, 16, 22, 28 ...")
        self.shape = (channels, height, width)
        self.stem = nn.Conv2d(channels, 16, 3, padding=1)
        blocks, narrow = [], 16
        for wide, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(ResidualBlock(narrow, wide, activation, stride=1 if i else first_stride))
                narrow = wide
        self.blocks = nn.Sequential(*blocks)
        self.activation = make_activation(activation)
        self.finish(narrow, **options)

    def features(self, x: Tensor) -> Tensor:
        h: Tensor = self.activation(self.blocks(self.stem(require_batch(x, self.shape))))
        return _mean_over_space(h)


class AttentionBlock(nn.Module):
    """h (B, C, H, W) -> h + attention among its pixels."""

    def __init__(self, channels: int, num_heads: int, norm: bool = True, bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.norm = group_norm(channels, bias) if norm else nn.Identity()
        self.queries_keys_values = nn.Linear(channels, 3 * channels, bias=bias)
        self.out = nn.Linear(channels, channels, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        pixels = self.norm(h).flatten(2).transpose(1, 2)
        mixed = self.out(attend(self.queries_keys_values(pixels), self.num_heads))
        added: Tensor = h + mixed.transpose(1, 2).reshape(h.shape)
        return added


class UNetEnergyFunction(NetworkEnergy):
    """E(x) of images (B, channels, height, width) of any size, from the output f(x) of a U-Net, times `output_scale`.

    Each width of `features` is a level with half the resolution of the level before (Ronneberger et al. 2015). On the
    way down and on the way up it has `blocks` residual blocks, each followed by self-attention at the levels that
    `attention` names (0: full resolution). What a level has on the way down is seen again on the way up.

    `head` makes an energy of f: "dot" -<x, f>, "quadratic" <x, f> / 2, "norm" |f|^2 / 2, with an f of x's shape;
    "linear" takes the last features averaged over space; "vit" takes them to a vision transformer with `head_*` sizes
    and `num_heads` (Balcerak et al. 2025).

    Without `bias` and norm, with leaky_relu, f(a x) = a f(x) for a > 0: such networks denoise alike at all scales
    (Mohan et al. 2020). `planes`: number of planes of x that the heads with <x, f> pair with f, the first ones (None:
    all); the network sees the others too, such as the noise level's. `options`: see NetworkEnergy.finish.

    Raises ValueError for a level of `attention` that is not there or has a width that `num_heads` does not divide.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        features: Sequence[int] = UNET.features,
        blocks: int = UNET.blocks,
        attention: Sequence[int] = UNET.attention,
        num_heads: int = UNET.num_heads,
        norm: str = UNET.norm,
        bias: bool = UNET.bias,
        head: str = UNET.head,
        head_patch: int = UNET.head_patch,
        head_dim: int = UNET.head_dim,
        head_depth: int = UNET.head_depth,
        output_scale: float = UNET.output_scale,
        *,
        planes: int | None = None,
        activation: str = UNET.activation,
        **options: Unpack[NetworkOptions],
    ):
        super().__init__()
        UNetConfig.check_attention(features, attention, num_heads)
        self.shape, self.kind, self.output_scale = (channels, height, width), head, output_scale
        self.planes = channels if planes is None else planes
        normed = norm == "group"

        def level(number: int, narrow: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i in range(blocks):
                wide = features[number]
                layers.append(ResidualBlock(wide if i else narrow, wide, activation, norm=normed, bias=bias))
                if number in attention:
                    layers.append(AttentionBlock(wide, num_heads, normed, bias))
            return nn.Sequential(*layers)

        narrow = [features[0], *features[:-1]]
        self.stem = nn.Conv2d(channels, features[0], 3, padding=1, bias=bias)
        self.down = nn.ModuleList(level(i, n) for i, n in enumerate(narrow))
        self.up = nn.ModuleList(level(i, features[i + 1] + features[i]) for i in range(len(features) - 1))
        last: list[nn.Module] = [group_norm(features[0], bias)] if normed else []
        self.last = nn.Sequential(*last, make_activation(activation))
        self.transformer = self.out = None
        classes = features[0] if options.get("num_classes") else 0  # features that they see beside an energy
        if head == "vit":
            sizes = (head_patch, head_dim, head_depth, num_heads)
            self.transformer = VisionTransformer(features[0], height, width, *sizes, activation=activation)
        elif head != "linear":
            self.out = nn.Conv2d(features[0], self.planes, 3, padding=1, bias=bias)
        dim = {"vit": head_dim, "linear": features[0]}.get(head, 1 + classes)
        self.finish(dim, energy_first=self.out is not None, **options)

    def field(self, x: Tensor) -> Tensor:
        """f(x), (B, planes, height, width). Raises ValueError for the heads "linear" and "vit", which have none."""
        return self._field(self._hidden(x))

    def load_field(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over the weights of a field v(x) that points at data, such as a flow's velocity or a score: the
        `state_dict` of such a U-Net whose `field` was trained. With "dot" f is v, so that the energy falls along v from
        the origin; with "quadratic" f is -v, and the energy's descent is v itself where v is a homogeneous gradient.

        Weights of the head's classes stay as they are. Raises ValueError for other heads, and for weights that are not
        this network's.
        """
        if self.kind not in ("dot", "quadratic"):
            raise ValueError(f"head={self.kind!r} can't start from a field; use dot or quadratic")
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("head.")}
        given = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        differ = sorted(own.keys() ^ given.keys()) or sorted(n for n in own if own[n].shape != given[n].shape)
        if differ:
            raise ValueError(f"the field has other weights than this network, such as {differ[0]}")
        sign = 1.0 if self.kind == "dot" else -1.0
        signed = {name: sign * tensor if name.startswith("out.") else tensor for name, tensor in given.items()}
        self.load_state_dict(self.state_dict() | signed)

    def features(self, x: Tensor) -> Tensor:
        h = self._hidden(x)
        if self.transformer is not None:
            return self.output_scale * self.transformer.features(h)
        if self.out is None:
            return self.output_scale * _mean_over_space(h)
        f = self._field(h)
        paired = f if self.kind == "norm" else x[:, : self.planes]
        factor = {"dot": -1.0, "quadratic": 0.5, "norm": 0.5}[self.kind]
        energy = (self.output_scale * factor) * sum_over(paired * f, (1, 2, 3))[:, None]
        return energy if self.head.classes is None else torch.cat([energy, _mean_over_space(h)], 1)

    def _field(self, hidden: Tensor) -> Tensor:
        if self.out is None:
            raise ValueError(f"head={self.kind!r} has no field; use dot, quadratic or norm")
        f: Tensor = self.out(hidden)
        return f.to(torch.promote_types(f.dtype, torch.float32))  # products of x and f are summed in float32

    def _hidden(self, x: Tensor) -> Tensor:
        """The last features of the U-Net, (B, features[0], height, width)."""
        h: Tensor = self.stem(require_batch(x, self.shape))
        seen: list[Tensor] = []
        for i, level in enumerate(self.down):
            h = level(halve(h) if i else h)
            seen.append(h)
        for level, beside in zip(reversed(self.up), reversed(seen[:-1]), strict=True):
            h = level(torch.cat([double(h, *beside.shape[2:]), beside], 1))
        last: Tensor = self.last(h)
        return last


class UNetField(nn.Module):
    """The field f(x) of a U-Net, 0 at first, as a module of its own: (B, channels, H, W) -> (B, planes, H, W)."""

    def __init__(self, unet: UNetEnergyFunction):
        super().__init__()
        assert unet.out is not None and unet.out.bias is not None, "a head that has a field"
        nn.init.zeros_(unet.out.weight)
        nn.init.zeros_(unet.out.bias)
        self.unet = unet

    def forward(self, x: Tensor) -> Tensor:
        return self.unet.field(x)


def _mean_over_space(h: Tensor) -> Tensor:
    return sum_over(h, (2, 3)) / (h.shape[2] * h.shape[3])
