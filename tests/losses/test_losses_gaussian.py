"""Every objective finds the mean and the precision of Gaussian data within 3 %, from an energy whose both are free.

Data, and the samples of the model that stand in the place of chains, are exact: drawn in closed form. What is biased
by its definition is corrected for by its formula.
"""

import math

import pytest
import torch
from gaussians import COVARIANCE, MEAN, Quadratic, assert_found, follow, gaussian, minimise, seeded, standard
from scipy.linalg import solve_continuous_lyapunov
from torch import nn

from ebm import losses
from ebm.losses.contrastive import GaussianNoise, UniformNoise

PRECISION = torch.linalg.inv(COVARIANCE)
IDENTITY = torch.eye(2, dtype=torch.float64)


def fitted(loss, num: int, **settings) -> Quadratic:
    """The energy at the minimum of `loss` on `num` data, with the same draws at every evaluation."""
    energy, data = Quadratic(), gaussian(num)
    minimise(lambda: loss(energy, data, generator=seeded(1), **settings).loss, energy.parameters())
    return energy


def samples(energy: Quadratic, z, temperature: float = 1.0):
    """Exact samples of exp(-energy / temperature), made of `z` ~ N(0, I)."""
    with torch.no_grad():
        return energy.mean + z @ torch.linalg.cholesky(temperature * torch.linalg.inv(energy.precision)).T


def test_contrastive_divergence():
    energy, data, z = Quadratic(), gaussian(2000), standard(2000, generator=seeded(1))
    follow(lambda: losses.contrastive_divergence(energy, data, samples(energy, z)).loss, energy.parameters())
    assert_found(energy, PRECISION, tolerance=0.003)


def test_improved_contrastive_divergence():
    """The gradient of the KL term vanishes at equilibrium, up to the bias of its Langevin step (step size .1: 4 %, .02:
    1 %), where its two parts balance: without the energy the precision is 9 % off, without the entropy 12 %."""
    energy, data, z, step = Quadratic(), gaussian(1000), standard(1000, generator=seeded(1)), 0.02
    noise = seeded(2)
    settings = {"step_size": step, "noise_scale": math.sqrt(2 * step), "kl_weight": 1.0, "entropy_weight": 2.0}

    def loss():
        x_neg = samples(energy, z)
        return losses.improved_contrastive_divergence(energy, data, x_neg, generator=noise, **settings).loss

    follow(loss, energy.parameters(), steps=250)
    assert_found(energy, PRECISION)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (losses.implicit_score_matching, {"trace": "exact"}),
        (losses.implicit_score_matching, {"trace": "hutchinson", "num_projections": 2}),
        (losses.sliced_score_matching, {"num_projections": 2}),
        (losses.sliced_score_matching, {"num_projections": 4, "variance_reduction": False}),
    ],
    ids=["exact", "hutchinson", "sliced", "sliced_plain"],
)
def test_score_matching(loss, settings, temperature):
    energy = fitted(loss, 40_000, temperature=temperature, **settings)
    exact = settings.get("trace") == "exact"
    assert_found(energy, temperature * PRECISION, tolerance=1e-5 if exact else 0.03)


def test_denoising_score_matching_after_its_correction():
    energy = fitted(losses.denoising_score_matching, 60_000, sigma=0.3, temperature=0.5)
    smoothed = 0.5 * torch.linalg.inv(energy.precision.detach())
    with torch.no_grad():
        energy.matrix.copy_(torch.linalg.inv(smoothed - 0.3**2 * IDENTITY))
    assert_found(energy, PRECISION)


def test_multilevel_denoising_of_a_quadratic_energy():
    """The best quadratic energy has covariance sigma**2 (I + mean(1 / sigma_i**2) C): that of the data and the noise
    where all levels are sigma."""
    sigma, low, high = 0.3, 0.2, 0.8
    settings = {"sigma": sigma, "sigma_min": low, "sigma_max": high, "temperature": 0.5}
    energy = fitted(losses.multilevel_denoising, 100_000, **settings)
    inverse_square = (low**-2 - high**-2) / (2 * math.log(high / low))
    assert_found(energy, 0.5 * torch.linalg.inv(sigma**2 * (IDENTITY + inverse_square * COVARIANCE)))


class Shells(nn.Module):
    """-log sum_k exp(-E_k), E_k = a r**2 / 2 - b log r + c_k, r the distance to centre k; all of it free."""

    def __init__(self, centres):
        super().__init__()
        self.centres = nn.Parameter(centres)
        self.a, self.b = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (1.0, 1.0))
        self.c = nn.Parameter(torch.zeros(len(centres), dtype=torch.float64))

    def forward(self, x):
        squared = (x[:, None] - self.centres).square().sum(2)
        return -torch.logsumexp(-(self.a * squared / 2 - self.b * squared.log() / 2 + self.c), dim=1)


