"""energy.*: a section a kind of energy."""

from typing import Annotated, Any, Literal

from pydantic import Field

from ebm.config.section import Section


class NetworkConfig(Section):
    spectral_norm: bool = Field(False, description="normalise every layer to spectral norm 1 (Miyato et al. 2018)")
    num_classes: int | None = Field(None, ge=2, description="classes of a class-conditional energy E(x, y)")


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


class ImportConfig(Section):
    kind: Literal["import"] = "import"
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Class of a BaseEnergyFunction")
    settings: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")
    num_classes: int | None = Field(None, ge=2, description="classes, where forward takes (x, y)")


EnergyConfig = Annotated[MLPConfig | ConvConfig | ResNetConfig | ImportConfig, Field(discriminator="kind")]
