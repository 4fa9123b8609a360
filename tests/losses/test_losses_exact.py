"""Every objective's value and gradient against its formula in closed form, or written out another way."""

import copy
import itertools
import math

import pytest
import torch
from gaussians import COVARIANCE, MEAN, Network, Quadratic, at, gaussian, seeded, standard
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ebm import losses
from ebm.config import LangevinConfig
from ebm.losses.contrastive import GaussianNoise, UniformNoise, log_distance
from ebm.losses.flow_matching import flow_loss, pairing
from ebm.losses.score_matching import spread_levels
from ebm.samplers import settings_of

PRECISION = torch.tensor([[1.5, 0.4], [0.4, 0.9]], dtype=torch.float64)
CENTRE = torch.tensor([0.2, 0.3], dtype=torch.float64)
IDENTITY = torch.eye(2, dtype=torch.float64)


def gradients(loss, module) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


# Improved contrastive divergence


def last_steps(energy, x, draws, step_size, noise_scale, grad_clamp, bounds, boundary):
    """Langevin steps through which gradients flow."""
    x = x.clone().requires_grad_(True)
    for z in draws:
        (slope,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        slope = slope if grad_clamp is None else torch.minimum(torch.maximum(slope, -grad_clamp), grad_clamp)
        x = x - step_size * slope + noise_scale * z
        if bounds is not None and boundary == "clamp":
            x = torch.minimum(torch.maximum(x, bounds[0]), bounds[1])
        elif bounds is not None:
            x = torch.where(x > bounds[1], 2 * bounds[1] - x, torch.where(x < bounds[0], 2 * bounds[0] - x, x))
    return x


@pytest.mark.parametrize(
    ("kl_steps", "grad_clamp", "bounds", "boundary"),
    [
        (1, None, None, "clamp"),
        (2, None, None, "clamp"),
        (1, 0.1, (-1.0, 0.9), "clamp"),
        (1, None, (-1.5, 1), "reflect"),
    ],
)
def test_improved_contrastive_divergence(kl_steps, grad_clamp, bounds, boundary):
    """With an energy whose weights move the chain and a copy of it that judges where the chain ends."""
    energy, x_pos, x_neg = Network(), normal(5, 2), normal(7, 2, seed=1)
    settings = {"step_size": 0.3, "noise_scale": 0.2, "grad_clamp": grad_clamp, "bounds": bounds, "boundary": boundary}
    weights = {"kl_weight": 0.7, "entropy_weight": 0.4, "l2": 0.05}
    output = losses.improved_contrastive_divergence(
        energy, x_pos, x_neg, kl_steps=kl_steps, generator=seeded(3), **settings, **weights
    )
    g = seeded(3)
    draws = [torch.randn(7, 2, dtype=torch.float64, generator=g) for _ in range(kl_steps)]
    limits = settings | {
        "grad_clamp": None if grad_clamp is None else torch.tensor(grad_clamp, dtype=torch.float64),
        "bounds": None if bounds is None else torch.tensor(bounds, dtype=torch.float64),
    }
    x = last_steps(energy, x_neg, draws, **limits)
    nearest = [min((x[i] - x[j]).norm() for j in range(7) if j != i) for i in range(7)]
    e_pos, e_neg, low = energy(x_pos), energy(x_neg), copy.deepcopy(energy)(x).mean()
    loss = e_pos.mean() - e_neg.mean() + 0.05 * (e_pos.square().mean() + e_neg.square().mean())
    loss = loss + 0.7 * low - 0.4 * torch.stack(nearest).log().mean()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    assert set(output.terms) == {"kl_energy", "entropy"}
    if bounds is not None:
        assert ((x - x_neg).abs() > 0).any() and x.min() >= bounds[0] and x.max() <= bounds[1]


def test_log_distances_are_the_entropy():
    """D times their mean + log(n - 1) + log volume of the unit ball + Euler's constant (Kozachenko & Leonenko)."""
    x = gaussian(4000)
    entropy = 2 * log_distance(x) + math.log(3999) + math.log(math.pi) + 0.5772156649
    assert entropy.item() == pytest.approx((2 * math.pi * math.e * COVARIANCE.det().sqrt()).log().item(), abs=0.05)


def test_neighbours_are_of_the_same_part():
    x = torch.tensor([[0.0], [3.0], [0.1], [5.0]], requires_grad=True)
    assert log_distance(x, parts=2).item() == pytest.approx((math.log(3) + math.log(4.9)) / 2)
    assert log_distance(x).item() == pytest.approx((math.log(0.1) + math.log(2)) / 2)
    with pytest.raises(ValueError, match="lower data\\.streams"):
        log_distance(x, parts=4)


def test_equal_chains_leave_the_gradient_finite():
    x = torch.zeros(3, 2, requires_grad=True)
    log_distance(x).backward()
    assert x.grad.isfinite().all()


# Score matching


def score_and_jacobian(energy, x, T):
    """(B, D) and (B, D, D), by Hessians, a datum at a time."""
    scores, jacobians = [], []
    for row in x:
        one = lambda r: energy(r[None])[0]  # noqa: E731
        scores.append(-torch.autograd.functional.jacobian(one, row, create_graph=True).flatten() / T)
        hessian = torch.autograd.functional.hessian(one, row, create_graph=True)
        jacobians.append(-hessian.reshape(row.numel(), row.numel()) / T)
    return torch.stack(scores), torch.stack(jacobians)


@pytest.mark.parametrize("T", [1.0, 0.5])
def test_exact_score_matching_of_a_network(T):
    energy, x = Network(), normal(6, 2)
    output = losses.implicit_score_matching(energy, x, temperature=T, l2=0.1)
    score, jacobian = score_and_jacobian(energy, x, T)
    loss = (score.square().sum(1) / 2 + jacobian.diagonal(dim1=1, dim2=2).sum(1)).mean()
    loss = loss + 0.1 * energy(x).square().mean()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    torch.testing.assert_close(output.e_pos, energy(x).detach().float())


def test_exact_score_matching_of_images():
    """Any shape, and a sum over its components: not a mean."""
    energy, x = Network(12), normal(3, 2, 3, 2)
    score, jacobian = score_and_jacobian(energy, x, 1.0)
    loss = (score.square().sum(1) / 2 + jacobian.diagonal(dim1=1, dim2=2).sum(1)).mean()
    torch.testing.assert_close(losses.implicit_score_matching(energy, x).loss, loss)


def test_score_matching_of_a_gaussian():
    """Hyvarinen (2005), eq. 13: tr(P^2 S) / 2 - tr P, with S the second moment about the model's mean."""
    energy, x = at(CENTRE, PRECISION), gaussian(50)
    loss = losses.implicit_score_matching(energy, x).loss
    shift = MEAN - CENTRE
    second = COVARIANCE + torch.outer(shift, shift)
    torch.testing.assert_close(loss, (PRECISION @ PRECISION @ second).trace() / 2 - PRECISION.trace())
    found = torch.autograd.grad(loss, [energy.matrix, energy.mean])
    torch.testing.assert_close(found[0], (PRECISION @ second + second @ PRECISION) / 2 - IDENTITY)
    torch.testing.assert_close(found[1], -PRECISION @ PRECISION @ shift)


@pytest.mark.parametrize("T", [1.0, 0.5])
@pytest.mark.parametrize("method", ["hutchinson", "sliced", "sliced_plain"])
def test_projections(method, T):
    """The same directions, by Hessians."""
    energy, x = Network(), normal(6, 2)
    if method == "hutchinson":
        output = losses.implicit_score_matching(
            energy, x, trace="hutchinson", num_projections=3, temperature=T, generator=seeded(2)
        )
        v = torch.empty(6, 3, 2, dtype=torch.float64).uniform_(-1, 1, generator=seeded(2)).sign()
    else:
        output = losses.sliced_score_matching(
            energy, x, num_projections=3, variance_reduction=method == "sliced", temperature=T, generator=seeded(2)
        )
        v = normal(6, 3, 2, seed=2)
    score, jacobian = score_and_jacobian(energy, x, T)
    squared = score.square().sum(1)
    if method == "sliced_plain":
        squared = torch.einsum("bmi,bi->bm", v, score).square().mean(1)
    loss = (squared / 2 + torch.einsum("bmi,bij,bmj->bm", v, jacobian, v).mean(1)).mean()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    assert set(output.terms) == {"score_squared", "trace"}


def test_signs_estimate_a_diagonal_without_error():
    """The trace of a diagonal Hessian is v' H v for every v of signs, and for no other."""
    energy, x = at(CENTRE, torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))), normal(4, 2)
    exact = losses.implicit_score_matching(energy, x).loss
    torch.testing.assert_close(losses.implicit_score_matching(energy, x, trace="hutchinson").loss, exact)