def test_multilevel_denoising_finds_the_score_of_a_mixture_at_sigma():
    """In 100 dimensions, where a state's distance from the data tells its level of noise: at states of the mixture
    smoothed by sigma the score is that density's, although most levels were others. The first component tells the
    modes apart."""
    dim, sigma, std, num, g = 100, 0.3, 0.1, 2000, seeded(1)
    means = torch.zeros(2, dim, dtype=torch.float64)
    means[:, 0] = torch.tensor([0.8, -0.8])
    data = means[(torch.rand(num, generator=g) < 0.3).long()]
    data = data + std * torch.randn(num, dim, dtype=torch.float64, generator=g)
    energy, settings = Shells(means / 2), {"sigma": sigma, "sigma_min": 0.15, "sigma_max": 1.0, "generator": seeded(2)}

    def loss():
        settings["generator"].manual_seed(2)
        return losses.multilevel_denoising(energy, data, **settings).loss

    minimise(loss, energy.parameters(), steps=40)
    y = (data + sigma * torch.randn(num, dim, dtype=torch.float64, generator=g)).requires_grad_(True)
    (slope,) = torch.autograd.grad(energy(y).sum(), y)
    squared = (y[:, None] - means).square().sum(2)
    log_p = torch.logsumexp(torch.tensor([0.7, 0.3]).log() - squared / (2 * (std**2 + sigma**2)), dim=1)
    (score,) = torch.autograd.grad(log_p.sum(), y)
    assert (-slope - score).norm() < 0.04 * score.norm()
    assert (-slope - score)[:, 0].norm() < 0.1 * score[:, 0].norm()


@pytest.mark.parametrize("noise", [GaussianNoise(0.2, 1.2), UniformNoise(-5.0, 5.0)])
def test_noise_contrastive_estimation_with_its_normaliser(noise):
    energy = fitted(losses.noise_contrastive, 40_000, noise=noise, ratio=5)
    assert_found(energy, PRECISION)
    log_normaliser = (2 * math.pi * COVARIANCE.det().sqrt()).log()
    assert energy.bias.item() == pytest.approx(log_normaliser.item(), abs=0.03)


def test_noise_contrastive_estimation_of_an_energy_without_a_bias():
    energy, data, log_normaliser = Quadratic(), gaussian(20_000), nn.Parameter(torch.zeros((), dtype=torch.float64))
    settings = {"noise": GaussianNoise(0.2, 1.2), "ratio": 5, "log_normaliser": log_normaliser}
    free = [energy.mean, energy.matrix, log_normaliser]
    minimise(lambda: losses.noise_contrastive(energy, data, generator=seeded(1), **settings).loss, free)
    expected = (2 * math.pi * COVARIANCE.det().sqrt()).log().item()
    assert log_normaliser.item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("num_samples", [1, 8])
def test_energy_discrepancy(num_samples):
    """With stabiliser 1 consistent at any number of draws."""
    settings = {"time": 0.5, "num_samples": num_samples}
    assert_found(fitted(losses.energy_discrepancy, 40_000, **settings), PRECISION)


def test_recovery_likelihood():
    """The posterior of x given a noisy copy is Gaussian: of precision P + 1 / sigma**2."""
    energy, data, z, sigma = Quadratic(), gaussian(10_000), standard(10_000, generator=seeded(1)), 0.5
    centre = losses.noisy(data, sigma, seeded(2))

    def loss():
        with torch.no_grad():
            covariance = torch.linalg.inv(energy.precision + torch.eye(2) / sigma**2)
            mean = (energy.precision @ energy.mean + centre / sigma**2) @ covariance
            x_neg = mean + z @ torch.linalg.cholesky(covariance).T
        return losses.recovery_likelihood(energy, data, x_neg).loss

    follow(loss, energy.parameters(), steps=200)
    assert_found(energy, PRECISION)


def test_energy_matching_after_the_flow():
    """Chains at temperature epsilon: the precision is that of exp(-E / epsilon). Without flow, trim and floor."""
    energy, data, z, epsilon = Quadratic(), gaussian(2000), standard(2000, generator=seeded(1)), 0.5
    settings = {"flow_weight": 0.0, "contrastive_weight": 1.0, "floor": None, "trim": 0.0}

    def loss():
        return losses.energy_matching(energy, data, samples(energy, z, epsilon), **settings).loss

    follow(loss, energy.parameters())
    assert_found(energy, epsilon * PRECISION, tolerance=0.003)


