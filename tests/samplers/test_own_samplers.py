"""The samplers that come with objectives: flows, descent with momentum, annealing. Against closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from ebm.config import load_config
from ebm.config.samplers import AnnealedConfig
from ebm.energies import GaussianEnergy, GaussianMixtureEnergy
from ebm.samplers import can_be_continued, flow, fresh_chains, langevin, nesterov, sampler_of
from ebm.samplers.factory import annealing

GAUSSIAN = GaussianEnergy(torch.tensor([0.5, -1.0]), torch.tensor([0.5, 2.0]))
START = torch.tensor([[2.0, 1.0], [-1.0, 3.0], [0.0, 0.0]])


def exact(time):
    """Of x' = -(x - m) / v."""
    return GAUSSIAN.mean + (START - GAUSSIAN.mean) * torch.exp(-time / torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_a_flow_lands_where_its_equation_says(method, order):
    errors = []
    for steps in (8, 16, 32):
        end, info = flow(GAUSSIAN, START, num_steps=steps, end=1.5, method=method)
        errors.append((end - exact(1.5)).abs().max().item())
    assert errors[-1] < (0.05 if order == 1 else 0.002)
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)
    assert info.displacement.item() == pytest.approx((end - START).norm(dim=1).mean().item(), rel=1e-5)


def test_the_steps_of_a_flow():
    """One step of a linear flow of rate a: 1 - a h, and 1 - a h + (a h)^2 / 2."""
    energy = GaussianEnergy(torch.zeros(1), torch.tensor([0.5]))
    x = torch.tensor([[3.0]])
    assert flow(energy, x, num_steps=1, end=0.2, method="euler")[0].item() == pytest.approx(3 * 0.6)
    assert flow(energy, x, num_steps=1, end=0.2)[0].item() == pytest.approx(3 * (0.6 + 0.08))
    assert flow(energy, x, num_steps=2, end=0.4, method="euler")[0].item() == pytest.approx(3 * 0.36)
    assert flow(energy, x, num_steps=1, end=0.2, bounds=(-1.0, 1.0))[0].item() == 1.0


def test_nesterov_has_the_rate_of_the_theory():
    """On a quadratic with curvatures between m and L, step 1 / L and momentum (1 - r) / (1 + r) for r = sqrt(m / L),
    the error falls by 1 - r a step (Nesterov 2004, 2.2.1). Plain descent needs 1 / r times as many."""
    small, large = 0.04, 1.0
    energy = GaussianEnergy(torch.zeros(2), torch.tensor([1 / small, 1 / large]))
    root = math.sqrt(small / large)
    settings = {"step_size": 1 / large, "momentum": (1 - root) / (1 + root)}
    x = torch.tensor([[4.0, 4.0]])
    errors = [nesterov(energy, x, num_steps=k, **settings)[0].abs().max().item() for k in (40, 60)]
    assert (errors[1] / errors[0]) ** (1 / 20) == pytest.approx(1 - root, rel=0.02)
    plain, _ = nesterov(energy, x, num_steps=60, step_size=1.0, momentum=0.0)
    assert plain[0, 0].item() == pytest.approx(4 * (1 - small) ** 60, rel=1e-3)
    assert plain[0, 1].item() == 0


def test_nesterov_step_by_step():
    energy = GaussianEnergy(torch.zeros(1), torch.tensor([1.0]))
    x = previous = 2.0
    for _ in range(3):
        ahead = x + 0.3 * (x - previous)
        previous, x = x, ahead - 0.1 * ahead
    found, _ = nesterov(energy, torch.tensor([[2.0]]), num_steps=3, step_size=0.1, momentum=0.3)
    assert found.item() == pytest.approx(x)


@pytest.mark.parametrize("sampler", [flow, nesterov])
def test_a_chain_stops_by_itself(sampler):
    """Where its gradient has become small, whatever the others do; and nothing more is computed once all have."""
    calls = []

    def energy(x):
        calls.append(1)
        return GAUSSIAN(x)

    settings = {"end": 40.0, "method": "euler"} if sampler is flow else {"step_size": 0.1, "momentum": 0.0}
    stopped, info = sampler(energy, START, num_steps=400, tolerance=0.01, **settings)
    size = GAUSSIAN.gradient(stopped).square().mean(1).sqrt()
    assert (size <= 0.01).all() and (size > 0.001).all() and len(calls) < 200
    for i in range(3):
        alone, _ = sampler(GAUSSIAN, START[i : i + 1], num_steps=400, tolerance=0.01, **settings)
        torch.testing.assert_close(alone[0], stopped[i])
    assert info.grad_norm.isfinite()


