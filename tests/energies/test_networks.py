"""Networks: any size and number of channels, derivatives, classes, spectral norm against the singular values."""

from itertools import product

import pytest
import torch
from small_networks import SMALL, images, reach_fixed_point, small

from ebm.config import ConvConfig, MLPConfig
from ebm.config.energies import GaussianConfig, GraphConfig, HybridConfig
from ebm.energies import (
    BaseEnergyFunction,
    ConvolutionalEnergyFunction,
    MLPEnergyFunction,
    PointGraphEnergyFunction,
    ResNetEnergyFunction,
    WideResNetEnergyFunction,
    build_energy,
)
from ebm.energies.networks import NORMALISED
from ebm.errors import ConfigError

IMAGES_ONLY = ("conv", "resnet", "wide_resnet", "unet", "transformer", "graph")


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(("side", "channels"), list(product((8, 12, 20, 28, 30, 32, 64), (1, 3, 4))))
def test_any_size(kind, side, channels):
    """Builds, gives each image an energy of its own, and differentiates twice."""
    shape = (channels, side, side)
    energy, x = small(kind, shape).eval(), images(3, shape).requires_grad_(True)
    values = energy(x)
    assert values.shape == (3,) and values.dtype == torch.float32 and values.isfinite().all()
    assert len(values.unique()) == 3
    torch.testing.assert_close(values[:1], energy(x[:1]), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all() and second.abs().max() > 0


@pytest.mark.parametrize("kind", IMAGES_ONLY)
def test_height_and_width_are_not_mixed_up(kind):
    energy = small(kind, (2, 12, 20))
    assert energy(images(2, (2, 12, 20))).shape == (2,)
    with pytest.raises(ValueError, match=r"takes \(batch, 2, 12, 20\)"):
        energy(images(2, (2, 20, 12)))


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_of_a_sample_come_from_it_alone(kind):
    energy, x = small(kind).eval(), images(4, (3, 8, 8)).requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(x)[1], x)
    assert grad[1].abs().sum() > 0
    assert grad[[0, 2, 3]].abs().sum() == 0


@pytest.mark.parametrize("kind", SMALL)
def test_twice_differentiable(kind):
    """Against central differences of the gradient, in float64."""
    energy = small(kind, confine=0.1).eval().double()
    x, v = images(1, (3, 8, 8)).double(), images(1, (3, 8, 8), seed=1).double()
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    (product_,) = torch.autograd.grad((grad * v).sum(), x)
    h = 1e-5
    differences = (energy.gradient(x + h * v) - energy.gradient(x - h * v)) / (2 * h)
    assert product_.abs().max() > 0
    assert (product_ - differences).norm() < 1e-6 * product_.norm()


@pytest.mark.parametrize("kind", SMALL)
def test_gradient_is_the_derivative(kind):
    energy, x, v = small(kind).eval().double(), images(2, (3, 8, 8)).double(), images(2, (3, 8, 8), seed=1).double()
    with torch.no_grad():
        along = (energy(x + 1e-5 * v) - energy(x - 1e-5 * v)) / 2e-5
        gradient = energy.gradient(x)
    assert not gradient.requires_grad and not x.requires_grad
    torch.testing.assert_close((gradient * v).sum((1, 2, 3)), along, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("activation", ["softplus", "gelu", "leaky_relu"])
def test_activations(kind, activation):
    """Another function from the same weights; only the piecewise linear one is without a second derivative."""
    energy, x = small(kind, activation=activation).eval(), images(2, (3, 8, 8))
    silu = small(kind).eval()
    assert all(torch.equal(a, b) for a, b in zip(energy.parameters(), silu.parameters(), strict=True))
    assert not torch.isclose(energy(x), silu(x), rtol=1e-5, atol=0).any()
    if kind not in ("transformer", "unet"):  # where attention and norms have curvature of their own
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)[0]
        assert (second is None or second.abs().max() == 0) == (activation == "leaky_relu")


@pytest.mark.parametrize("kind", SMALL)
def test_the_confining_term_is_added(kind):
    x = images(3, (3, 8, 8))
    free, confined = small(kind).eval(), small(kind, confine=0.5).eval()
    torch.testing.assert_close(confined(x) - free(x), 0.25 * x.square().sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"confine=-1.*at least 0"):
        MLPEnergyFunction(2, 4, confine=-1)


