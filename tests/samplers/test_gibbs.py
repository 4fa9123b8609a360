"""Gibbs draws of classes against the exact softmax, and chains of states and classes against their joint density."""

import math

import pytest
import torch
from test_metropolis import seeded

from ebm.samplers import class_flips, hmc, langevin, mala, within_gibbs

PLACES = torch.tensor([-1.5, 0.0, 2.0])
WEIGHTS = torch.tensor([0.2, 0.5, 0.3])


def energy_of_classes(x):
    """E(x, y) of a mixture: (x - place_y)^2 / 2 - log weight_y, so that p(y) = weights and x | y ~ N(place_y, 1)."""
    return (x - PLACES).square() / 2 - WEIGHTS.log()


def energy(x, y):
    return energy_of_classes(x).gather(1, y[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_frequencies_are_the_softmax(temperature):
    energies = torch.tensor([0.3, -1.0, 2.0, 0.0, math.inf])
    num = 50_000
    y, flipped = class_flips(
        lambda x: energies.expand(len(x), 5),
        torch.zeros(num, 1),
        torch.zeros(num, dtype=torch.int64),
        temperature=temperature,
        generator=seeded(),
    )
    expected = torch.softmax(-energies / temperature, 0)
    counts = torch.bincount(y, minlength=5)
    assert counts[4] == 0 and y.dtype == torch.int64
    assert ((counts - num * expected).abs() <= 4 * (num * expected * (1 - expected)).sqrt()).all()
    assert flipped.item() == pytest.approx((y != 0).float().mean().item())


def test_every_chain_has_energies_of_its_own():
    x = torch.tensor([-8.0, 0.0, 9.0] * 4)[:, None]
    y, _ = class_flips(energy_of_classes, x, torch.zeros(12, dtype=torch.int64), temperature=0.01, generator=seeded())
    assert y.tolist() == [0, 1, 2] * 4


def test_lists_of_generators_are_parts_of_the_batch():
    x, y = torch.randn(12, 1, generator=seeded(1)), torch.arange(12) % 3
    together, _ = class_flips(energy_of_classes, x, y, generator=[seeded(v) for v in range(4)])
    parts = [
        class_flips(energy_of_classes, *part, generator=seeded(v))[0]
        for v, part in enumerate(zip(x.chunk(4), y.chunk(4), strict=True))
    ]
    assert torch.equal(together, torch.cat(parts))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_sick_chain_keeps_its_class(value):
    energies = torch.tensor([[0.0, 0.0, value], [0.0, 0.0, 50.0], [math.inf, math.inf, math.inf]])
    kept = torch.tensor([1, 2, 1])
    y, _ = class_flips(lambda x: energies, torch.zeros(3, 1), kept, generator=seeded())
    assert y[0] == 1 and y[1] != 2 and y[2] == 1


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        (mala, {"num_steps": 3, "step_size": 0.8}),
        (hmc, {"num_steps": 1, "step_size": 0.7, "num_leapfrog": 2}),
        (langevin, {"num_steps": 12, "step_size": 0.02, "noise_scale": 0.2}),
    ],
    ids=["mala", "hmc", "langevin"],
)
def test_the_joint_density(sampler, settings):
    """All start in the class of the least weight; Langevin's variance is 1 / (1 - h / 2), off by 1 %."""
    num = 5000
    x, y, info = within_gibbs(
        sampler,
        energy,
        energy_of_classes,
        torch.full((num, 1), -1.5),
        torch.zeros(num, dtype=torch.int64),
        rounds=60,
        generator=[seeded(v) for v in range(4)],
        **settings,
    )
    counts = torch.bincount(y, minlength=3)
    assert ((counts - num * WEIGHTS).abs() < 4 * (num * WEIGHTS * (1 - WEIGHTS)).sqrt()).all()
    for k, place in enumerate(PLACES):
        own = x[y == k]
        assert abs(own.mean() - place) < 4 / math.sqrt(len(own))
        assert abs(own.var() - 1) < 4 * math.sqrt(2 / len(own)) + 0.01
    assert 0.1 < info.flipped < 0.6
    assert (info.acceptance == 1) if sampler is langevin else (0.4 < info.acceptance < 0.99)
    assert info.displacement.item() == pytest.approx((x + 1.5).abs().mean().item(), rel=1e-5)


def test_temperature_is_that_of_both_moves():
    num = 5000
    x, y, _ = within_gibbs(
        mala,
        energy,
        energy_of_classes,
        torch.zeros(num, 1),
        torch.zeros(num, dtype=torch.int64),
        rounds=60,
        temperature=2.0,
        generator=seeded(),
        num_steps=3,
        step_size=0.8,
    )
    expected = torch.softmax(WEIGHTS.log() / 2, 0)
    counts = torch.bincount(y, minlength=3)
    assert ((counts - num * expected).abs() < 4 * (num * expected * (1 - expected)).sqrt()).all()
    own = x[y == 1]
    assert abs(own.var() / 2 - 1) < 4 * math.sqrt(2 / len(own))


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=0 must be at least 1"):
        within_gibbs(mala, None, None, torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), rounds=0)