class Bumps(nn.Module):
    """An energy on the line whose slope is a sum of Gaussian bumps, with free heights."""

    def __init__(self, low: float, high: float, num: int):
        super().__init__()
        self.centres, self.width = torch.linspace(low, high, num, dtype=torch.float64), (high - low) / (num - 1)
        self.heights = nn.Parameter(torch.zeros(num, dtype=torch.float64))

    def forward(self, x):
        integrals = torch.erf((x - self.centres) / (2**0.5 * self.width)) * self.width * (math.pi / 2) ** 0.5
        return integrals @ self.heights


def test_equilibrium_matching_of_a_gaussian():
    """Its slope is the mean of -c(t) (x1 - x0) over what led to a state: in closed form at each t, then over t."""
    mean, std, energy = 1.5, 0.5, Bumps(-3.5, 3.5, 22)
    data = mean + std * standard(30_000, 1)

    def gradient(heights):
        with torch.no_grad():
            energy.heights.copy_(heights)
        loss = losses.equilibrium_matching(energy, data, generator=seeded(1)).loss
        return torch.autograd.grad(loss, energy.heights)[0]

    zero, units = torch.zeros_like(energy.heights), torch.eye(22, dtype=torch.float64)
    right = -gradient(zero)  # the loss is quadratic in the heights: its minimum is a linear system
    matrix = torch.stack([gradient(unit) + right for unit in units])
    with torch.no_grad():
        energy.heights.copy_(torch.linalg.lstsq(matrix, right, rcond=1e-6).solution)
    x = torch.linspace(-2, 2.5, 46, dtype=torch.float64)[:, None].requires_grad_(True)
    (slope,) = torch.autograd.grad(energy(x).sum(), x)
    x, t = x.detach(), (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    variance = t**2 * std**2 + (1 - t) ** 2
    velocity = mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)
    density = (-((x - t * mean) ** 2) / (2 * variance)).exp() / variance.sqrt()
    c = 4 * torch.minimum(torch.ones(()), 5 * (1 - t))
    expected, weight = -(density * c * velocity).sum(1) / density.sum(1), density.sum(1) / density.sum()
    error = (weight * (slope[:, 0] - expected).square()).sum().sqrt()
    assert error < 0.03 * (weight * expected.square()).sum().sqrt()


def exact_velocity(x, t):
    """That of the flow from N(0, I) to N(MEAN, COVARIANCE) with independent pairs: E[x1 - x0 | x_t = x], where x_t has
    mean t MEAN and covariance t^2 COVARIANCE + (1 - t)^2 I."""
    t = t[:, None, None]
    gain = (t * COVARIANCE - (1 - t) * IDENTITY) @ torch.linalg.inv(t**2 * COVARIANCE + (1 - t) ** 2 * IDENTITY)
    return MEAN + (gain @ (x - t[:, 0] * MEAN)[:, :, None])[:, :, 0]


FLOW = {"gradient_scale": 1.0, "decay_start": 1 - 1e-9}  # equilibrium matching by which -dE/dx is the flow's velocity


@pytest.mark.parametrize("field", [None, exact_velocity])
def test_a_quadratic_energy_of_a_flow_between_gaussians(field):
    """Least squares of -dE/dx = -P (x - mean) on the velocity over all times: P C + C P = I - COVARIANCE, where C is
    the covariance of x_t over t as well, since the flow's own velocity v has 2 cov(v, x_t) = d cov(x_t)/dt. Distilled
    from the exact velocity, or trained by data minus noise, the energy is the same."""
    energy = fitted(losses.equilibrium_matching, 40_000, field=field, **FLOW)
    covariance = (COVARIANCE + IDENTITY) / 3 + torch.outer(MEAN, MEAN) / 12
    precision = torch.from_numpy(solve_continuous_lyapunov(covariance.numpy(), (IDENTITY - COVARIANCE).numpy()))
    mean = MEAN / 2 + torch.linalg.solve(precision, MEAN)  # the mean over t of v is MEAN, and of x_t MEAN / 2
    assert (energy.precision - precision).norm() < 0.03 * precision.norm()
    x = gaussian(1000)
    slopes = [(x - centre) @ matrix for centre, matrix in ((energy.mean, energy.precision), (mean, precision))]
    assert (slopes[0] - slopes[1]).norm() < 0.03 * slopes[1].norm()