def test_energies_without_second_derivatives_are_refused():
    class Rectified(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1))

        def forward(self, x):
            return self.net(x)[:, 0]

    x = torch.randn(3, 2, generator=seeded())
    for loss in (losses.implicit_score_matching, losses.sliced_score_matching):
        with pytest.raises(ValueError, match=r"net\.1 is a LeakyReLU.*SiLU or nn\.Softplus, or loss\.kind=denoising"):
            loss(Rectified(nn.LeakyReLU(0.2)), x)
        loss(Rectified(nn.Softplus()), x)
    losses.denoising_score_matching(Rectified(nn.LeakyReLU(0.2)), x, sigma=0.1)
    with pytest.raises(ValueError, match="'exact' or 'hutchinson'"):
        losses.implicit_score_matching(Rectified(nn.SiLU()), x, trace="approx")


def test_a_linear_energy_has_a_trace_of_zero():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert losses.implicit_score_matching(lambda x: x @ w, torch.ones(3, 2)).loss.item() == 2.5


# Denoising score matching


@pytest.mark.parametrize("T", [1.0, 0.5])
def test_denoising_of_a_network(T):
    """sigma**2 |s - the score of N(x, sigma**2) at the noisy datum|**2 / 2."""
    energy, x, sigma = Network(), normal(9, 2), 0.4
    output = losses.denoising_score_matching(energy, x, sigma=sigma, temperature=T, l2=0.1, generator=seeded(5))
    noisy = x + sigma * normal(9, 2, seed=5)
    score, _ = score_and_jacobian(energy, noisy, T)
    loss = (sigma**2 * (score - (x - noisy) / sigma**2).square()).sum(1).mean() / 2
    loss = loss + 0.1 * energy(noisy).square().mean()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    torch.testing.assert_close(output.e_pos, energy(noisy).detach().float())