@pytest.mark.parametrize("kind", IMAGES_ONLY)
def test_a_missing_batch_dimension_is_refused(kind):
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\).*add the batch dimension: x\[None\]"):
        small(kind)(images(1, (3, 8, 8))[0])


def test_mlp_takes_vectors_and_images_of_the_right_number_of_elements():
    energy = MLPEnergyFunction(input_dim=12, hidden_dim=8)
    x = images(5, (3, 2, 2))
    assert torch.equal(energy(x), energy(x.flatten(1)))
    for wrong in (torch.zeros(12), torch.zeros(12, 1), x[0]):
        with pytest.raises(ValueError, match=r"takes \(batch, 12\)"):
            energy(wrong)


@pytest.mark.parametrize("kind", SMALL)
def test_float32_energies_under_autocast(kind):
    energy, x = small(kind).eval(), images(4, (3, 8, 8))
    exact = energy(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = energy(x)
    assert values.dtype == torch.float32
    assert not torch.equal(values, exact)  # the body did compute in bfloat16
    torch.testing.assert_close(values, exact, rtol=0.05, atol=0.02 * (1 + float(exact.abs().max())))


@pytest.mark.parametrize("kind", SMALL)
def test_class_conditional(kind):
    energy, x = small(kind, num_classes=3).eval(), images(6, (3, 8, 8))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    values = energy(x, labels)
    assert values.shape == (6,)
    for label in range(3):
        every = energy(x, torch.full((6,), label))
        torch.testing.assert_close(every[labels == label], values[labels == label])
        assert not torch.isclose(every[labels != label], values[labels != label], atol=1e-7).any()
    assert energy.gradient(x, labels).shape == x.shape
    with pytest.raises(ValueError, match="labels y go with num_classes"):
        small(kind)(x, labels)
    with pytest.raises(ValueError, match="no classes; give it num_classes"):
        small(kind).class_energies(x)


@pytest.mark.parametrize("kind", SMALL)
def test_without_labels_the_marginal(kind):
    """One pass of the body against a forward a class and the sum over classes."""
    energy, x = small(kind, num_classes=3, confine=0.1).eval().double(), images(4, (3, 8, 8)).double()
    by_class = torch.stack([energy(x, torch.full((4,), label)) for label in range(3)], 1)
    torch.testing.assert_close(energy.class_energies(x), by_class)
    torch.testing.assert_close(BaseEnergyFunction.class_energies(energy, x), by_class)
    brute_force = -by_class.neg().exp().sum(1).log()
    torch.testing.assert_close(energy(x), brute_force)
    torch.testing.assert_close(energy.marginal(x), brute_force)


@pytest.mark.parametrize("kind", SMALL)
def test_every_layer_gets_spectral_norm_one(kind):
    energy = small(kind, spectral_norm=True, num_classes=4)
    reach_fixed_point(energy, images(2, (3, 8, 8)), torch.zeros(2, dtype=torch.int64)).eval()
    layers = {name: layer for name, layer in energy.named_modules() if isinstance(layer, NORMALISED)}
    assert {"head.classes"} < set(layers) and ("head.linear" in layers) == (kind != "unet")
    for name, layer in layers.items():
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item()
        assert largest == pytest.approx(1, abs=0.02), name
    plain = small(kind, spectral_norm=False, num_classes=4)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in energy.parameters())


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = build_energy(SMALL["conv"], (1, 8, 8), seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    again, other = build_energy(SMALL["conv"], (1, 8, 8), seed=5), build_energy(SMALL["conv"], (1, 8, 8), seed=6)
    weights = [energy.state_dict() for energy in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["body.0.weight"], weights[2]["body.0.weight"])


def test_defaults_of_the_guide():
    assert ConvolutionalEnergyFunction(channels=1, width=28, height=28)(torch.zeros(2, 1, 28, 28)).shape == (2,)
    assert MLPEnergyFunction(input_dim=2, hidden_dim=64)(torch.zeros(2, 2)).shape == (2,)
    resnet = ResNetEnergyFunction(3, 32, 32, features=(4, 8, 8), blocks=1, spectral_norm=True)
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2,)
    with pytest.raises(TypeError, match="abstract"):
        BaseEnergyFunction()


