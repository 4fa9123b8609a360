"""Chains over noise levels sample the joint density of states and levels, against closed forms."""

import math

import pytest
import torch

from ebm.energies import split_noise_level, with_noise_level
from ebm.losses import at_noise_levels
from ebm.samplers import annealed, noise_levels

LEVELS = tuple(torch.linspace(2 * math.log(0.2), 2 * math.log(4.0), 12).tolist())
CENTRES, WEIGHTS, STD = torch.tensor([-2.0, 2.0]), torch.tensor([0.25, 0.75]), 0.3
STEP = 0.04 / 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(z, tilt=0.0):
    """-log of the mixture's density with the state's noise, normalised at every level; plus `tilt` times the level."""
    x, level = split_noise_level(z)
    variance = STD**2 + level.exp()[:, None]
    each = WEIGHTS.log() - (x - CENTRES) ** 2 / (2 * variance) - (2 * math.pi * variance).log() / 2
    return -torch.logsumexp(each, 1) + tilt * level


def run(steps, n=4000, tilt=0.0, seed=0, start=-2.0, share=None):
    z = with_noise_level(torch.full((n, 1), start), torch.full((n,), LEVELS[0]))
    return noise_levels(
        lambda z: mixture(z, tilt), z, num_steps=steps, step_size=STEP, log_variances=LEVELS, lowest_share=share,
        generator=seeded(seed),
    )  # fmt: skip


@pytest.mark.parametrize(("tilt", "share"), [(0.0, None), (0.4, None), (0.0, 0.5)])
def test_levels_and_modes_have_their_shares(tilt, share):
    """All chains begin in the mode of weight 1/4 at the lowest level, 13 deviations from the other."""
    z, info = run(400 if share is None else 1500, tilt=tilt, share=share)
    x, level = split_noise_level(z)
    levels = torch.tensor(LEVELS)
    expected = torch.softmax(-tilt * levels, 0)
    if share is not None:
        expected = torch.tensor([share] + [(1 - share) / (len(LEVELS) - 1)] * (len(LEVELS) - 1))
    index = (level[:, None] - levels).abs().argmin(1)
    assert (level - levels[index]).abs().max() < 1e-5  # no drift off the grid
    shares = torch.bincount(index, minlength=len(LEVELS)) / len(z)
    assert ((shares - expected).abs() < 4.5 * (expected / len(z)).sqrt()).all(), shares
    low = index < 4
    share, spread = (x[low] > 0).float().mean().item(), math.sqrt(0.19 / low.sum())
    assert share == pytest.approx(0.75, abs=4 * spread)
    assert 0.5 < info.acceptance < 1 and 0.2 < info.level_acceptance < 1


def test_all_chains_can_stay_at_the_lowest_level():
    """A share of 1: the levels are not moved, and the states sample their mode, which they can't leave."""
    evaluated = []

    def counted(z):
        evaluated.append(len(z))
        return mixture(z)

    z = with_noise_level(torch.full((4000, 1), -2.0), torch.full((4000,), LEVELS[0]))
    z, info = noise_levels(counted, z, num_steps=40, step_size=STEP, log_variances=LEVELS, lowest_share=1.0,
                           generator=seeded())  # fmt: skip
    x, level = split_noise_level(z)
    assert (level == LEVELS[0]).all() and info.level_acceptance == 0 and len(evaluated) == 41
    assert x.mean().item() == pytest.approx(-2, abs=0.03)
    assert x.var().item() == pytest.approx(STD**2 + 0.04, rel=0.1)
    noisy = at_noise_levels(torch.zeros(1000, 3), LEVELS, 1.0, seeded())
    assert (split_noise_level(noisy)[1] == LEVELS[0]).all()


def test_each_level_has_its_own_density():
    z, _ = run(400, n=20_000)
    x, level = split_noise_level(z)
    for at in (LEVELS[0], LEVELS[6], LEVELS[-1]):
        own = x[(level - at).abs() < 1e-4, 0]
        variance = STD**2 + math.exp(at) + 4 * 0.75  # within the modes, and between: 4 w (1 - w) 2^2
        assert own.mean().item() == pytest.approx(1.0, abs=4.5 * math.sqrt(variance / len(own)))
        assert own.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / len(own)))