@pytest.mark.parametrize("T", [1.0, 0.5])
def test_multilevel_denoising_of_a_network(T):
    """sigma**4 / sigma_i**2 |s - (x - noisy) / sigma**2|**2 / 2: the target has one variance at every level."""
    energy, x, sigma, low, high = Network(), normal(9, 2), 0.4, 0.2, 1.5
    settings = {"sigma": sigma, "sigma_min": low, "sigma_max": high, "temperature": T, "l2": 0.1}
    output = losses.multilevel_denoising(energy, x, generator=seeded(5), **settings)
    g = seeded(5)
    z = torch.randn(9, 2, dtype=torch.float64, generator=g)
    u = torch.empty(9, dtype=torch.float64).uniform_(generator=g).tolist()
    levels = [low ** (1 - (i + u[i]) / 9) * high ** ((i + u[i]) / 9) for i in range(9)]
    level = torch.tensor(levels, dtype=torch.float64)[:, None]
    noisy = x + level * z
    score, _ = score_and_jacobian(energy, noisy, T)
    loss = (sigma**4 / level**2 * (score - (x - noisy) / sigma**2).square()).sum(1).mean() / 2
    loss = loss + 0.1 * energy(noisy).square().mean()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    torch.testing.assert_close(output.e_pos, energy(noisy).detach().float())