def test_size_of_the_wide_resnet():
    """WRN-28-10 for 10 classes has 36.5 million parameters (Zagoruyko & Komodakis 2016, table 4), less 9,000 or so of
    batch normalisation, more in the biases of the convolutions."""
    with torch.device("meta"):
        energy = WideResNetEnergyFunction(3, 32, 32, depth=28, widen=10, num_classes=10)
    assert sum(p.numel() for p in energy.parameters()) == pytest.approx(36.5e6, rel=0.002)
    with pytest.raises(ValueError, match=r"depth=20 must be 6 n \+ 4"):
        WideResNetEnergyFunction(3, 32, 32, depth=20)


POINT_GRAPHS = {"complete": None, "nearest": 3}


@pytest.mark.parametrize("neighbours", POINT_GRAPHS.values(), ids=POINT_GRAPHS)
def test_graph_of_points_does_not_know_their_order(neighbours):
    energy = build_energy(GraphConfig(hidden_dim=8, point_dim=3, neighbours=neighbours), (21,), seed=0).double()
    x = images(4, (7, 3)).double()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(energy(x[:, order]), energy(x))
    assert torch.equal(energy(x.flatten(1)), energy(x))
    torch.testing.assert_close(energy.gradient(x[:, order]), energy.gradient(x)[:, order])
    moved = torch.cat([x[:, :1] + 0.1, x[:, 1:]], 1)
    assert not torch.isclose(energy(moved), energy(x), rtol=1e-6).any()
    v = images(4, (7, 3), seed=1).double()
    along = (energy(x + 1e-6 * v) - energy(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close((energy.gradient(x) * v).sum((1, 2)), along, rtol=1e-5, atol=1e-8)


def test_graph_of_nearest_points_is_continuous_where_neighbours_change():
    """The two points at distances 1 and 1 + e of the first trade places as its nearest; the energy hardly moves."""
    energy = PointGraphEnergyFunction(4, 2, hidden_dim=8, num_layers=1, neighbours=1).double()
    points = torch.tensor([[0, 0], [0, 1], [1, 0], [5.0, 5]]).double()
    step = torch.zeros(4, 2).double()
    step[1, 1] = 1e-6
    values = energy(torch.stack([points - step, points + step]))
    assert abs(values[0] - values[1]) < 1e-4
    farther = energy(torch.stack([points - 1e5 * step, points + 1e5 * step]))  # +-.1: it does depend on it
    assert abs(farther[0] - farther[1]) > 1e-3


def test_points_may_coincide():
    energy = PointGraphEnergyFunction(5, 2, hidden_dim=8, neighbours=2)
    x = torch.zeros(2, 10)
    assert energy(x).isfinite().all() and energy.gradient(x).isfinite().all()


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        *((kind, (12,), rf"energy\.kind={kind} with data\.shape=\[12\].*energy\.kind=mlp") for kind in IMAGES_ONLY[:4]),
        (
            GraphConfig(neighbours=2),
            (3, 8, 8),
            r"data\.shape=\[3, 8, 8\]: energy\.neighbours=2 is for point sets.*null",
        ),
        (GraphConfig(point_dim=2), (9,), r"data\.shape=\[9\].*energy\.point_dim=2"),
        (HybridConfig(network=ConvConfig()), (12,), r"energy\.network\.kind=conv with data\.shape=\[12\]"),
        (GraphConfig(neighbours=4), (10,), r"energy\.neighbours=4 must be from 1 to 3"),
    ],
)
def test_kinds_that_do_not_go_with_the_shape(config, shape, words):
    with pytest.raises(ConfigError, match=words):
        build_energy(SMALL.get(config, config), shape, seed=0)


@pytest.mark.parametrize(
    "config",
    [MLPConfig(hidden_dim=8), GraphConfig(hidden_dim=8), GaussianConfig(), HybridConfig()],
    ids=lambda c: c.kind,
)
def test_vectors(config):
    energy, x = build_energy(config, (6,), seed=0), images(3, (6,))
    assert energy(x).shape == (3,) and energy.gradient(x).shape == (3, 6)
