"""energy.*: a section a kind of energy."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ebm.config.section import Section, kind_by_default


class NetworkConfig(Section):
    spectral_norm: bool = Field(False, description="normalise every layer to spectral norm 1 (Miyato et al. 2018)")
    num_classes: int | None = Field(None, ge=2, description="classes of a class-conditional energy E(x, y)")
    activation: Literal["silu", "softplus", "gelu", "leaky_relu"] = Field(
        "silu", description="nonlinearity; leaky_relu has no second derivative: not for score matching"
    )
    confine: float = Field(
        0.0, ge=0, description="weight c of a term c/2 |x|^2, which keeps free states near the origin"
    )


class MLPConfig(NetworkConfig):
    kind: Literal["mlp"] = "mlp"
    hidden_dim: int = Field(128, ge=1, description="width of the hidden layers")
    num_layers: int = Field(2, ge=1, description="hidden layers")


class ConvConfig(NetworkConfig):
    kind: Literal["conv"] = "conv"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (16, 32, 32, 64), min_length=1, description="channels a layer; every layer after the first halves the size"
    )
    hidden_dim: int = Field(64, ge=1, description="width of the head's hidden layer")


class ResNetConfig(NetworkConfig):
    kind: Literal["resnet"] = "resnet"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (128, 256, 256, 256), min_length=1, description="channels a stage; the resolution halves after each"
    )
    blocks: int = Field(2, ge=1, description="residual blocks a stage")
    spectral_norm: bool = Field(True, description="normalise every layer to spectral norm 1 (Miyato et al. 2018)")


class WideResNetConfig(NetworkConfig):
    kind: Literal["wide_resnet"] = "wide_resnet"
    depth: int = Field(28, ge=10, description="layers, 6 n + 4 with n residual blocks a stage (JEM: 28)")
    widen: int = Field(10, ge=1, description="the three stages are 16, 32 and 64 times as wide (JEM: 10)")

    @field_validator("depth")
    @classmethod
    def _depth(cls, depth):
        if (depth - 4) % 6:
            raise ValueError(f"must be 6 n + 4 with n blocks a stage; use {depth - (depth - 4) % 6}")
        return depth


class TransformerConfig(NetworkConfig):
    kind: Literal["transformer"] = "transformer"
    patch_size: int = Field(4, ge=1, description="side of the square patches that are the tokens")
    dim: int = Field(128, ge=4, description="width of a token; divisible by num_heads, and by 4")
    depth: int = Field(4, ge=1, description="blocks of attention and MLP")
    num_heads: int = Field(4, ge=1, description="attention heads")

    @model_validator(mode="after")
    def _heads(self):
        if self.dim % self.num_heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be divisible by num_heads={self.num_heads}, and by 4")
        return self


class GraphConfig(NetworkConfig):
    kind: Literal["graph"] = "graph"
    hidden_dim: int = Field(32, ge=1, description="width of a node's features")
    num_layers: int = Field(3, ge=1, description="rounds of messages: between neighbouring pixels, or points")
    point_dim: int = Field(2, ge=1, description="a vector of D elements is D / point_dim points; not for images")
    neighbours: int | None = Field(
        None, ge=1, description="nearest points that a point hears; null: all; images: null, the pixels around"
    )


class GaussianPriorConfig(Section):
    kind: Literal["gaussian"] = "gaussian"
    mean: float = Field(0.0, description="mean of every element")
    std: float = Field(1.0, gt=0, description="standard deviation of every element")


class GaussianConfig(GaussianPriorConfig):
    """As an energy to train, mean and covariance are learned, from the prior's values on."""

    covariance: Literal["diagonal", "full"] = Field("diagonal", description="what is learned besides the mean")

    @property
    def num_classes(self) -> None:
        return None


class ImportConfig(Section):
    kind: Literal["import"] = "import"
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Class of a BaseEnergyFunction")
    settings: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")
    num_classes: int | None = Field(None, ge=2, description="classes, where forward takes (x, y)")


Network = MLPConfig | ConvConfig | ResNetConfig | WideResNetConfig | TransformerConfig | GraphConfig | ImportConfig


class HybridConfig(Section):
    kind: Literal["hybrid"] = "hybrid"
    weight: float = Field(1.0, gt=0, description="of the network in E_prior + weight E_network at the start; learned")
    prior: GaussianPriorConfig = Field(
        GaussianPriorConfig(), description="stays as it is; loss.l2 above 0 would draw it to 0, too"
    )
    network: Annotated[Annotated[Network, Field(discriminator="kind")], kind_by_default("mlp")] = Field(
        MLPConfig(), description="an energy that is learned"
    )

    @property
    def num_classes(self) -> int | None:
        return self.network.num_classes


EnergyConfig = Annotated[
    Annotated[Network | GaussianConfig | HybridConfig, Field(discriminator="kind")], kind_by_default("resnet")
]
