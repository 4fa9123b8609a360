"""Analytic energies: normalisers by quadrature and special functions, samples against moments and distribution."""

import math

import pytest
import torch
from scipy import special

from ebm.energies import (
    DoubleWellEnergy,
    FoldedEnergy,
    FourPeaksEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    RingEnergy,
)

MEAN = [0.5, -1.0]
COV = [[1.5, 0.6], [0.6, 0.5]]
MEANS = [[-1.5, 0.0], [2.0, 1.0], [0.0, -2.0]]
COVS = [[[0.3, 0.1], [0.1, 0.2]], [[1.0, 0.0], [0.0, 0.5]], [[0.4, -0.2], [-0.2, 0.6]]]
PLANE = {
    "gaussian": lambda: GaussianEnergy(MEAN, COV),
    "diagonal": lambda: GaussianEnergy(MEAN, [1.5, 0.5]),
    "isotropic": lambda: GaussianEnergy(MEAN, 0.7),
    "learned": lambda: GaussianEnergy(MEAN, COV, trainable=True),
    "mixture": lambda: GaussianMixtureEnergy(MEANS, COVS, [0.2, 0.5, 0.3]),
    "mixture of equals": lambda: GaussianMixtureEnergy(MEANS, 0.3),
    "double well": lambda: DoubleWellEnergy(2, barrier=3.0, well=1.5),
    "ring": lambda: RingEnergy(2.0, 0.2),
    "wide ring": lambda: RingEnergy(1.0, 0.8),
    "four peaks": lambda: FourPeaksEnergy(),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quadrature(energy, n=601):
    """(points, probabilities, log Z) of a density in the plane by the trapezoidal rule on [-12, 12]^2."""
    axis = torch.linspace(-12, 12, n, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_density = -energy.double()(points)
    log_z = torch.logsumexp(log_density, 0)
    return points, (log_density - log_z).exp(), log_z + 2 * math.log(24 / (n - 1))


@pytest.mark.parametrize("name", PLANE)
def test_normalisers_by_quadrature(name):
    energy = PLANE[name]()
    assert energy.log_normaliser().item() == pytest.approx(quadrature(energy)[2].item(), abs=1e-5)


@pytest.mark.parametrize("name", PLANE)
def test_samples_have_the_moments_of_the_density(name):
    """All moments up to the fourth, by quadrature, within 4.5 standard errors."""
    n, energy = 40_000, PLANE[name]()
    samples = energy.sample(n, generator())
    assert samples.shape == (n, 2) and samples.dtype == torch.float32 and not samples.requires_grad
    points, probabilities, _ = quadrature(energy)
    for i in range(5):
        for j in range(5 - i):
            f_points, f_samples = (x[:, 0] ** i * x[:, 1] ** j for x in (points, samples.double()))
            mean = (probabilities * f_points).sum()
            error = ((probabilities * f_points.square()).sum() - mean.square()).clamp_min(0).sqrt() / math.sqrt(n)
            assert abs(f_samples.mean() - mean) <= 4.5 * error + 1e-5, (i, j)


@pytest.mark.parametrize("name", PLANE)
def test_samples_have_the_distribution_of_the_energy(name):
    """The distribution function of E itself: Kolmogorov's distance below its .1 % quantile, 1.95 / sqrt(n)."""
    n, energy = 20_000, PLANE[name]()
    samples = energy.sample(n, generator(1))
    points, probabilities, _ = quadrature(energy, 1001)
    with torch.no_grad():
        order = energy(points).sort()
        cumulative = probabilities[order.indices].cumsum(0)
        drawn = energy(samples.double()).sort().values
    at = torch.searchsorted(order.values, drawn).clamp_max(len(cumulative) - 1)
    distance = (cumulative[at] - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n) + 0.002  # the grid's own steps


@pytest.mark.parametrize("name", PLANE)
def test_derivatives(name):
    """First and second, against finite differences; finite also at the origin and far out."""
    energy = PLANE[name]().double()
    x = torch.randn(3, 2, generator=generator()).double().requires_grad_(True)
    assert torch.autograd.gradcheck(energy, x) and torch.autograd.gradgradcheck(energy, x)
    special_points = torch.tensor([[0.0, 0.0], [30.0, -30.0]]).double()
    assert energy.gradient(special_points).isfinite().all()


@pytest.mark.parametrize("name", PLANE)
def test_samples_are_the_generators_alone_and_any_number(name):
    energy = PLANE[name]()
    assert torch.equal(energy.sample(5, generator(3)), energy.sample(5, generator(3)))
    assert energy.sample(0, generator()).shape == (0, 2)


@pytest.mark.parametrize("name", PLANE)
def test_autocast_does_not_round(name):
    """Constants far apart in size lose their digits in bfloat16; a chain's copy must not."""
    energy = PLANE[name]()
    x = torch.randn(50, 2, generator=generator())
    folded = FoldedEnergy(energy, torch.bfloat16).refresh()
    torch.testing.assert_close(folded(x), energy(x).detach(), rtol=1e-6, atol=1e-6)


def test_constants_are_buffers():
    for name, make in PLANE.items():
        energy = make()
        assert bool(list(energy.parameters())) == (name == "learned")
        assert energy.state_dict()


def test_gaussian_of_images():
    mean = torch.linspace(-1, 1, 48).view(3, 4, 4)
    energy = GaussianEnergy(mean, torch.full((3, 4, 4), 0.25))
    x = energy.sample(4000, generator())
    assert x.shape == (4000, 3, 4, 4)
    assert (x.mean(0) - mean).abs().max() < 0.04 and (x.std(0) - 0.5).abs().max() < 0.03
    torch.testing.assert_close(energy(x), 2 * (x - mean).square().sum((1, 2, 3)))
    full = GaussianEnergy(mean, 0.25 * torch.eye(48))
    torch.testing.assert_close(full(x), energy(x))
    torch.testing.assert_close(full.log_normaliser(), energy.log_normaliser())
    assert energy.log_normaliser().item() == pytest.approx(24 * math.log(2 * math.pi * 0.25), rel=1e-5)


def test_gaussian_learns_mean_and_precision():
    """Maximum likelihood by gradient descent from a wrong start: the data's moments."""
    data = GaussianEnergy(MEAN, COV).double().sample(3000, generator())
    energy = GaussianEnergy([0.0, 0.0], torch.eye(2), trainable=True).double()
    optimizer = torch.optim.LBFGS(energy.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = energy(data).mean() + energy.log_normaliser()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(energy.mean.detach(), data.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(energy.cov.detach(), data.T.cov(correction=0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(energy.precision.detach(), data.T.cov(correction=0).inverse(), rtol=1e-3, atol=1e-4)


def test_double_well_in_closed_form():
    """The integral of exp(-b (x^2 - 1)^2) is pi / 2 exp(-b / 2) (I_-1/4(b / 2) + I_1/4(b / 2))."""
    for barrier, well in ((0.1, 1.0), (2.0, 1.0), (9.0, 2.5)):
        one = math.pi / 2 * math.exp(-barrier / 2) * well
        one *= special.iv(-0.25, barrier / 2) + special.iv(0.25, barrier / 2)
        energy = DoubleWellEnergy(3, barrier, well)
        assert energy.log_normaliser().item() == pytest.approx(3 * math.log(one), abs=1e-5)
        assert energy(torch.tensor([[well, -well, well], [0.0, 0.0, 0.0]])).tolist() == pytest.approx([0, 3 * barrier])


def test_ring_across():
    r = RingEnergy(3.0, 0.1).sample(20_000, generator()).norm(dim=1)
    assert r.mean().item() == pytest.approx(3, abs=0.01) and r.std().item() == pytest.approx(0.1, rel=0.03)


def test_four_peaks_term_by_term():
    x, y = torch.randn(2, 20, generator=generator()) * 3
    expected = (
        -2 * torch.exp(-0.2 * ((x - 2) ** 2 + (y - 2) ** 2))
        - 3 * torch.exp(-0.2 * ((x + 2) ** 2 + (y - 2) ** 2))
        - torch.exp(-0.3 * ((x - 2) ** 2 + (y + 2) ** 2))
        - 4 * torch.exp(-0.2 * ((x + 2) ** 2 + (y + 2) ** 2))
        + 0.1 * (x**2 + y**2)
    )
    torch.testing.assert_close(FourPeaksEnergy()(torch.stack([x, y], 1)), expected)


def test_four_peaks_rejection_has_its_bound():
    """The peaks nowhere sum to more than 4.2: they stay below 4.15 on a grid of steps .01, and their slope below 4."""
    axis = torch.linspace(-6, 6, 1201)
    assert FourPeaksEnergy()._peaks(torch.cartesian_prod(axis, axis)).max() < 4.15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GaussianEnergy([0.0, 0.0], [1.0, -1.0]), "cov=.*above 0"),
        (lambda: GaussianEnergy([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: GaussianEnergy([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (lambda: GaussianEnergy([0.0, 0.0], torch.ones(3)), r"cov has shape \(3,\)"),
        (lambda: GaussianMixtureEnergy(MEANS, COVS, [0.5, 0.5]), r"weights \(3,\)"),
        (lambda: GaussianMixtureEnergy(MEANS, COVS, [0.5, 0.5, 0.0]), "weights=.*above 0"),
        (lambda: DoubleWellEnergy(2, barrier=0), "barrier=0.*above 0"),
        (lambda: RingEnergy(width=-1), "width=-1.*above 0"),
        (lambda: RingEnergy()(torch.zeros(2, 3)), r"takes \(batch, 2\)"),
        (lambda: GaussianEnergy(MEAN, COV)(torch.zeros(2)), r"x\[None\]"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