def test_multilevel_denoising_at_one_level_is_denoising():
    energy, x = Network(), normal(9, 2)
    one = losses.multilevel_denoising(energy, x, sigma=0.4, sigma_min=0.4, sigma_max=0.4, generator=seeded(5))
    torch.testing.assert_close(
        one.loss, losses.denoising_score_matching(energy, x, sigma=0.4, generator=seeded(5)).loss
    )


def test_levels_are_spread_in_the_logarithm():
    """One in each of n equal intervals of the logarithm, in every part."""
    levels = spread_levels(normal(12, 2), 0.1, 10.0, [seeded(1), seeded(2)]).log10()
    for part, seed in zip(levels.split(6), (1, 2), strict=True):
        u = torch.empty(6, dtype=torch.float64).uniform_(generator=seeded(seed))
        torch.testing.assert_close(part, -1 + 2 * (torch.arange(6) + u) / 6)


def test_denoising_of_a_gaussian():
    """Its mean over the noise: (sigma^2 tr(P^2 (S + sigma^2)) - 2 sigma^2 tr P + D) / 2."""
    sigma, shift = 0.5, MEAN - CENTRE
    loss = losses.denoising_score_matching(at(CENTRE, PRECISION), gaussian(400_000), sigma=sigma, generator=seeded(1))
    second = COVARIANCE + torch.outer(shift, shift) + sigma**2 * IDENTITY
    expected = sigma**2 * ((PRECISION @ PRECISION @ second).trace() - 2 * PRECISION.trace()) + 2
    assert loss.loss.item() == pytest.approx(expected.item() / 2, rel=0.01)


# Noise contrastive estimation


@pytest.mark.parametrize(
    ("noise", "density"),
    [
        (GaussianNoise(0.3, 0.7), torch.distributions.Normal(0.3, 0.7)),
        (UniformNoise(-2.0, 3.0), torch.distributions.Uniform(-2, 3)),
        (
            GaussianNoise(torch.tensor([0.5, 1.0, 0.0, 0.2]), torch.tensor([0.1, 0.2, 2.0, 1.0])),
            torch.distributions.Normal(torch.tensor([0.5, 1.0, 0.0, 0.2]), torch.tensor([0.1, 0.2, 2.0, 1.0])),
        ),
    ],
)
def test_noise_has_its_density(noise, density):
    x = noise.draw_(torch.empty(5000, 3, 4, dtype=torch.float64), seeded(1))
    torch.testing.assert_close(noise.log_density(x), density.log_prob(x).flatten(1).sum(1), check_dtype=False)
    torch.testing.assert_close(x.mean(), density.mean.mean().double(), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0).mean(), density.stddev.mean().double(), rtol=0.02, atol=0)


def test_uniform_noise_has_no_density_outside():
    assert UniformNoise(-1, 1).log_density(torch.tensor([[0.0, 2.0]])).item() == -math.inf


def test_noise_contrastive_estimation_is_logistic_regression():
    energy, x, noise, log_z = Network(), normal(6, 2), GaussianNoise(0.1, 1.3), torch.tensor(0.4)
    log_z = log_z.double().requires_grad_(True)
    output = losses.noise_contrastive(
        energy, x, noise=noise, ratio=3, log_normaliser=log_z, l2=0.1, generator=seeded(4)
    )
    x_noise = normal(18, 2, seed=4) * 1.3 + 0.1
    both = torch.cat([x, x_noise])
    log_noise = torch.distributions.Normal(0.1, 1.3).log_prob(both).sum(1)
    odds = -energy(both) - log_z - log_noise - math.log(3)
    labels = (torch.arange(24) < 6).double()
    loss = binary_cross_entropy_with_logits(odds, labels, reduction="sum") / 6
    loss = loss + 0.1 * (energy(x).square().mean() + energy(x_noise).square().mean())
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    found = torch.autograd.grad(output.loss, log_z)
    torch.testing.assert_close(found, torch.autograd.grad(loss, log_z))
    assert output.terms["accuracy"].item() == pytest.approx(((odds > 0) == (labels > 0)).double().mean().item())
    assert (len(output.e_pos), len(output.e_neg)) == (6, 18)


