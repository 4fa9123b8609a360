"""Energies: the contract, spectral norm against the singular values, the chain's folded copy against the module."""

import sys
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ebm.config import ConvConfig, ImportConfig, MLPConfig, ResNetConfig
from ebm.config.energies import GaussianConfig, GraphConfig, HybridConfig, TransformerConfig, WideResNetConfig
from ebm.energies import (
    BaseEnergyFunction,
    ConvolutionalEnergyFunction,
    FoldedEnergy,
    MLPEnergyFunction,
    PointGraphEnergyFunction,
    ResNetEnergyFunction,
    WideResNetEnergyFunction,
    build_energy,
    mixture,
)
from ebm.energies.networks import NORMALISED
from ebm.errors import ConfigError

SMALL = {
    "mlp": MLPConfig(hidden_dim=16),
    "conv": ConvConfig(features=(4, 8, 8), hidden_dim=8),
    "resnet": ResNetConfig(features=(4, 8, 8), blocks=1),
    "wide_resnet": WideResNetConfig(depth=10, widen=1),
    "transformer": TransformerConfig(dim=8, depth=2, num_heads=2),
    "graph": GraphConfig(hidden_dim=8, num_layers=2),
}
IMAGES_ONLY = ("conv", "resnet", "wide_resnet", "transformer", "graph")


def images(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def small(kind, shape=(3, 8, 8), **changes):
    return build_energy(SMALL[kind].model_copy(update=changes), shape, seed=0)


def reach_fixed_point(energy, *inputs):
    """Run the power iterations of a module in training mode until they stand still."""
    energy.train()
    with torch.no_grad():
        for _ in range(200):
            energy(*inputs)
    return energy


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
    if kind != "transformer":  # where attention and LayerNorm have curvature of their own
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
    torch.testing.assert_close(values, exact, rtol=0.05, atol=0.02)


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
    assert {"head.linear", "head.classes"} < set(layers)
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


class AwkwardEnergy(BaseEnergyFunction):
    """What users write: loose parameters and buffers, norms, tied weights, a shared layer, no EnergyHead."""

    def __init__(self, width: int = 8, spectral: bool = True):
        super().__init__()
        self.register_buffer("centre", torch.linspace(-0.5, 0.5, 3).view(3, 1, 1))
        self.register_buffer("nothing", None)
        self.register_buffer("passing", torch.full((), 1.5), persistent=False)
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.group = nn.GroupNorm(2, width)
        self.shared = nn.Linear(width, width, bias=False)
        self.alias = self.shared
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.shared.weight
        self.layer = nn.LayerNorm(width)
        self.last = nn.Linear(width, width)
        if spectral:
            parametrizations.spectral_norm(self.first)
            parametrizations.weight_norm(self.last)

    def forward(self, x):
        h = self.group(self.first(x - self.centre)).mean((2, 3))
        h = self.layer(self.alias(torch.tanh(self.shared(h))) + self.tied(h))
        return self.passing * (self.last(h) * self.weights).square().sum(1)


class BatchNormEnergy(BaseEnergyFunction):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.body(x).sum((1, 2, 3))


class DropoutEnergy(BaseEnergyFunction):
    def __init__(self, p: float = 0.1):
        super().__init__()
        self.drop = nn.Dropout2d(p)

    def forward(self, x):
        return self.drop(x).sum((1, 2, 3))


@pytest.fixture
def importable(monkeypatch):
    """This file as a module that `energy.path` can name."""
    monkeypatch.setitem(sys.modules, "user_energies", sys.modules[__name__])

    def build(name, **settings):
        return build_energy(ImportConfig(path=f"user_energies:{name}", settings=settings), (3, 8, 8), seed=1)

    return build


def test_a_users_energy(importable):
    energy = importable("AwkwardEnergy", width=4, spectral=False)
    assert isinstance(energy, AwkwardEnergy) and len(energy.weights) == 4
    again = importable("AwkwardEnergy", width=4, spectral=False)
    assert torch.equal(energy.first.weight, again.first.weight)
    assert isinstance(importable("DropoutEnergy", p=0), DropoutEnergy)


class ClassesEnergy(BaseEnergyFunction):
    def forward(self, x, y):
        return x.flatten(1).square().sum(1) * (1 + y)


def test_a_users_classes(importable):
    """`class_energies` and the folded copy's marginal, of a class that has `forward` alone."""
    config = ImportConfig(path="user_energies:ClassesEnergy", num_classes=3)
    energy, x = build_energy(config, (3, 8, 8), seed=0), images(4, (3, 8, 8)) / 10
    squared = x.square().sum((1, 2, 3))
    torch.testing.assert_close(energy.class_energies(x), squared[:, None] * torch.tensor([1, 2, 3]))
    torch.testing.assert_close(
        -torch.logsumexp(-FoldedEnergy(energy).refresh().class_energies(x), 1),
        -(torch.arange(1, 4) * -squared[:, None]).exp().sum(1).log(),
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("BatchNormEnergy", r"body\.1 is a BatchNorm2d.*GroupNorm"), ("DropoutEnergy", "drop is a Dropout2d.*random")],
)
def test_layers_that_mix_samples_or_roll_dice_are_refused(importable, name, words):
    with pytest.raises(ConfigError, match=words):
        importable(name)


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("no_such_module:Energy", {}, "No module named 'no_such_module'.*must be importable"),
        ("user_energies:NoSuchEnergy", {}, "no attribute 'NoSuchEnergy'"),
        ("user_energies:AwkwardEnergy", {"hidden": 4}, "unexpected keyword argument 'hidden'"),
    ],
)
def test_import_errors_name_the_key(importable, path, settings, words):
    with pytest.raises(ConfigError, match=rf"energy\.path='{path}'.*{words}"):
        build_energy(ImportConfig(path=path, settings=settings), (3, 8, 8), seed=0)


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
    assert torch.allclose(-torch.logsumexp(-folded.class_energies(x), 1), energy(x), atol=1e-6)
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
