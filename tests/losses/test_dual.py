"""Dual score matching: its formula, and a mixture in 1,000 dimensions whose energy is known at every level of noise."""

import math

import pytest
import torch
from gaussians import Network, seeded
from torch import nn

from ebm import losses
from ebm.energies import split_noise_level, with_noise_level
from ebm.losses.score_matching import dual_terms

DIM, VARIANCES, SHARES = 1000, torch.tensor([0.25, 4.0]), torch.tensor([0.4, 0.6])


class LevelNetwork(nn.Module):
    """E(x, t) of states in two dimensions that carry log t, in float64."""

    def __init__(self):
        super().__init__()
        self.net = Network(3)

    def forward(self, states):
        return self.net(states)


def test_dual_score_matching_written_out():
    """mean_D (denoised - x)**2 / t + ((1 - mean_D (y - x)**2 / t) / 2 - (t / D) dE/dt)**2 of each datum."""
    energy, log_variances = LevelNetwork(), (-2.0, 1.0)
    x = torch.randn(6, 2, dtype=torch.float64, generator=seeded())
    e, score, change = dual_terms(energy, x, log_variances, generator=seeded(1))
    g = seeded(1)
    levels = torch.empty(6, dtype=torch.float64).uniform_(*log_variances, generator=g)
    z = torch.randn(6, 2, dtype=torch.float64, generator=g)
    values, scores, changes = [], [], []
    for x_i, z_i, t in zip(x, z, levels.exp(), strict=True):
        y = x_i + t.sqrt() * z_i

        def at(y, t):
            return energy(torch.cat([y, t.log()[None]])[None])[0]

        of_both = torch.autograd.functional.jacobian(at, (y, t), create_graph=True)
        denoised = y - t * of_both[0]
        values.append(at(y, t))
        scores.append((denoised - x_i).square().mean() / t)
        changes.append(((1 - (y - x_i).square().mean() / t) / 2 - t / 2 * of_both[1]) ** 2)
    torch.testing.assert_close(e, torch.stack(values))
    torch.testing.assert_close(score, torch.stack(scores).mean())
    torch.testing.assert_close(change, torch.stack(changes).mean())
    weights = list(energy.parameters())
    for term, each in ((score, scores), (change, changes)):
        found = torch.autograd.grad(term, weights, retain_graph=True, materialize_grads=True)
        expected = torch.autograd.grad(torch.stack(each).mean(), weights, retain_graph=True, materialize_grads=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def mixture(num, generator):
    which = (torch.rand(num, generator=generator) < SHARES[1]).long()
    return VARIANCES[which].sqrt()[:, None] * torch.randn(num, DIM, generator=generator)


def minus_log_density(x, t):
    """-log p_t of the noisy mixture."""
    variances = VARIANCES + t[:, None]
    log_p = -x.square().sum(1)[:, None] / (2 * variances) - DIM / 2 * (2 * math.pi * variances).log()
    return -torch.logsumexp(SHARES.log() + log_p, dim=1)


class Radial(nn.Module):
    """Any smooth function of |x|**2 and t, of states that carry log t."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, states):
        x, log_t = split_noise_level(states)
        inputs = torch.stack([x.square().mean(1).log(), log_t], dim=1)
        return DIM * self.net(inputs / 2).squeeze(1)


def test_dual_score_matching_of_a_mixture_in_1000_dimensions():
    """-log p_t to 1 % of its range at every t, and its normaliser to .01 nats a dimension, by a network that knows of
    neither."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = Radial()
    g, steps, (t_min, t_max) = seeded(1), 500, (0.03, 100.0)
    optimizer = torch.optim.Adam(energy.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        _, score, change = dual_terms(energy, mixture(64, g), (math.log(t_min), math.log(t_max)), generator=g)
        (score + change).backward()
        optimizer.step()
    x, errors, values = mixture(512, g), {}, []
    constant = losses.log_normaliser(energy, x, t_max, generator=g)
    for t in (t_min, 0.3, 3.0, t_max):
        level = torch.full((512,), t)
        y = x + math.sqrt(t) * torch.randn(512, DIM, generator=g)
        values.append(minus_log_density(y, level) / DIM)
        errors[t] = (energy(with_noise_level(y, level.log())) + constant).detach() / DIM - values[-1]
    values = torch.cat(values)
    assert max(error.abs().max() for error in errors.values()) < 0.01 * (values.max() - values.min())
    assert all(error.mean().abs() < 0.01 for error in errors.values()), errors


def test_normaliser_of_a_known_energy():
    """Of Gaussian data with a mean: exact at any t_max."""
    x = 3 + 2 * torch.randn(512, DIM, generator=seeded(1))

    def energy(states):
        y, log_t = split_noise_level(states)
        variance = 4 + log_t.exp()
        return (y - 3).square().sum(1) / (2 * variance) + DIM / 2 * (2 * math.pi * variance).log() + 7

    constant = losses.log_normaliser(energy, x, 10.0, generator=seeded(2))
    assert constant.item() == pytest.approx(-7, abs=2)  # of a thousand dimensions, whose mean is estimated


def test_normaliser_of_a_known_mixture():
    """Nearly Gaussian at a t_max far above the data's variances."""

    def energy(states):
        y, log_t = split_noise_level(states)
        return minus_log_density(y, log_t.exp()) + 7

    constant = losses.log_normaliser(energy, mixture(512, seeded(1)), 1e3, generator=seeded(2))
    assert constant.item() == pytest.approx(-7, abs=0.1)


def test_labels_reach_the_energy():
    y, seen = torch.arange(6), []

    def energy(states, labels):
        seen.append(labels)
        return states.square().sum(1)

    dual_terms(energy, torch.ones(6, 2), (-1.0, 1.0), y)
    losses.log_normaliser(energy, torch.ones(6, 2), 1.0, y_pos=y)
    assert all(torch.equal(labels, y) for labels in seen) and len(seen) == 2