# Energy discrepancy


@pytest.mark.parametrize("stabiliser", [0.0, 1.0, 2.5])
def test_energy_discrepancy_written_out(stabiliser):
    energy, x, g, M, t = Network(), normal(4, 2), seeded(6), 3, 0.3
    output = losses.energy_discrepancy(
        energy, x, time=t, num_samples=M, stabiliser=stabiliser, l2=0.1, generator=seeded(6)
    )
    common = torch.randn(4, 2, dtype=torch.float64, generator=g)
    own = torch.randn(4, M, 2, dtype=torch.float64, generator=g)
    loss, squares = 0, []
    for i in range(4):
        total = stabiliser / M
        for j in range(M):
            e = energy((x[i] + math.sqrt(t) * common[i] + math.sqrt(t) * own[i, j])[None])[0]
            squares.append(e.square())
            total = total + (energy(x[i : i + 1])[0] - e).exp() / M
        loss = loss + total.log() / 4
    loss = loss + 0.1 * (energy(x).square().mean() + torch.stack(squares).mean())
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    assert (len(output.e_pos), len(output.e_neg)) == (4, 12)


def test_energy_discrepancy_of_a_gaussian():
    """With many draws: mean E(x) - mean E_t(y), y = x + sqrt(t) z, exp(-E_t) being exp(-E) convolved with N(0, t)."""
    t, shift = 0.4, MEAN - CENTRE
    output = losses.energy_discrepancy(
        at(CENTRE, PRECISION), gaussian(20_000), time=t, num_samples=100, stabiliser=0, generator=seeded(1)
    )
    second = COVARIANCE + torch.outer(shift, shift)
    wide = torch.linalg.inv(torch.linalg.inv(PRECISION) + t * IDENTITY)
    e = (PRECISION @ second).trace() / 2
    e_t = (wide @ (second + t * IDENTITY)).trace() / 2 + (IDENTITY + t * PRECISION).logdet() / 2
    assert output.loss.item() == pytest.approx((e - e_t).item(), abs=0.015)


# Recovery likelihood


def test_tilted_energy_is_that_of_the_posterior():
    """p(x | noisy x) is Gaussian, with precision P + 1 / sigma^2, and so are the tilted energy's differences."""
    sigma, x, centre = 0.6, normal(5, 2), normal(5, 2, seed=1)
    tilted = losses.tilted(at(CENTRE, PRECISION), sigma)
    precision = PRECISION + IDENTITY / sigma**2
    for i in range(5):
        mean = torch.linalg.solve(precision, PRECISION @ CENTRE + centre[i] / sigma**2)
        posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
        differences = tilted(x, centre[i].expand(5, 2)) + posterior.log_prob(x)
        torch.testing.assert_close(differences, differences[0].expand(5))


def test_noisy_copies():
    x = normal(50_000, 2)
    added = losses.noisy(x, 0.3, seeded(1)) - x
    torch.testing.assert_close(added, 0.3 * normal(50_000, 2, seed=1))


def test_recovery_likelihood_is_the_gradient_of_the_posterior():
    """At samples of the posterior of each datum's noisy copy, the gradient of mean -log p(x | noisy x)."""
    energy, sigma, num = at(CENTRE, PRECISION), 0.6, 200_000
    x = gaussian(num)
    centre = losses.noisy(x, sigma, seeded(1))

    def moments():
        precision = energy.precision + IDENTITY / sigma**2
        return torch.linalg.inv(precision), (energy.precision @ energy.mean + centre / sigma**2)

    covariance, right = moments()
    offset = x - right @ covariance
    nll = ((offset @ torch.linalg.inv(covariance)) * offset).sum(1).mean() / 2 + covariance.logdet() / 2
    expected = gradients(nll, energy)
    factor = torch.linalg.cholesky(covariance).detach()
    x_neg = (right @ covariance).detach() + standard(num, generator=seeded(2)) @ factor.T
    found = gradients(losses.recovery_likelihood(energy, x, x_neg).loss, energy)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_recovery_likelihood_has_the_l2_term():
    energy, x_pos, x_neg = Network(), normal(5, 2), normal(4, 2, seed=1)
    e_pos, e_neg = energy(x_pos), energy(x_neg)
    loss = e_pos.mean() - e_neg.mean() + 0.2 * (e_pos.square().mean() + e_neg.square().mean())
    torch.testing.assert_close(losses.recovery_likelihood(energy, x_pos, x_neg, l2=0.2).loss, loss)


