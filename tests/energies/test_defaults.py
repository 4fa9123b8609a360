"""Each default of an energy is stated once: constructors and config sections agree."""

import inspect

import pytest
import torch

from ebm.config import ConvConfig, MLPConfig, ResNetConfig
from ebm.config.energies import (
    GraphConfig,
    HybridConfig,
    NetworkConfig,
    TransformerConfig,
    UNetConfig,
    WideResNetConfig,
)
from ebm.energies import (
    ConvolutionalEnergyFunction,
    HybridEnergyFunction,
    MLPEnergyFunction,
    NetworkEnergy,
    PixelGraphEnergyFunction,
    PointGraphEnergyFunction,
    ResNetEnergyFunction,
    TransformerEnergyFunction,
    UNetEnergyFunction,
    WideResNetEnergyFunction,
    build_energy,
)

NETWORKS = [
    (MLPEnergyFunction, MLPConfig(), (12,)),
    (ConvolutionalEnergyFunction, ConvConfig(), (1, 8, 8)),
    (ResNetEnergyFunction, ResNetConfig(), (1, 8, 8)),
    (WideResNetEnergyFunction, WideResNetConfig(), (1, 8, 8)),
    (UNetEnergyFunction, UNetConfig(), (1, 8, 8)),
    (TransformerEnergyFunction, TransformerConfig(), (1, 8, 8)),
    (PixelGraphEnergyFunction, GraphConfig(), (1, 8, 8)),
    (PointGraphEnergyFunction, GraphConfig(), (6, 2)),
]
IMAGES_HAVE_NONE = {"point_dim", "neighbours"}  # settings of GraphConfig for vectors
every_network = pytest.mark.parametrize(
    ("network", "section", "shape"), NETWORKS, ids=[network.__name__ for network, *_ in NETWORKS]
)


def defaults(function) -> dict:
    """The default values of a function's parameters, and `...` for those that have none."""
    return {
        name: ... if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


@every_network
def test_every_setting_has_one_default(network, section, shape):
    stated = defaults(NetworkEnergy.finish) | defaults(network.__init__)
    settings = section.model_dump(exclude={"kind", "noise_conditional", "latent"})  # these wrap any network
    if network is PixelGraphEnergyFunction:
        settings = {name: value for name, value in settings.items() if name not in IMAGES_HAVE_NONE}
    assert {name: stated[name] for name in settings} == settings


@every_network
def test_a_class_and_its_kind_make_the_same_network(network, section, shape):
    """Without any setting: the parameters' names and shapes."""
    with torch.device("meta"):
        made = network(*shape)
    built = build_energy(section, (12,) if network is PointGraphEnergyFunction else shape, seed=0)
    assert {name: p.shape for name, p in made.named_parameters()} == {
        name: p.shape for name, p in built.named_parameters()
    }


def test_the_hybrids_defaults():
    section, stated = HybridConfig(), defaults(HybridEnergyFunction.__init__)
    assert stated["weight"] == section.weight
    assert (stated["hidden_dim"], stated["num_layers"]) == (section.network.hidden_dim, section.network.num_layers)
    prior = HybridEnergyFunction(3).prior
    assert prior.mean.tolist() == [section.prior.mean] * 3
    torch.testing.assert_close(prior.cov, section.prior.std**2 * torch.eye(3))


def test_the_contract_with_users():
    """The signatures that people rely on."""
    resnet, conv = defaults(ResNetEnergyFunction.__init__), defaults(ConvolutionalEnergyFunction.__init__)
    assert list(resnet)[1:7] == ["channels", "height", "width", "features", "blocks", "spectral_norm"]
    assert (resnet["features"], resnet["blocks"], resnet["spectral_norm"]) == ((48, 96, 96), 1, True)
    assert list(conv.items())[1:4] == [("channels", 1), ("width", 28), ("height", 28)]
    for small in (MLPEnergyFunction, HybridEnergyFunction):
        assert list(defaults(small.__init__).items())[1:3] == [("input_dim", 2), ("hidden_dim", 64)]
    assert NetworkConfig().model_dump() == {
        "spectral_norm": False,
        "num_classes": None,
        "activation": "silu",
        "confine": 0.0,
        "noise_conditional": None,
        "latent": None,
    }