@pytest.mark.parametrize(("apart", "low", "high"), [(0.6, 0.23, 0.3), (1.5, 0.2, 0.45)])
def test_annealing_finds_the_weights_of_a_mixture(apart, low, high):
    """A quarter of the mass lies left, where no chain starts. Where the modes overlap little, a weight is that of the
    temperature at which chains last crossed; chains that were never hot do not cross at all."""
    energy = GaussianMixtureEnergy(torch.tensor([[-apart, 0.0], [apart, 0.3]]), 0.09, torch.tensor([0.25, 0.75]))
    config = AnnealedConfig(hottest=25.0, sigma=0.3, temperature=1.0, denoise=False, relative_step=0.1)
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) + 3
    settings = annealing(config, 600)
    cold = settings | {"noise_scale": settings["noise_scale"][-1]}
    found, kept = (
        langevin(energy, x, num_steps=600, **chosen, generator=torch.Generator().manual_seed(1))[0]
        for chosen in (settings, cold)
    )
    assert low < (found[:, 0] < 0).float().mean() < high
    if apart == 1.5:
        assert (kept[:, 0] < 0).float().mean() < 0.02
        torch.testing.assert_close(found[found[:, 0] > 0].std(0), torch.full((2,), 0.3), atol=0.03, rtol=0)


def test_the_schedule_of_an_annealed_chain():
    config = AnnealedConfig(hottest=100.0, cooling=0.5, sigma=0.2, temperature=2.0)
    settings = annealing(config, 11)
    steps, noises = settings["step_size"], settings["noise_scale"]
    assert steps[:-1] == [pytest.approx(0.2 * 0.04 / 2)] * 10 and steps[-1] == pytest.approx(0.04 / 2)
    temperatures = [noise**2 / (2 * step) for noise, step in zip(noises, steps, strict=True)]
    falling = [2 * 100 ** (1 - k / 5) for k in range(6)]
    assert temperatures == pytest.approx([*falling, 2, 2, 2, 2, 0])
    kept = annealing(config.model_copy(update={"denoise": False}), 11)
    assert kept["noise_scale"][-1] > 0 and kept["step_size"][-1] == steps[0]


def test_the_last_step_gives_the_mean_of_the_data():
    """Of a Gaussian smoothed by sigma, at T = 2: x s^2 / (s^2 + sigma^2)."""
    config = AnnealedConfig(hottest=1.0, sigma=0.5, temperature=2.0)
    energy = GaussianEnergy(torch.zeros(3), torch.tensor([0.25 + 1.0] * 3)) * 2.0
    x = torch.randn(5, 3)
    found, _ = langevin(energy, x, num_steps=1, **annealing(config, 1))
    torch.testing.assert_close(found, x / 1.25)


def test_bounds_at_the_end():
    """Chains are free on their way, and clamped once."""
    energy = GaussianEnergy(torch.tensor([3.0]), torch.tensor([1.0]))
    x = torch.zeros(1, 1)
    settings = {"num_steps": 30, "step_size": 0.5, "noise_scale": 0.0}
    free, _ = langevin(energy, x, **settings)
    ended, _ = langevin(energy, x, **settings, bounds=(-1.0, 2.5), boundary="end")
    assert free.item() == pytest.approx(3, abs=1e-3) and ended.item() == 2.5
    inside, _ = langevin(energy, x, **settings, bounds=(-1.0, 4.0), boundary="end")
    assert torch.equal(inside, free)


OWN = {
    "equilibrium": "nesterov",
    "multilevel_denoising": "annealed",
    "denoising": "langevin",
    "contrastive": "langevin",
}


@pytest.mark.parametrize("loss", OWN)
def test_an_objective_brings_its_sampler_of_fresh_chains(loss):
    config = load_config(None, [f"loss.kind={loss}", "sampler.bounds=[-1.5,1.5]"])
    fresh = config.fresh_sampler
    assert fresh.kind == OWN[loss] and fresh.bounds == (-1.5, 1.5)
    if OWN[loss] == "langevin":
        return
    assert fresh.start_range is None and not can_be_continued(fresh)
    assert load_config(None, [f"loss.kind={loss}", "loss.sampler=null"]).fresh_sampler.kind == "langevin"
    assert load_config(None, [f"loss.kind={loss}", "sampler.kind=mala"]).fresh_sampler.kind == "mala"
    few, _ = fresh_chains(GAUSSIAN, fresh, (2,), 5, 20, seed=3)
    many, _ = fresh_chains(GAUSSIAN, fresh, (2,), 70, 20, seed=3, block=32)
    assert few.shape == (5, 2) and torch.equal(many[:5], few) and many.abs().max() <= 1.5


def test_the_numbers_that_a_sampler_takes_from_its_loss():
    config = load_config(
        None, ["loss.kind=multilevel_denoising", "loss.sigma=0.1", "loss.sigma_max=2", "loss.temperature=0.5"]
    )
    fresh = config.fresh_sampler
    assert (fresh.hottest, fresh.sigma, fresh.temperature) == (pytest.approx(400), 0.1, 0.5)
    own = load_config(None, ["loss.kind=multilevel_denoising", "loss.sampler.hottest=9", "loss.sampler.sigma=0.3"])
    assert (own.fresh_sampler.hottest, own.fresh_sampler.sigma) == (9, 0.3)
    matching = ["loss.kind=energy_matching", "sampler.schedule=flow", "sampler.start=normal", "sampler.temperature=0.1"]
    sampler, settings = sampler_of(load_config(None, matching).fresh_sampler, 10)
    assert sampler is flow and settings["end"] == 2.0 and settings["method"] == "heun"
