"""energy.*: one section for each kind of energy. The constructors in ebm.energies take their defaults from it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ebm.config.section import Section, kind_by_default

SPECTRAL_NORM = "constrain the largest singular value of every layer's weight to 1 (Miyato et al. 2018)"


class InitialiserConfig(Section):
    """A network beside the energy that proposes where recovery chains start (CDRL, Zhu et al. 2023): a U-Net for
    images, a multilayer perceptron for vectors."""

    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (16, 32), min_length=1, description="images: channels of each level; height and width are halved in between"
    )
    blocks: int = Field(1, ge=1, description="images: residual blocks at each level, on the way down and up")
    hidden_dim: int = Field(64, ge=1, description="vectors: width of the hidden layers")
    num_layers: int = Field(2, ge=1, description="vectors: number of hidden layers")


class NoiseRangeConfig(Section):
    """The noise levels of an energy E(x, t) of data with noise; the lowest is the one that is scored and sampled."""

    sigma_min: float = Field(0.1, gt=0, description="standard deviation of the least noise, in units of x")
    sigma_max: float = Field(3.0, gt=0, description="of the most: above the spread of the data, which it must cover")
    data_std: float = Field(0.7, gt=0, description="about the standard deviation of the data")
    initialiser: InitialiserConfig | None = Field(
        None, description="learn where chains of loss.kind=recovery start; null: at the noisier state they are tied to"
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} must be below sigma_max={self.sigma_max:g}")
        return self


class LatentConfig(Section):
    """An energy |f|^2 / 2 of a latent f, with a second network that is trained to tell data apart (CLEL)."""

    dim: int = Field(128, ge=1, description="width of the latent, and of what it is compared with")


class NetworkConfig(Section):
    """What all networks share."""

    latent: LatentConfig | None = Field(
        None, description="the energy is |f|^2 / 2 of a latent f of the network, for loss.kind=contrastive_latent"
    )

    noise_conditional: NoiseRangeConfig | None = Field(
        None, description="take the noise level as a further input: E(x, t) of data with noise; null: E(x)"
    )
    spectral_norm: bool = Field(False, description=SPECTRAL_NORM)
    num_classes: int | None = Field(
        None, ge=2, description="number of classes of a class-conditional energy E(x, y); null: no classes"
    )
    activation: Literal["silu", "softplus", "gelu", "leaky_relu"] = Field(
        "silu", description="nonlinearity; leaky_relu has no second derivative, which score matching needs"
    )
    confine: float = Field(
        0.0, ge=0, description="weight c of a term c/2 |x|^2 in the energy; it keeps unbounded chains near the origin"
    )

    @model_validator(mode="after")
    def _latent_alone(self) -> Self:
        if self.latent is not None and (self.num_classes or self.noise_conditional):
            raise ValueError("latent goes neither with num_classes nor with noise_conditional; set these to null")
        return self


class MLPConfig(NetworkConfig):
    """A multilayer perceptron, for vectors and small images."""

    kind: Literal["mlp"] = "mlp"
    hidden_dim: int = Field(64, ge=1, description="width of the hidden layers")
    num_layers: int = Field(2, ge=1, description="number of hidden layers")


class ConvConfig(NetworkConfig):
    """Strided convolutions and a linear layer on all that is left, for small images of centred objects."""

    kind: Literal["conv"] = "conv"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (16, 32, 32, 64),
        min_length=1,
        description="channels of each convolution; every one but the first halves height and width",
    )
    hidden_dim: int = Field(64, ge=1, description="width of the linear layer after the convolutions")


class ResNetConfig(NetworkConfig):
    """Residual blocks whose features are summed over the image, for natural images (Du & Mordatch 2019)."""

    kind: Literal["resnet"] = "resnet"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (48, 96, 96), min_length=1, description="channels of each stage; height and width are halved after each"
    )
    blocks: int = Field(1, ge=1, description="residual blocks in each stage")
    spectral_norm: bool = Field(True, description=SPECTRAL_NORM)


class WideResNetConfig(NetworkConfig):
    """The classifier of JEM, WRN-28-10 by default (Grathwohl et al. 2020)."""

    kind: Literal["wide_resnet"] = "wide_resnet"
    depth: int = Field(
        28, ge=10, description="number of layers: 6 n + 4 with n residual blocks in each of three stages (JEM: 28)"
    )
    widen: int = Field(
        10, ge=1, description="width factor: the three stages have 16, 32 and 64 times as many channels (JEM: 10)"
    )

    @field_validator("depth")
    @classmethod
    def _depth(cls, depth: int) -> int:
        if (depth - 4) % 6:
            raise ValueError(f"must be 6 n + 4 with n blocks a stage; use {depth - (depth - 4) % 6}")
        return depth


class UNetConfig(NetworkConfig):
    """A U-Net, whose output of the image's shape makes an energy; for objectives that match scores or flows."""

    kind: Literal["unet"] = "unet"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (32, 64, 64),
        min_length=1,
        description="channels of each level; every one but the first has half the resolution",
    )
    blocks: int = Field(1, ge=1, description="residual blocks at each level, on the way down and again on the way up")
    attention: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="levels, from 0, whose blocks are followed by self-attention among their pixels"
    )
    num_heads: int = Field(4, ge=1, description="attention heads, also those of head=vit")
    norm: Literal["group", "none"] = Field("group", description="normalisation before each activation")
    bias: bool = Field(
        True, description="false: no layer adds a constant; with norm=none and activation=leaky_relu f(a x) = a f(x)"
    )
    head: Literal["linear", "dot", "quadratic", "norm", "vit"] = Field(
        "dot",
        description="the energy of the output f: dot -<x, f>, quadratic <x, f>/2, norm |f|^2/2; linear in the mean of "
        "the last features; vit: a small vision transformer on them",
    )
    head_patch: int = Field(4, ge=1, description="vit: side in pixels of the patches that become tokens")
    head_dim: int = Field(128, ge=4, description="vit: width of a token; must be divisible by num_heads and by 4")
    head_depth: int = Field(2, ge=1, description="vit: number of blocks")
    output_scale: float = Field(
        1.0, gt=0, description="the energy is multiplied by this (energy matching: 100 to 1000)"
    )

    @model_validator(mode="after")
    def _heads(self) -> Self:
        self.check_attention(self.features, self.attention, self.num_heads)
        if self.latent is not None and self.head not in ("linear", "vit"):
            raise ValueError(f"latent with head={self.head}: its features are an energy already; use linear or vit")
        if self.head == "vit" and (self.head_dim % self.num_heads or self.head_dim % 4):
            raise ValueError(f"head_dim={self.head_dim} must be divisible by num_heads={self.num_heads}, and by 4")
        return self

    @staticmethod
    def check_attention(features: Sequence[int], attention: Sequence[int], num_heads: int) -> None:
        """Raises ValueError for a level that does not exist or whose width the heads do not divide."""
        for level in attention:
            if level >= len(features):
                raise ValueError(f"attention={list(attention)}: levels go from 0 to {len(features) - 1}")
            if features[level] % num_heads:
                raise ValueError(
                    f"attention at level {level}, of width {features[level]}: use a num_heads that divides it"
                )


