"""The fronts of the samplers with a Metropolis test: the functions, adapted during burn-in and never after it."""

import math

import pytest
import torch
from densities import gaussian, mixture
from test_metropolis import quartic, seeded

from ebm.samplers import HamiltonianMonteCarlo, MetropolisAdjustedLangevin, ParallelTempering, hmc, mala, tempering

FRONTS = [MetropolisAdjustedLangevin, HamiltonianMonteCarlo, ParallelTempering]


def test_they_are_the_functions():
    start, common = torch.rand(6, 3, generator=seeded(1)) - 0.5, {"bounds": (-1.0, 1.0), "temperature": 0.5}
    run = {"initial_points": start, "n_steps": 5}
    x = MetropolisAdjustedLangevin(quartic, 0.1, **common).sample_chain(**run, generator=seeded())
    settings = {"num_steps": 5, "step_size": 0.1}
    assert torch.equal(x, mala(quartic, start, **settings, **common, generator=seeded())[0])
    x = HamiltonianMonteCarlo(quartic, 0.1, num_leapfrog=3, **common).sample_chain(**run, generator=seeded())
    assert torch.equal(x, hmc(quartic, start, num_leapfrog=3, **settings, **common, generator=seeded())[0])
    ladder, temperatures = start.unsqueeze(1).repeat(1, 3, 1), (1.0, 2.0, 5.0)
    x = ParallelTempering(quartic, 0.1, temperatures=temperatures, swap_every=2).sample_chain(**run, generator=seeded())
    expected, _ = tempering(quartic, ladder, temperatures=temperatures, swap_every=2, **settings, generator=seeded())
    assert torch.equal(x, expected[:, 0])


@pytest.mark.parametrize("front", FRONTS)
def test_shapes_trajectories_and_what_happened(front):
    sampler = front(quartic, 0.1, adapt=False)
    assert math.isnan(sampler.acceptance)
    assert sampler.sample_chain(dim=2, n_samples=7, n_steps=3).shape == (7, 2)
    assert 0 < sampler.acceptance <= 1
    assert sampler.sample_chain(shape=(1, 4, 4), n_samples=7, n_steps=3).shape == (7, 1, 4, 4)
    settings = {"dim": 2, "n_samples": 7, "n_steps": 20}
    kept = sampler.sample_chain(**settings, burn_in=5, thin=3, return_trajectory=True, generator=seeded())
    every = sampler.sample_chain(**settings, return_trajectory=True, generator=seeded())
    final = sampler.sample_chain(**settings, burn_in=5, generator=seeded())
    assert kept.shape == (5, 7, 2) and every.shape == (20, 7, 2)
    assert torch.equal(kept, every[7::3]) and torch.equal(final, every[-1])
    assert sampler.sample_chain(**settings, burn_in=20, return_trajectory=True).shape == (0, 7, 2)
    assert sampler.info is None and sampler.step_size == 0.1


@pytest.mark.parametrize("first", [1e-3, 0.3, 10.0])
@pytest.mark.parametrize(("front", "target"), [*zip(FRONTS, (0.574, 0.65, 0.574), strict=True)])
def test_burn_in_reaches_the_target_acceptance(front, target, first):
    scales = torch.linspace(0.5, 2.0, 10)
    sampler = front(lambda x: (x / scales).square().sum(1) / 2, first)
    sampler.sample_chain(dim=10, n_samples=100, n_steps=300, burn_in=200, generator=seeded())
    assert sampler.acceptance == pytest.approx(target, abs=0.05)
    assert sampler.step_size == pytest.approx({0.65: 0.85}.get(target, 0.357), rel=0.1)


@pytest.mark.parametrize("front", FRONTS)
def test_what_is_kept_is_exact(front):
    """Moments of a trajectory's states, of chains that began far away with a step size far too small."""
    density = gaussian()
    sampler = front(density.energy, 0.01)
    x = sampler.sample_chain(
        initial_points=torch.full((3000, 2), 5.0),
        n_steps=260,
        burn_in=200,
        thin=60,
        return_trajectory=True,
        generator=[seeded(v) for v in range(4)],
    )
    assert density.z_scores(x[0]).abs().max() < 4
    step_size = sampler.step_size
    sampler.sample_chain(dim=2, n_samples=50, n_steps=10)
    assert sampler.step_size == step_size  # no burn-in, no adaptation


def test_tempering_finds_the_other_mode():
    density = mixture(4.0)
    sampler = ParallelTempering(density.energy, temperatures=(1.0, 3.0, 9.0, 27.0))
    start = torch.full((2000, 1), -4.0)
    x = sampler.sample_chain(initial_points=start, n_steps=300, burn_in=100, generator=seeded())
    assert density.z_scores(x).abs().max() < 4
    assert 0.3 < sampler.swap_acceptance < 0.9 and sampler.acceptance == pytest.approx(0.574, abs=0.05)


@pytest.mark.parametrize(
    ("front", "settings", "words"),
    [
        (MetropolisAdjustedLangevin, {"step_size": 0}, "step_size=0 must be above 0"),
        (MetropolisAdjustedLangevin, {"temperature": 0}, "temperature=0 must be above 0"),
        (MetropolisAdjustedLangevin, {"boundary": "clamp"}, "boundary='clamp' must be 'reject' or 'reflect'"),
        (MetropolisAdjustedLangevin, {"bounds": (1, -1)}, r"bounds \(1, -1\) must be \(low, high\)"),
        (HamiltonianMonteCarlo, {"num_leapfrog": 0}, "num_leapfrog=0 must be at least 1"),
        (HamiltonianMonteCarlo, {"target_acceptance": 1}, "target_acceptance=1 must be between 0 and 1"),
        (ParallelTempering, {"temperatures": (2.0, 1.0)}, r"temperatures=\(2.0, 1.0\) must be numbers that ascend"),
        (ParallelTempering, {"temperatures": ()}, r"temperatures=\(\) must be numbers that ascend"),
        (ParallelTempering, {"temperatures": (0.0, 1.0)}, "temperature=0.0 must be above 0"),
        (ParallelTempering, {"swap_every": 0}, "swap_every=0 must be at least 1"),
    ],
)
def test_what_is_refused(front, settings, words):
    with pytest.raises(ValueError, match=words):
        front(quartic, **settings)
