"""Energies as values: against arithmetic on numbers; the hybrid leaves its prior's temperature alone."""

import math

import pytest
import torch
from torch import nn

from ebm.config import MLPConfig
from ebm.config.energies import GaussianPriorConfig, HybridConfig
from ebm.energies import (
    BaseEnergyFunction,
    ConvolutionalEnergyFunction,
    FoldedEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    HybridEnergyFunction,
    MLPEnergyFunction,
    build_energy,
    mixture,
)
from ebm.energies.networks import spectrally_normalise


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return MLPEnergyFunction(2, 8), GaussianEnergy([0.5, -0.5], [[1.0, 0.3], [0.3, 2.0]]), MLPEnergyFunction(2, 4)


def points(n=6, seed=0):
    return 2 * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def test_arithmetic(parts):
    (a, b, c), x = parts, points()
    for composed, expected in (
        (a + b, a(x) + b(x)),
        (a - b, a(x) - b(x)),
        (-a, -a(x)),
        (3 * a, 3 * a(x)),
        (a * 0.25, 0.25 * a(x)),
        (a / 4, 0.25 * a(x)),
        (torch.tensor(0.5) * a, 0.5 * a(x)),
        (a + b + c, a(x) + b(x) + c(x)),
        (a - (b - 2 * c), a(x) - b(x) + 2 * c(x)),
        (-(a - b) / 2 + a, 0.5 * (a(x) + b(x))),
        (sum([a, b, c]), a(x) + b(x) + c(x)),
    ):
        assert isinstance(composed, BaseEnergyFunction)
        torch.testing.assert_close(composed(x), expected)
        assert composed(x).dtype == torch.float32
    torch.testing.assert_close((a - 2 * b).gradient(x), a.gradient(x) - 2 * b.gradient(x))


def test_mixture_is_the_sum_of_densities(parts):
    (a, b, c), x = parts, points()
    expected = -(0.2 * (-a(x)).exp() + 0.5 * (-b(x)).exp() + 3 * (-c(x)).exp()).log()
    torch.testing.assert_close(mixture([a, b, c], [0.2, 0.5, 3])(x), expected)
    torch.testing.assert_close(mixture([a, b])(x), -(0.5 * (-a(x)).exp() + 0.5 * (-b(x)).exp()).log())
    far = mixture([b, b], [0.5, 0.5])(1e3 * x)  # where every exp(-E) is 0 in float32
    torch.testing.assert_close(far, b(1e3 * x))


def test_product_of_gaussians_is_a_gaussian():
    """Precisions add, and the mean is the precision-weighted one."""
    a, b = GaussianEnergy([1.0, 0.0], [[1.0, 0.3], [0.3, 2.0]]), GaussianEnergy([-1.0, 2.0], [0.5, 1.5])
    precision = a.precision + b.precision
    mean = torch.linalg.solve(precision, a.precision @ a.mean + b.precision @ b.mean)
    exact, x = GaussianEnergy(mean, precision.inverse()), points()
    difference = (a + b)(x) - exact(x)
    torch.testing.assert_close(difference, difference[:1].expand(6), rtol=1e-4, atol=1e-4)


def test_mixture_of_gaussians_of_one_width_is_the_analytic_one():
    means, weights = torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), [0.3, 0.7]
    composed = mixture([GaussianEnergy(mean, 0.5) for mean in means], weights)
    analytic, x = GaussianMixtureEnergy(means, 0.5, weights), points()
    torch.testing.assert_close(analytic(x) - composed(x), torch.full((6,), math.log(2 * math.pi * 0.5)))


def test_sums_flatten_and_share_their_parts(parts):
    a, b, c = parts
    total = a + b - c
    assert list(total.energies)[:2] == [a, b]
    assert (total + a).energies[0] is a and len((total + a).energies) == 4
    assert {id(p) for p in total.parameters()} == {id(p) for p in (*a.parameters(), *c.parameters())}


def test_a_state_dict_holds_everything(parts):
    (a, b, c), x = parts, points()
    first, second = 0.3 * a + mixture([b, c], [0.2, 0.8]), 0.9 * MLPEnergyFunction(2, 8) + mixture([b, c])
    assert not torch.allclose(first(x), second(x))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(x), first(x))


