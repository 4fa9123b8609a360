"""The chains' copy of an energy: the same function as the module, in float32 and bfloat16, and separate from it."""

import copy
from itertools import product

import pytest
import torch
from small_networks import SMALL, AwkwardEnergy, images, reach_fixed_point, small
from torch import nn
from torch.nn.utils import parametrize

from ebm.config.energies import GaussianConfig, HybridConfig
from ebm.energies import FoldedEnergy, build_energy, marginal_energy, mixture
from ebm.energies.factory import _QuickConv2d, _quicken
from ebm.energies.networks import NORMALISED


def folded_cases():
    for kind, spectral in product(SMALL, (False, True)):
        yield pytest.param(
            lambda kind=kind, spectral=spectral: small(kind, spectral_norm=spectral), id=f"{kind}-{spectral}"
        )
    for spectral in (False, True):
        yield pytest.param(lambda spectral=spectral: AwkwardEnergy(spectral=spectral), id=f"awkward-{spectral}")
        network = SMALL["conv"].model_copy(update={"spectral_norm": spectral})
        hybrid = HybridConfig(network=network, weight=0.7)
        yield pytest.param(lambda hybrid=hybrid: build_energy(hybrid, (3, 8, 8), seed=0), id=f"hybrid-{spectral}")
    yield pytest.param(lambda: build_energy(GaussianConfig(covariance="full"), (3, 8, 8), seed=0), id="gaussian")
    yield pytest.param(lambda: 0.5 * small("conv") - small("mlp", confine=0.1), id="sum")
    yield pytest.param(lambda: mixture([small("conv"), small("transformer")], [0.3, 0.7]), id="mixture")


def values_and_gradient(energy, x):
    x = x.clone().requires_grad_(True)
    values = energy(x)
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


def assert_same_function(folded, energy, x, **tolerance):
    """The module in evaluation mode, and its copy."""
    training = energy.training
    torch.testing.assert_close(
        values_and_gradient(folded, x),
        values_and_gradient(energy.eval(), x),
        **(tolerance or {"rtol": 1e-5, "atol": 1e-6}),
    )
    energy.train(training)


@pytest.mark.parametrize("make", list(folded_cases()))
def test_folded_is_the_module_and_follows_it(make):
    energy, x = make().train(), images(4, (3, 8, 8))
    folded = FoldedEnergy(energy).refresh()
    assert_same_function(folded, energy, x)
    before = folded(x)
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.03)
    energy(x).mean().backward()
    optimizer.step()
    for buffer in energy.buffers(recurse=False):
        buffer.mul_(1.25)
    assert torch.equal(folded(x), before)  # until it is told
    assert_same_function(folded.refresh(), energy, x)
    assert not torch.allclose(folded(x), before, rtol=1e-4)
    assert energy.training and all(module.training for module in energy.modules())


@pytest.mark.parametrize("make", list(folded_cases()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_weights_are_the_modules_to_the_last_bit(make, dtype):
    """As the module has them in evaluation mode, whose spectral norms torch computes."""
    energy = make().train()
    folded = FoldedEnergy(energy, dtype).refresh()
    energy.eval()
    layers = dict(energy.named_modules())
    for path, tensor in (*folded.module.named_parameters(), *folded.module.named_buffers()):
        place, _, name = path.rpartition(".")
        assert torch.equal(tensor, getattr(layers[place], name).to(tensor.dtype))


@pytest.mark.parametrize("make", list(folded_cases()))
def test_folded_is_frozen_plain_and_separate(make):
    energy, x = make().train(), images(4, (3, 8, 8))
    state = {name: tensor.clone() for name, tensor in energy.state_dict().items()}
    folded = FoldedEnergy(energy).refresh()
    values_and_gradient(folded, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in energy.state_dict().items())  # _u and _v as well
    assert not any(parametrize.is_parametrized(module) for module in folded.module.modules())
    assert not any(tensor.requires_grad for tensor in folded.module.parameters())
    assert not any(module.training for module in folded.module.modules())
    own, theirs = ({t.data_ptr() for t in m.state_dict().values()} for m in (folded.module, energy))
    assert not own & theirs
    assert all(parameter.requires_grad for parameter in energy.parameters())


@pytest.mark.parametrize("make", list(folded_cases()))
def test_convolutions_as_a_gpu_computes_them(make):
    energy, x = make().train(), images(4, (3, 8, 8))
    for dtype in (torch.float32, torch.bfloat16):
        folded = FoldedEnergy(energy, dtype)
        _quicken(folded.module)
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
        assert_same_function(folded.refresh(), energy, x, **tolerance)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_over_few_channels_is_a_product(channels, bias):
    """Values, gradient, and the gradient of a gradient, at an odd size; others are computed as they were."""
    x = images(2, (channels, 7, 5)).double()
    for settings in ({}, {"stride": 2}, {"dilation": 2}, {"padding_mode": "circular"}):
        plain = nn.Conv2d(channels, 6, 3, padding=1, bias=bias, **settings).double()
        quick = copy.deepcopy(plain)
        _quicken(quick)
        assert type(quick) is _QuickConv2d

        def all_derivatives(layer):
            y = x.clone().requires_grad_(True)
            values = layer(y)
            (gradient,) = torch.autograd.grad(values.pow(3).sum(), y, create_graph=True)
            return values, gradient, *torch.autograd.grad(gradient.square().sum(), (y, layer.weight))

        for value, expected in zip(all_derivatives(quick), all_derivatives(plain), strict=True):
            torch.testing.assert_close(value, expected)


def test_folded_weights_have_spectral_norm_one():
    x = images(2, (3, 8, 8))
    energy = reach_fixed_point(small("resnet"), x)
    folded = FoldedEnergy(energy).refresh()
    for layer in folded.module.modules():
        if isinstance(layer, NORMALISED):
            assert torch.linalg.svdvals(layer.weight.flatten(1))[0].item() == pytest.approx(1, abs=0.02)


def test_folded_labels():
    energy, x, y = small("conv", num_classes=3).eval(), images(3, (3, 8, 8)), torch.tensor([2, 0, 1])
    folded = FoldedEnergy(energy).refresh()
    assert torch.allclose(folded(x, y), energy(x, y), atol=1e-6)
    assert torch.allclose(marginal_energy(folded.class_energies(x)), energy(x), atol=1e-6)
    assert torch.allclose(folded.class_energies(x), energy.class_energies(x), atol=1e-6)


@pytest.mark.parametrize("make", list(folded_cases()))
def test_folded_in_bfloat16(make):
    energy, x = make().eval(), images(8, (3, 8, 8))
    folded = FoldedEnergy(energy, torch.bfloat16).refresh()
    (values, gradient), (exact, exact_gradient) = values_and_gradient(folded, x), values_and_gradient(energy, x)
    assert values.dtype == gradient.dtype == torch.float32
    assert (values - exact).abs().max() < 0.03 * (1 + exact.abs().max())
    cosine = torch.cosine_similarity(gradient.flatten(1), exact_gradient.flatten(1))
    assert cosine.min() > 0.99
    for layer in folded.module.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.dtype == torch.bfloat16
    if hasattr(folded.module, "head"):
        assert all(tensor.dtype == torch.float32 for tensor in folded.module.head.parameters())
