"""U-Nets: the signs and factors of the heads, sizes, homogeneity without biases, and second derivatives."""

import pytest
import torch
from small_networks import images, small

from ebm.config import load_config
from ebm.config.energies import LatentConfig, UNetConfig
from ebm.energies import FoldedEnergy, NoiseConditionalEnergy, UNetEnergyFunction, build_energy, with_noise_level
from ebm.energies.resnet import double, halve
from ebm.errors import ConfigError

HEADS = ("linear", "dot", "quadratic", "norm", "vit")
TINY = {"features": (4, 4), "attention": (1,), "num_heads": 2, "head_patch": 2, "head_dim": 4, "head_depth": 1}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("norm", ["group", "none"])
def test_two_derivatives_of_every_head(head, norm):
    """By finite differences in float64, at an odd size and for two classes."""
    energy = build_energy(UNetConfig(head=head, norm=norm, num_classes=2, **TINY), (1, 2, 3), seed=0).double().eval()
    x, y = images(2, (1, 2, 3)).double().requires_grad_(True), torch.tensor([0, 1])
    assert torch.autograd.gradcheck(lambda z: energy(z, y), x)
    assert torch.autograd.gradgradcheck(lambda z: energy(z, y), x)


@pytest.mark.parametrize("head", HEADS)
def test_every_weight_is_trained_by_scores(head):
    energy, x = small("unet", (3, 8, 8), head=head), images(2, (3, 8, 8)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    silent = {name for name, p in energy.named_parameters() if p.grad is None or not p.grad.any()}
    constants = {"linear": {"head.linear.bias"}, "vit": {"head.linear.bias", "transformer.norm.bias"}}
    assert silent == constants.get(head, set())


@pytest.mark.parametrize("head", HEADS)
def test_the_energy_of_each_head(head):
    """Of the field that the network gives, with its sign and factor; times the output scale."""
    energy, scaled = (small("unet", (2, 6, 5), head=head, output_scale=s).eval() for s in (1.0, 100.0))
    x = images(3, (2, 6, 5))
    if head in ("linear", "vit"):
        assert energy.head.linear is not None
        with pytest.raises(ValueError, match=f"head='{head}' has no field"):
            energy.field(x)
        bias = energy.head.linear.bias.item()
        torch.testing.assert_close(scaled(x) - bias, 100 * (energy(x) - bias), rtol=1e-3, atol=1e-3)
        return
    f = energy.field(x)
    assert f.shape == x.shape
    paired = {"dot": -(x * f), "quadratic": x * f / 2, "norm": f * f / 2}[head]
    torch.testing.assert_close(energy(x), paired.sum((1, 2, 3)))
    torch.testing.assert_close(scaled(x), 100 * energy(x))


def test_a_linear_field_makes_a_quadratic_energy():
    """f(x) = a x: dE/dx is -2 a x, a x and a^2 x."""
    for head, slope in (("dot", -3.0), ("quadratic", 1.5), ("norm", 2.25)):
        energy = small("unet", (1, 4, 4), head=head)
        energy._hidden = lambda x: x
        energy.out = torch.nn.Conv2d(1, 1, 1, bias=False)
        torch.nn.init.constant_(energy.out.weight, 1.5)
        x = images(2, (1, 4, 4))
        torch.testing.assert_close(energy.gradient(x), slope * x)


def test_without_biases_the_field_is_homogeneous():
    plain = {"bias": False, "norm": "none", "activation": "leaky_relu"}
    energy, x = small("unet", (1, 7, 6), **plain), images(2, (1, 7, 6))
    energy = energy.eval()
    layers = {name: layer for name, layer in energy.named_modules() if "attention" not in name}
    assert not [name for name, layer in layers.items() if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None]
    without = small("unet", (1, 7, 6), attention=(), **plain).eval()  # softmax is not homogeneous
    torch.testing.assert_close(without.field(3 * x), 3 * without.field(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without(3 * x), 9 * without(x), rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in small("unet", bias=False).named_parameters() if name.endswith("bias")]


def test_upsampling_repeats_what_halving_averages():
    x = images(2, (3, 5, 4))
    small_ = halve(x)
    torch.testing.assert_close(halve(double(small_, 5, 4)), small_)
    assert torch.equal(double(small_, 5, 4), small_.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5, :4])


@pytest.mark.parametrize("head", HEADS)
def test_channels_last_and_bfloat16_copies_are_the_same_function(head):
    energy, x = small("unet", (3, 9, 8), head=head, num_classes=3).eval(), images(4, (3, 9, 8))
    folded = FoldedEnergy(energy).refresh()
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(folded(last), energy(x), rtol=1e-5, atol=1e-5)
    narrow = FoldedEnergy(energy, torch.bfloat16).refresh()
    assert (narrow(x) - energy(x)).abs().max() < 0.05 * (1 + energy(x).abs().max())
    assert {p.dtype for p in narrow.module.head.parameters()} == {torch.float32}


@pytest.mark.parametrize("head", HEADS)
def test_the_noise_level_is_an_input_that_no_head_pairs(head):
    section = UNetConfig(head=head, noise_conditional={"sigma_min": 0.1}, **TINY)
    energy = build_energy(section, (2, 6, 6), seed=0).eval()
    assert isinstance(energy, NoiseConditionalEnergy) and isinstance(energy.network, UNetEnergyFunction)
    assert energy.network.planes == 2
    x = images(2, (2, 6, 6))
    low, high = (energy(with_noise_level(x, torch.full((2,), t))) for t in (-3.0, 1.0))
    assert low.shape == (2,) and not torch.isclose(low, high).any()
    if head in ("dot", "quadratic", "norm"):
        z = images(1, (10, 6, 6))
        f = energy.network.field(z)
        paired = f if head == "norm" else z[:, :2]
        factor = {"dot": -1.0, "quadratic": 0.5, "norm": 0.5}[head]
        torch.testing.assert_close(energy.network(z), factor * (paired * f).sum((1, 2, 3)))
        assert energy.network.field(images(1, (10, 6, 6))).shape == (1, 2, 6, 6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("energy.attention=[3]", ("attention=[3]", "levels go from 0 to 2")),
        ("energy.num_heads=3 energy.attention=[1]", ("level 1, of width 64", "num_heads")),
        ("energy.head=vit energy.head_dim=6", ("head_dim=6",)),
    ],
)
def test_settings_that_do_not_go_together(override, words):
    with pytest.raises(ConfigError) as error:
        load_config(None, ["energy.kind=unet", *override.split()])
    assert all(word in str(error.value) for word in words), error.value