def test_a_weight_can_be_learned(parts):
    (a, b, _), x = parts, points()
    weight = nn.Parameter(torch.tensor(0.7))
    tilted = b + weight * a
    assert any(parameter is weight for parameter in tilted.parameters())
    tilted(x).sum().backward()
    torch.testing.assert_close(weight.grad, a(x).sum().detach())
    folded = FoldedEnergy(tilted).refresh()
    torch.testing.assert_close(folded(x), tilted(x).detach())
    with torch.no_grad():
        weight.mul_(-2)
    torch.testing.assert_close(folded.refresh()(x), tilted(x).detach())


def test_spectral_norm_reaches_the_parts(parts):
    a, b, _ = parts
    a.body[0].weight.data.mul_(10)
    energy, x = spectrally_normalise(a + b).train(), points()
    for _ in range(100):
        energy(x)
    assert torch.linalg.svdvals(energy.eval().energies[0].body[0].weight.detach())[0].item() == pytest.approx(
        1, abs=0.01
    )


def test_classes_of_a_composition():
    """The marginal is that of the whole: brute force over the labels."""
    torch.manual_seed(1)
    a, b = (ConvolutionalEnergyFunction(1, 8, 8, (4, 4), 8, num_classes=3) for _ in range(2))
    c = ConvolutionalEnergyFunction(1, 8, 8, (4, 4), 8)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for energy, arithmetic in (
        (a + 20 * b - c, lambda y: a(x, y) + 20 * b(x, y) - c(x)),
        (mixture([a, c], [0.3, 0.7]), lambda y: -(0.3 * (-a(x, y)).exp() + 0.7 * (-c(x)).exp()).log()),
    ):
        assert energy.num_classes == 3
        expected = torch.stack([arithmetic(torch.full((5,), y)) for y in range(3)], 1)
        torch.testing.assert_close(energy(x, torch.full((5,), 2)), expected[:, 2])
        torch.testing.assert_close(energy.class_energies(x), expected)
        torch.testing.assert_close(energy(x), -(-expected).exp().sum(1).log())
    with pytest.raises(ValueError, match="labels y go with num_classes"):
        (c + c)(x, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="no classes"):
        (c + c).class_energies(x)
    with pytest.raises(ValueError, match="3, 4 classes can't be composed"):
        a + ConvolutionalEnergyFunction(1, 8, 8, (4, 4), 8, num_classes=4)


def test_what_is_no_energy_and_no_number_is_refused(parts):
    a, b, _ = parts
    for wrong in (lambda: a * b, lambda: a + 1, lambda: 1 - a, lambda: a / b):
        with pytest.raises(TypeError, match="unsupported operand"):
            wrong()
    for weight in (math.nan, math.inf, torch.ones(2)):
        with pytest.raises(ValueError, match="one finite number"):
            weight * a
    for weights in ([0.5], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="2 finite numbers above 0"):
            mixture([a, b], weights)


def test_hybrid_keeps_its_priors_temperature():
    """With a network that says nothing the density is the prior's own, whatever the weight is; in
    alpha E_prior + (1 - alpha) E_network it would be as wide as 1 / sqrt(alpha)."""
    hybrid, x = HybridEnergyFunction(input_dim=2, hidden_dim=64), points()
    for parameter in hybrid.network.parameters():
        nn.init.zeros_(parameter)
    for weight in (1.0, 0.1, -3.0):
        nn.init.constant_(hybrid.weight_1, weight)
        torch.testing.assert_close(hybrid(x), 0.5 * x.square().sum(1))


def test_hybrid_learns_its_network_and_weight_alone():
    prior = GaussianEnergy(torch.zeros(2), 4.0)
    hybrid = HybridEnergyFunction(2, 8, prior=prior, weight=0.5)
    assert hybrid.prior is prior and hybrid.weights[1].item() == 0.5
    before, x = prior(points()), points()
    hybrid(x).sum().backward()
    torch.testing.assert_close(hybrid.weight_1.grad, hybrid.network(x).sum().detach())
    torch.optim.SGD(hybrid.parameters(), lr=0.1).step()
    assert torch.equal(prior(points()), before)
    assert [name for name, _ in hybrid.named_parameters() if "energies.0" in name] == []


@pytest.mark.parametrize("shape", [(6,), (3, 8, 8)])
def test_hybrid_of_the_config(shape):
    config = HybridConfig(
        prior=GaussianPriorConfig(mean=0.2, std=0.5), network=MLPConfig(hidden_dim=4, num_classes=3), weight=0.3
    )
    energy, x = build_energy(config, shape, seed=0), torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0])
    prior = 0.5 * (x - 0.2).square().flatten(1).sum(1) / 0.25
    torch.testing.assert_close(energy(x, y), prior + 0.3 * energy.network(x, y))
    assert config.num_classes == energy.num_classes == 3