def run_annealed(steps, n=4000, seed=0, level=LEVELS[-1], anneal_steps=200, calls=1):
    z = with_noise_level(4.0 * torch.randn(n, 1, generator=seeded(1)), torch.full((n,), level))
    generator = seeded(seed)
    for _ in range(calls):
        z, info = annealed(mixture, z, num_steps=steps // calls, step_size=STEP, log_variances=LEVELS,
                           anneal_steps=anneal_steps, generator=generator)  # fmt: skip
    return *split_noise_level(z), info


def test_a_chain_at_the_lowest_level_stays_there_and_in_its_mode():
    z = with_noise_level(torch.full((500, 1), -2.0), torch.full((500,), LEVELS[0]))
    settings = {"num_steps": 200, "step_size": STEP, "log_variances": LEVELS, "generator": seeded()}
    z, info = annealed(mixture, z, anneal_steps=200, **settings)
    x, level = split_noise_level(z)
    assert (x < 0).all() and (level == LEVELS[0]).all() and info.level == 0
    again, tested = noise_levels(mixture, with_noise_level(torch.full_like(x, -2.0), level), lowest_share=1.0,
                                 **settings | {"generator": seeded()})  # fmt: skip
    assert info.acceptance == pytest.approx(tested.acceptance.item(), abs=0.03)
    assert split_noise_level(again)[0].mean().item() == pytest.approx(x.mean().item(), abs=0.05)


def test_annealed_chains_reach_the_lowest_level_with_its_shares():
    n = 4000
    x, level, info = run_annealed(200, n)
    assert (level == LEVELS[0]).all()
    assert (x > 0).float().mean().item() == pytest.approx(0.75, abs=4 * math.sqrt(0.19 / n))
    assert x[x > 0].std().item() == pytest.approx(math.sqrt(STD**2 + 0.04), rel=0.05)
    assert 0.5 < info.acceptance < 1


def test_the_level_falls_evenly_and_the_way_is_cut_anywhere():
    """In calls of 10 steps the chain is that of one call: its state says how far it is."""
    _, level, info = run_annealed(80, n=3)
    middle = (LEVELS[0] + LEVELS[-1]) / 2
    torch.testing.assert_close(level, torch.full((3,), middle))
    assert info.level.item() == pytest.approx(0.5, abs=1e-5) and info.acceptance == 1  # none was tested
    whole, cut = (run_annealed(300, n=500, calls=calls)[0] for calls in (1, 30))
    torch.testing.assert_close(cut, whole)


def test_on_the_way_down_the_states_have_the_density_of_their_level():
    """A long way, over which the chain keeps up with the level, is cut at a middle level."""
    x, level, _ = run_annealed(1600, n=4000, anneal_steps=4000)
    variance = STD**2 + level[0].exp().item() + 4 * 0.75
    assert x.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(variance / len(x)))
    assert x.var().item() == pytest.approx(variance, rel=0.1)


def test_a_step_costs_one_gradient():
    evaluated = []

    def counted(z):
        evaluated.append(len(z))
        return mixture(z)

    z = with_noise_level(torch.zeros(4, 1), torch.full((4,), LEVELS[-1]))
    annealed(counted, z, num_steps=30, step_size=STEP, log_variances=LEVELS, anneal_steps=20, generator=seeded())
    assert len(evaluated) == 31


def test_images_and_generators_a_part():
    """Each generator moves its own part of the batch, whatever the others are."""

    def energy(z):
        x, level = split_noise_level(z)
        return x.flatten(1).square().sum(1) / (2 * (1 + level.exp()))

    z = with_noise_level(torch.zeros(8, 1, 4, 4), torch.full((8,), LEVELS[3]))
    settings = {"num_steps": 5, "step_size": STEP, "log_variances": LEVELS}
    whole, _ = noise_levels(energy, z, generator=[seeded(1), seeded(2)], **settings)
    half, _ = noise_levels(energy, z[4:], generator=[seeded(2)], **settings)
    assert whole.shape == (8, 2, 4, 4) and torch.equal(whole[4:], half)
