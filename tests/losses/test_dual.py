"""Dual score matching: its formula, and a mixture in 1,000 dimensions whose energy is known at every level of noise."""

import math

import pytest
import torch
from gaussians import Network, seeded
from test_losses_device import HostTraffic
from torch import nn

from ebm import losses
from ebm.losses.score_matching import spread_levels

DIM, VARIANCES, SHARES = 1000, torch.tensor([0.25, 4.0]), torch.tensor([0.4, 0.6])


class LevelNetwork(nn.Module):
    """U(x, t) of states in two dimensions, in float64."""

    def __init__(self):
        super().__init__()
        self.net = Network(3)

    def forward(self, x, t):
        return self.net(torch.cat([x, t[:, None].log()], dim=1))


def test_dual_score_matching_written_out():
    """mean_D (denoised - x)**2 / t + ((1 - mean_D (y - x)**2 / t) / 2 - (t / D) dU/dt)**2 of each datum."""
    energy = LevelNetwork()
    x = torch.randn(6, 2, dtype=torch.float64, generator=seeded())
    output = losses.dual_score_matching(energy, x, t_min=0.1, t_max=3.0, generator=seeded(1))
    g = seeded(1)
    z = torch.randn(6, 2, dtype=torch.float64, generator=g)
    space, time = [], []
    for x_i, z_i, t in zip(x, z, spread_levels(x, 0.1, 3.0, g), strict=True):
        y = x_i + t.sqrt() * z_i
        of_both = torch.autograd.functional.jacobian(
            lambda a, b: energy(a[None], b[None])[0], (y, t), create_graph=True
        )
        denoised = y - t * of_both[0]
        space.append((denoised - x_i).square().mean() / t)
        time.append(((1 - (y - x_i).square().mean() / t) / 2 - t / 2 * of_both[1]) ** 2)
    loss = (torch.stack(space) + torch.stack(time)).mean()
    torch.testing.assert_close(output.loss, loss)
    found, expected = (torch.autograd.grad(value, list(energy.parameters()), materialize_grads=True)
                       for value in (output.loss, loss))  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(output.terms["space"], torch.stack(space).mean().detach().float())
    torch.testing.assert_close(output.terms["time"], torch.stack(time).mean().detach().float())


def mixture(num, generator):
    which = (torch.rand(num, generator=generator) < SHARES[1]).long()
    return VARIANCES[which].sqrt()[:, None] * torch.randn(num, DIM, generator=generator)


def minus_log_density(x, t):
    """-log p_t of the noisy mixture."""
    variances = VARIANCES + t[:, None]
    log_p = -x.square().sum(1)[:, None] / (2 * variances) - DIM / 2 * (2 * math.pi * variances).log()
    return -torch.logsumexp(SHARES.log() + log_p, dim=1)


class Radial(nn.Module):
    """Any smooth function of |x|**2 and t."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, t):
        inputs = torch.stack([x.square().mean(1).log(), t.log()], dim=1)
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
        x = mixture(64, g)
        losses.dual_score_matching(energy, x, t_min=t_min, t_max=t_max, generator=g).loss.backward()
        optimizer.step()
    x, errors, values = mixture(512, g), {}, []
    constant = losses.log_normaliser(energy, x, t_max, generator=g)
    for t in (t_min, 0.3, 3.0, t_max):
        level = torch.full((512,), t)
        y = x + math.sqrt(t) * torch.randn(512, DIM, generator=g)
        values.append(minus_log_density(y, level) / DIM)
        errors[t] = (energy(y, level) + constant).detach() / DIM - values[-1]
    values = torch.cat(values)
    assert max(error.abs().max() for error in errors.values()) < 0.01 * (values.max() - values.min())
    assert all(error.mean().abs() < 0.01 for error in errors.values()), errors


def test_normaliser_of_a_known_energy():
    """Of Gaussian data with a mean: exact at any t_max."""
    x = 3 + 2 * torch.randn(512, DIM, generator=seeded(1))

    def energy(y, t):
        return (y - 3).square().sum(1) / (2 * (4 + t)) + DIM / 2 * (2 * math.pi * (4 + t)).log() + 7

    constant = losses.log_normaliser(energy, x, 10.0, generator=seeded(2))
    assert constant.item() == pytest.approx(-7, abs=2)  # of a thousand dimensions, whose mean is estimated


def test_normaliser_of_a_known_mixture():
    """Nearly Gaussian at a t_max far above the data's variances."""
    x, g = mixture(512, seeded(1)), seeded(2)
    constant = losses.log_normaliser(lambda y, t: minus_log_density(y, t) + 7, x, 1e3, generator=g)
    assert constant.item() == pytest.approx(-7, abs=0.1)


def test_labels_reach_the_energy():
    y, seen = torch.arange(6), []

    def energy(x, t, labels):
        seen.append(labels)
        return x.square().sum(1) * t

    x = torch.ones(6, 2)
    losses.dual_score_matching(energy, x, t_min=0.1, t_max=1.0, y_pos=y)
    losses.log_normaliser(energy, x, 1.0, y_pos=y)
    assert all(torch.equal(labels, y) for labels in seen) and len(seen) == 2


def test_no_float16_and_no_traffic_with_the_host():
    class Single(LevelNetwork):
        def forward(self, x, t):
            assert not torch.is_autocast_enabled("cpu")
            return super().forward(x, t)

    energy, x = Single().float(), torch.ones(6, 2)
    with torch.autocast("cpu", torch.float16), HostTraffic() as traffic:
        output = losses.dual_score_matching(energy, x, t_min=0.1, t_max=1.0, generator=[seeded(1), seeded(2)])
    assert output.loss.dtype == torch.float32 and traffic.found == []