@pytest.mark.parametrize("loss", [losses.energy_matching, losses.equilibrium_matching])
def test_a_field_that_is_a_gradient_is_found_exactly(loss):
    """From a handful of data: whatever the states are, the residual of the right energy is 0."""
    settings = FLOW if loss is losses.equilibrium_matching else {}
    energy = fitted(loss, 20, field=lambda x, t: -(x - MEAN) @ PRECISION, **settings)
    assert_found(energy, PRECISION, tolerance=1e-5)


@pytest.mark.parametrize("loss", [losses.energy_matching, losses.equilibrium_matching])
def test_a_field_makes_the_gradient_vary_less(loss):
    """At the quadratic energy of the flow, over 300 batches of 8: the mean gradients agree within their errors, and the
    variance is less than half. A generator a datum keeps the pairs independent, as the exact velocity has them."""
    energy = fitted(losses.equilibrium_matching, 5_000, field=exact_velocity, **FLOW)
    weights = [energy.mean, energy.matrix]
    settings = FLOW if loss is losses.equilibrium_matching else {}
    factor = torch.linalg.cholesky(COVARIANCE)

    def gradient(number, field):
        data = MEAN + torch.randn(8, 2, dtype=torch.float64, generator=seeded(number)) @ factor.T
        noise = [seeded(10_000 + 8 * number + i) for i in range(8)]
        found = loss(energy, data, field=field, generator=noise, **settings).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(found, weights)])

    plain, distilled = (torch.stack([gradient(i, field) for i in range(300)]) for field in (None, exact_velocity))
    error = ((plain - distilled).var(0) / 300).sqrt()
    assert ((plain.mean(0) - distilled.mean(0)).abs() < 4 * error).all()
    assert distilled.var(0).sum() < 0.5 * plain.var(0).sum()


class TwoClasses(nn.Module):
    """E(x, y) = (x - mean_y)' precision (x - mean_y) / 2 + bias_y"""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Quadratic(), Quadratic()])
        with torch.no_grad():
            self.parts[1].mean.add_(2)

    def class_energies(self, x):
        return torch.stack([part(x) for part in self.parts], dim=1)


@pytest.mark.parametrize("joint", [False, True])
def test_jem(joint):
    """A quarter of the data in one class, the rest in another: both are found, and their shares."""
    means, shares = (MEAN, MEAN + 2), (250, 750)
    data = torch.cat([gaussian(n, mean) for n, mean in zip(shares, means, strict=True)])
    y_pos = torch.arange(2).repeat_interleave(torch.tensor(shares))
    energy, g = TwoClasses(), seeded(1)

    def loss():
        weights = torch.stack([-part.bias - part.precision.logdet() / 2 for part in energy.parts])
        counts = (weights.detach().softmax(0) * 1000).round().int().tolist()
        x_neg = torch.cat([samples(p, standard(n, generator=g)) for p, n in zip(energy.parts, counts, strict=True)])
        y_neg = torch.arange(2).repeat_interleave(torch.tensor(counts))
        return losses.joint_energy(energy, data, x_neg, y_pos=y_pos, y_neg=y_neg, joint=joint).loss

    follow(loss, energy.parameters(), steps=300)
    for part, mean in zip(energy.parts, means, strict=True):
        assert_found(part, PRECISION, mean)
    share = torch.stack([-part.bias - part.precision.logdet() / 2 for part in energy.parts]).softmax(0)[1].item()
    assert share == pytest.approx(0.75, abs=0.01)


def test_bounded_jem_of_known_negatives():
    """Against samples of a fixed density q: p(y | x) is that of the data, and exp(-E(x)) is p(x) / q(x)."""
    means, shares, centre = (MEAN, MEAN + 1.5), (5_000, 15_000), MEAN + 0.5
    data = torch.cat([gaussian(n, mean, generator=seeded(n)) for n, mean in zip(shares, means, strict=True)])
    y_pos, x_neg = torch.arange(2).repeat_interleave(torch.tensor(shares)), gaussian(20_000, centre, 2 * COVARIANCE)
    energy = TwoClasses()
    minimise(
        lambda: losses.joint_energy(energy, data, x_neg, y_pos=y_pos, bounded=True).loss, energy.parameters(), steps=150
    )

    def log_density(mean, covariance):
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(data)

    joint = torch.stack([math.log(n / 20_000) + log_density(m, COVARIANCE) for n, m in zip(shares, means, strict=True)])
    with torch.no_grad():
        found = -energy.class_energies(data).T + log_density(centre, 2 * COVARIANCE)
    assert (found.logsumexp(0) - joint.logsumexp(0)).abs().mean() < 0.05
    assert (found.softmax(0) - joint.softmax(0)).abs().mean() < 0.01