# Energy matching


def test_pairs_are_the_cheapest():
    x0, x1 = normal(8, 3), normal(8, 3, seed=1)
    found = pairing(x0, x1, parts=2)
    for part in (slice(0, 4), slice(4, 8)):
        a, b = x0[part], x1[part]
        best = min(itertools.permutations(range(4)), key=lambda order: (a[list(order)] - b).square().sum().item())
        assert (found[part] - part.start).tolist() == list(best)


def on_the_way(x1):
    """The noise, times and states that `flow_loss` draws from `seeded(7)`."""
    g = seeded(7)
    x0, t = torch.randn(6, 2, dtype=torch.float64, generator=g), torch.empty(6, dtype=torch.float64)
    t.uniform_(generator=g)
    x0 = x0[pairing(x0, x1)]
    return x0, t, (1 - t[:, None]) * x0 + t[:, None] * x1


def test_flow_loss_written_out():
    energy, x1 = Network(), normal(6, 2)
    x0, _, x_t = on_the_way(x1)
    score, _ = score_and_jacobian(energy, x_t, 1.0)
    loss = (score - (x1 - x0)).square().sum(1).mean() / 2  # over the two components
    found = flow_loss(energy, x1, generator=seeded(7))
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(gradients(found, energy), gradients(loss, energy))
    output = losses.energy_matching(energy, x1, flow_weight=3.0, generator=seeded(7))
    torch.testing.assert_close(output.loss, 3 * loss)
    assert set(output.terms) == {"flow"}


def turning(x, t):
    """A velocity that depends on the time, and is no gradient."""
    return (1 + t[:, None]) * x @ torch.tensor([[0.3, -0.8], [0.5, 0.2]], dtype=x.dtype) - t[:, None] ** 2


def test_flow_loss_of_a_field_written_out():
    """The velocity at the same states and times takes the place of data minus noise, while there are no chains."""
    energy, x1, x_neg = Network(), normal(6, 2), normal(6, 2, seed=1)
    _, t, x_t = on_the_way(x1)
    score, _ = score_and_jacobian(energy, x_t, 1.0)
    loss = (score - turning(x_t, t)).square().sum(1).mean() / 2
    found = flow_loss(energy, x1, generator=seeded(7), field=turning)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(gradients(found, energy), gradients(loss, energy))
    first = losses.energy_matching(energy, x1, flow_weight=3.0, field=turning, generator=seeded(7))
    torch.testing.assert_close(first.loss, 3 * loss)
    later = losses.energy_matching(energy, x1, x_neg, field=turning, generator=seeded(7))
    torch.testing.assert_close(later.terms["flow"], flow_loss(energy, x1, generator=seeded(7)).detach().float())


def test_contrast_of_energy_matching():
    """By parts: the highest chains are left out, and the count stops at the floor."""
    x_pos, x_neg = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([[9.0], [1.0], [2.0], [7.0]])
    w = torch.tensor([2.0], requires_grad=True)
    settings = {"flow_weight": 0.0, "contrastive_weight": 0.1, "trim": 0.4, "l2": 0.01}

    def contrast(floor, generator=None):
        return losses.energy_matching(lambda x: x @ w, x_pos, x_neg, floor=floor, generator=generator, **settings)

    squares = 0.01 * 4 * (30 / 4 + (81 + 1 + 4 + 49) / 4)
    assert contrast(None).loss.item() == pytest.approx(0.1 * 2 * (2.5 - 1.5) + squares)  # 2 of 4 left out
    parts = (1.5 - 1, 3.5 - 2)  # .4 of 2 chains, rounded, is one
    assert contrast(None, [seeded(), seeded()]).loss.item() == pytest.approx(0.1 * 2 * sum(parts) / 2 + squares)