def test_a_field_becomes_an_energy():
    """v(x) = -a x, which points at 0, gives with quadratic an energy whose descent is v, and with dot twice as much."""
    for head, factor in (("quadratic", 1.0), ("dot", 2.0)):
        field, energy = (small("unet", (1, 4, 4), head=kind, num_classes=n) for kind, n in (("dot", None), (head, 3)))
        energy.load_field(field.state_dict())
        x = images(2, (1, 4, 4))
        sign = 1 if head == "dot" else -1
        torch.testing.assert_close(energy.field(x), sign * field.field(x))
        for network in (field, energy):
            network._hidden = lambda x: x
            network.out = torch.nn.Conv2d(1, 1, 1, bias=False)
            torch.nn.init.constant_(network.out.weight, -1.5 if network is field else -1.5 * sign)
        torch.testing.assert_close(-torch.autograd.functional.jacobian(
            lambda z, e=energy: (e.output_scale * {"dot": -1.0, "quadratic": 0.5}[e.kind] * (z * e.field(z)).sum()), x
        ), factor * field.field(x))  # fmt: skip
    for head, words in (("vit", "can't start"), ("dot", "other weights")):
        with pytest.raises(ValueError, match=words):
            small("unet", (2, 4, 4), head=head).load_field(small("unet", (1, 4, 4)).state_dict())


def test_a_latent_makes_an_energy_of_any_network():
    """|f|^2 / 2, on the network's features, also in the chains' copy; the encoder has weights of its own."""
    for kind, settings in (("conv", {}), ("unet", {"head": "linear"}), ("mlp", {"confine": 0.5})):
        energy, x = small(kind, (1, 8, 8), latent=LatentConfig(dim=6), **settings).eval(), images(3, (1, 8, 8))
        f = energy.latents(x)
        confined = settings.get("confine", 0.0) / 2 * x.square().sum((1, 2, 3))
        torch.testing.assert_close(energy(x), f.square().sum(1) / 2 + confined)
        torch.testing.assert_close(energy.codes(x).norm(dim=1), torch.ones(3))
        narrow = FoldedEnergy(energy, torch.bfloat16).refresh()
        torch.testing.assert_close(narrow(x), energy(x), rtol=0.05, atol=0.01)
        assert narrow.module.latent.weight.dtype == torch.float32
        own, theirs = (dict(part.named_parameters()) for part in (energy.network, energy.encoder))
        assert own.keys() == theirs.keys() and not any(torch.equal(own[k], theirs[k]) for k in own if own[k].ndim > 1)
    for wrong in ("energy.kind=unet energy.latent={} loss.kind=contrastive_latent", "energy.latent={}",
                  "loss.kind=contrastive_latent", "energy.latent={} energy.num_classes=3"):  # fmt: skip
        with pytest.raises(ConfigError, match="latent"):
            load_config(None, wrong.split())