class TransformerConfig(NetworkConfig):
    """A small vision transformer."""

    kind: Literal["transformer"] = "transformer"
    patch_size: int = Field(4, ge=1, description="side in pixels of the square patches that become tokens")
    dim: int = Field(128, ge=4, description="width of a token; must be divisible by num_heads and by 4")
    depth: int = Field(4, ge=1, description="number of blocks, each with attention and an MLP")
    num_heads: int = Field(4, ge=1, description="attention heads in each block")

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be divisible by num_heads={self.num_heads}, and by 4")
        return self


class GraphConfig(NetworkConfig):
    """Messages between neighbouring pixels of an image, or between the points of a set in any order."""

    kind: Literal["graph"] = "graph"
    hidden_dim: int = Field(32, ge=1, description="width of the features of a node (a pixel or a point)")
    num_layers: int = Field(3, ge=1, description="rounds of messages between nodes")
    point_dim: int = Field(
        2, ge=1, description="vectors only: a vector of D values is read as D / point_dim points of this dimension"
    )
    neighbours: int | None = Field(
        None,
        ge=1,
        description="vectors only: number of nearest points that a point receives messages from; null: all points. "
        "A pixel of an image always receives them from the eight pixels around it",
    )


class GaussianPriorConfig(Section):
    """A Gaussian whose values are independent and have the same mean and standard deviation."""

    kind: Literal["gaussian"] = Field("gaussian", description="kind of the prior; gaussian is the only one")
    mean: float = Field(0.0, description="mean of every value of x")
    std: float = Field(1.0, gt=0, description="standard deviation of every value of x")


class GaussianConfig(GaussianPriorConfig):
    """A Gaussian to train: mean and covariance are learned, and start at the values of `mean` and `std`."""

    covariance: Literal["diagonal", "full"] = Field(
        "diagonal", description="what is learned besides the mean: a variance for each value of x, or a full matrix"
    )

    @property
    def num_classes(self) -> None:
        return None


class ImportConfig(Section):
    """A class of your own, from a module that is installed or in the directory where the command runs."""

    kind: Literal["import"] = "import"
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Class of your own energy, a BaseEnergyFunction")
    settings: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the class")
    num_classes: int | None = Field(
        None, ge=2, description="number of classes if the class's forward takes (x, y); null: it takes x alone"
    )


Network = (
    MLPConfig
    | ConvConfig
    | ResNetConfig
    | WideResNetConfig
    | UNetConfig
    | TransformerConfig
    | GraphConfig
    | ImportConfig
)


class HybridConfig(Section):
    """E(x) = E_prior(x) + weight * E_network(x). The prior stays as it is, network and weight are learned. Set
    loss.l2=0, since it would draw the energies of the prior to 0 as well."""

    kind: Literal["hybrid"] = "hybrid"
    weight: float = Field(
        1.0, gt=0, description="initial weight of the network in E_prior + weight * E_network; it is learned"
    )
    prior: GaussianPriorConfig = Field(GaussianPriorConfig(), description="the energy that stays as it is")
    network: Annotated[Annotated[Network, Field(discriminator="kind")], kind_by_default("mlp")] = Field(
        MLPConfig(), description="the energy that is learned"
    )

    @property
    def num_classes(self) -> int | None:
        return self.network.num_classes


EnergyConfig = Annotated[
    Annotated[Network | GaussianConfig | HybridConfig, Field(discriminator="kind")], kind_by_default("resnet")
]