def test_the_contrast_has_data_of_its_own():
    """The second half of each part, and the flow the first: their sum is that of the halves by themselves."""
    energy, x_pos, x_neg = Network(), normal(8, 2), normal(8, 2, seed=1)
    settings = {"flow_weight": 2.0, "contrastive_weight": 0.5, "trim": 0.0, "floor": None}
    found = losses.energy_matching(
        energy, x_pos, x_neg, separate_batch=True, generator=[seeded(7), seeded(8)], **settings
    )
    first, second = x_pos[[0, 1, 4, 5]], x_pos[[2, 3, 6, 7]]
    flow = flow_loss(energy, first, generator=[seeded(7), seeded(8)])
    contrast = 0.5 * (energy(second).mean() - energy(x_neg).mean())
    torch.testing.assert_close(found.loss, 2 * flow + contrast)
    torch.testing.assert_close(found.e_pos, energy(second).detach().float())
    whole = losses.energy_matching(energy, x_pos, separate_batch=True, generator=seeded(7), **settings)
    torch.testing.assert_close(whole.loss, 2 * flow_loss(energy, x_pos, generator=seeded(7)))  # no chains yet


def test_floor_ends_the_gradient():
    w, x_pos, x_neg = torch.tensor([2.0], requires_grad=True), torch.ones(2, 1), 2 * torch.ones(2, 1)
    settings = {"flow_weight": 0.0, "contrastive_weight": 0.1, "trim": 0.0}
    above = losses.energy_matching(lambda x: x @ w, x_pos, x_neg, floor=0.3, **settings)
    assert above.loss.item() == pytest.approx(-0.2) and above.terms["contrast"].item() == pytest.approx(-0.2)
    assert torch.autograd.grad(above.loss, w)[0].item() == pytest.approx(-0.1)
    below = losses.energy_matching(lambda x: x @ w, x_pos, x_neg, floor=0.15, **settings).loss
    assert below.item() == pytest.approx(-0.15)
    assert torch.autograd.grad(below, w)[0].item() == 0


def test_equilibrium_matching_written_out():
    energy, x1, g = Network(), normal(6, 2), seeded(7)
    x0 = torch.randn(6, 2, dtype=torch.float64, generator=g)
    t = torch.empty(6, dtype=torch.float64).uniform_(generator=g)
    x_t = (1 - t[:, None]) * x0 + t[:, None] * x1
    c = torch.tensor([3.0 if time < 0.6 else 3.0 * (1 - time) / 0.4 for time in t.tolist()], dtype=torch.float64)
    assert 0 < (c < 3).sum() < 6
    score, _ = score_and_jacobian(energy, x_t, 1.0)
    loss = (score - c[:, None] * (x1 - x0)).square().sum(1).mean() / 2  # over the two components
    loss = loss + 0.1 * energy(x_t).square().mean()
    output = losses.equilibrium_matching(energy, x1, gradient_scale=3.0, decay_start=0.6, l2=0.1, generator=seeded(7))
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    assert (output.e_pos, output.e_neg, output.terms) == (None, None, {})
    distilled = (score - c[:, None] * turning(x_t, t)).square().sum(1).mean() / 2
    found = losses.equilibrium_matching(
        energy, x1, gradient_scale=3.0, decay_start=0.6, field=turning, generator=seeded(7)
    ).loss
    torch.testing.assert_close(found, distilled)
    torch.testing.assert_close(gradients(found, energy), gradients(distilled, energy))


def test_noise_of_the_flow_s_chain():
    """None before flow_end, then a temperature that rises to its value at time 1 (Balcerak et al. 2025, eq. 10)."""
    config = LangevinConfig(
        start="normal", schedule="flow", flow_end=0.8, temperature=0.5, step_size=0.1, num_steps=12, bounds=None
    )
    noise = settings_of(config)["noise_scale"]
    expected = [math.sqrt(2 * 0.1 * t) for t in (0.25, 0.5, 0.5)]
    assert noise == pytest.approx([0] * 9 + expected)


# JEM


class ClassEnergies(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Network(2, seed) for seed in range(3)])

    def class_energies(self, x):
        return torch.stack([part(x) for part in self.parts], dim=1)


@pytest.mark.parametrize(("joint", "bounded"), [(False, False), (True, False), (False, True), (True, True)])
def test_jem_written_out(joint, bounded):
    energy, x_pos, x_neg = ClassEnergies(), normal(5, 2), normal(4, 2, seed=1)
    y_pos, y_neg = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([2, 2, 0, 1])
    settings = {"contrastive_weight": 0.6, "l2": 0.1, "bounded": bounded}
    output = losses.joint_energy(energy, x_pos, x_neg, y_pos=y_pos, y_neg=y_neg, joint=joint, **settings)
    weights_pos, weights_neg = ((-energy.class_energies(x)).exp() for x in (x_pos, x_neg))
    chosen_pos, chosen_neg = weights_pos[range(5), y_pos], weights_neg[range(4), y_neg]
    classification = -(chosen_pos / weights_pos.sum(1)).log().mean()
    e_pos, e_neg = -weights_pos.sum(1).log(), -weights_neg.sum(1).log()
    if joint:
        e_pos, e_neg = -chosen_pos.log(), -chosen_neg.log()
    contrast = e_pos.mean() - e_neg.mean()
    if bounded:
        contrast = -(1 / (1 + e_pos.exp())).log().mean() - (1 - 1 / (1 + e_neg.exp())).log().mean()
    loss = classification + 0.6 * contrast
    loss = loss + 0.1 * (e_pos.square().mean() + e_neg.square().mean())
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(gradients(output.loss, energy), gradients(loss, energy))
    torch.testing.assert_close(output.terms["cross_entropy"], classification.detach().float())
    right = (weights_pos.argmax(1) == y_pos).float().mean()
    assert output.terms["accuracy"] == right
    if not joint:
        torch.testing.assert_close(losses.marginal(energy)(x_neg), e_neg)


# Regularisers


def test_energy_l2():
    assert losses.energy_l2(torch.tensor([1.0, 3.0]), torch.tensor([2.0])).item() == 5 + 4


def test_gradient_penalty_of_a_gaussian():
    """mean |P (x - m)|^2 / 2 = tr(P^2 S) / 2."""
    energy, shift = at(CENTRE, PRECISION), MEAN - CENTRE
    penalty = losses.gradient_penalty(energy, gaussian(50))
    second = COVARIANCE + torch.outer(shift, shift)
    torch.testing.assert_close(penalty, (PRECISION @ PRECISION @ second).trace() / 2)
    (found,) = torch.autograd.grad(penalty, energy.mean)
    torch.testing.assert_close(found, -PRECISION @ PRECISION @ shift)


def test_interpolates_lie_between():
    x_pos, x_neg = torch.ones(1000, 1, 2), torch.zeros(1000, 1, 2)
    x = losses.interpolate(x_pos, x_neg, seeded(1))
    assert torch.equal(x[:, 0, 0], x[:, 0, 1]) and x.min() > 0 and x.max() < 1
    torch.testing.assert_close(x[:, 0, 0], torch.empty(1000).uniform_(generator=seeded(1)))


def test_quadratic_starts_away_from_the_data():
    """Else the tests of what is found would show nothing."""
    start = Quadratic()
    assert (start.mean - MEAN).abs().max() > 0.1
    assert (start.precision - torch.linalg.inv(COVARIANCE)).norm() > 0.5
