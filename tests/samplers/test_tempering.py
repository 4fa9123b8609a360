"""Parallel tempering: every level samples its own temperature, and the cold one crosses where MALA alone does not."""

import inspect
import math
import types

import pytest
import torch
from densities import double_well, gaussian, mixture, on_the_line
from test_metropolis import quartic, seeded

from ebm.samplers.levels import swap_, tempering
from ebm.samplers.metropolis import State, mala

CHAINS = 2000
LADDER = (1.0, 3.0, 9.0, 27.0)


def tempered(density, seed, start=None, sampler=tempering, **settings):
    start = torch.zeros(CHAINS, len(settings["temperatures"]), density.dim) if start is None else start
    return sampler(density.energy, start, generator=seeded(seed), **settings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("density", "step_size", "temperatures", "num_steps"),
    [
        (gaussian(), 0.8, (1.0, 2.0, 4.0), 60),
        (double_well(), 0.1, (1.0, 2.0, 4.0), 150),
        (mixture(4.0), 0.3, LADDER, 250),
    ],
    ids=["gaussian", "double well", "far mixture"],
)
def test_moments(density, step_size, temperatures, num_steps, seed):
    """All chains of the mixture begin in one mode, 16 standard deviations from the other."""
    start = torch.full((CHAINS, len(temperatures), density.dim), -4.0 if len(temperatures) == 4 else 0.5)
    settings = {"step_size": step_size, "temperatures": temperatures, "num_steps": num_steps}
    x, info = tempered(density, seed, start, **settings)
    assert density.z_scores(x[:, 0]).abs().max() < 4, density.z_scores(x[:, 0])
    assert 0.3 < info.acceptance < 0.9 and 0.3 < info.swap_acceptance < 0.9


def test_a_chain_alone_does_not_cross():
    x, _ = mala(mixture(4.0).energy, torch.full((CHAINS, 1), -4.0), num_steps=250, step_size=0.3, generator=seeded())
    assert (x < 0).all()


def test_every_level_has_its_temperature():
    """The variance of a Gaussian's level is its temperature, swaps or not; the levels stay independent."""
    density, ladder = on_the_line(lambda x: x.square().sum(1) / 2), torch.tensor([0.5, 1.0, 1.5, 4.0])
    num = 20_000
    start = torch.randn(num, 4, 1, generator=seeded(1)) * ladder.sqrt()[:, None]  # exact from the start: it stays so
    x, info = tempered(density, 0, start, num_steps=12, step_size=0.5, temperatures=ladder.tolist())
    x = x.squeeze(2)
    assert ((x.var(0) / ladder - 1).abs() < 4 * math.sqrt(2 / num)).all()
    assert (x.mean(0).abs() < 4 * (ladder / num).sqrt()).all()
    off = torch.corrcoef(x.T) - torch.eye(4)
    assert off.abs().max() < 4.5 / math.sqrt(num)
    squares = torch.corrcoef(x.T.square()) - torch.eye(4)
    assert squares.abs().max() < 4.5 / math.sqrt(num)
    assert 0.3 < info.swap_acceptance < 0.95


MUTATIONS = {
    "sign of the swap": ("(1 / cold - 1 / hot)", "(1 / hot - 1 / cold)"),
    "every swap passes": ("log_ratio.clamp(max=0).exp())", "1.0)"),
    "temperatures for their inverses": ("(1 / cold - 1 / hot)", "(hot - cold)"),
    "energies stay behind": ("for a, b in zip(low, high, strict=True)", "for a, b in zip(low[::2], high[::2])"),
    "gradients stay behind": ("for a, b in zip(low, high, strict=True)", "for a, b in zip(low[:2], high[:2])"),
    "one temperature for all": ("temperature=ladder.flatten()", "temperature=ladder.flatten().mean()"),
}


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_wrong_swap_would_be_noticed(mutation):
    source = inspect.getsource(inspect.getmodule(tempering))
    if mutation is not None:
        old, new = MUTATIONS[mutation]
        assert source.count(old) == 1
        source = source.replace(old, new)
    module = types.ModuleType("mutated")
    exec(compile(source, "mutated", "exec"), module.__dict__)
    ladder, num = torch.tensor([0.5, 1.0, 2.0]), 20_000
    start = torch.randn(num, 3, 1, generator=seeded(1)) * ladder.sqrt()[:, None]
    settings = {"num_steps": 12, "step_size": 0.8, "temperatures": ladder.tolist()}
    density = on_the_line(lambda x: x.square().sum(1) / 2)
    x, _ = tempered(density, 0, start, module.tempering, **settings)
    right = ((x.squeeze(2).var(0) / ladder - 1).abs() < 4 * math.sqrt(2 / num)).all()
    assert bool(right) == (mutation is None)


def test_a_swap_is_the_formula():
    ladder = torch.tensor([[1.0, 2.0, 5.0, 9.0]]).expand(300, 4)
    x = torch.rand(1200, 2, generator=seeded(1)) * 4
    before = State(x.clone(), quartic(x), x**3 + 2 * x)
    for first, pairs in ((0, [(0, 1), (2, 3)]), (1, [(1, 2)])):
        state = State(*(part.clone() for part in before))
        probability = swap_(state, ladder, first, seeded(7))
        u = torch.rand(300, len(pairs), generator=seeded(7))
        old, new = ([part.unflatten(0, (300, 4)) for part in s] for s in (before, state))
        for k, (i, j) in enumerate(pairs):
            ratio = ((1 / ladder[:, i] - 1 / ladder[:, j]) * (old[1][:, i] - old[1][:, j])).exp()
            torch.testing.assert_close(probability[:, k], ratio.clamp(max=1))
            swapped = u[:, k] < probability[:, k]
            assert 0.1 < swapped.float().mean() < 0.95
            for a, b in zip(new, old, strict=True):
                assert torch.equal(a[swapped, i], b[swapped, j]) and torch.equal(a[swapped, j], b[swapped, i])
                assert torch.equal(a[~swapped], b[~swapped]) or len(pairs) > 1
        untouched = [level for level in range(4) if all(level not in pair for pair in pairs)]
        assert all(torch.equal(a[:, untouched], b[:, untouched]) for a, b in zip(new, old, strict=True))


def test_one_level_is_mala():
    density = gaussian()
    x, info = tempered(density, 3, num_steps=10, step_size=0.4, temperatures=[1.0])
    settings = {"num_steps": 10, "step_size": 0.4, "generator": seeded(3)}
    y, expected = mala(density.energy, torch.zeros(CHAINS, 2), **settings)
    assert torch.equal(x[:, 0], y) and torch.equal(torch.stack(info[:4]), torch.stack(expected))
    assert info.swap_acceptance == 0


def test_pieces_of_a_chain():
    """Lists of generators are parts of the batch; steps are steps in turn, with swaps in their rhythm."""
    settings = {"step_size": 0.1, "temperatures": LADDER, "bounds": (-1.0, 1.0), "boundary": "reflect", "swap_every": 3}
    start = torch.rand(8, 4, 1, 4, 4, generator=seeded(1))
    kept = start.clone()
    together, info = tempering(quartic, start, num_steps=7, generator=[seeded(v) for v in range(4)], **settings)
    assert together.shape == start.shape and torch.equal(start, kept)
    for stream, part in enumerate(start.chunk(4)):
        alone, _ = tempering(quartic, part, num_steps=7, generator=seeded(stream), **settings)
        assert torch.equal(together.chunk(4)[stream], alone)
    gens, x, swaps = [seeded(v) for v in range(4)], start, []
    for step in range(7):
        x, one = tempering(quartic, x, num_steps=1, steps_before=step, generator=gens, **settings)
        swaps.append(one.swap_acceptance.item() > 0)
    assert torch.equal(x, together)
    assert swaps == [False, False, True] * 2 + [False]
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in info)
    cold = (together - start)[:, 0].flatten(1).norm(dim=1).mean()
    assert info.displacement.item() == pytest.approx(cold.item(), rel=1e-5)


def test_sick_replicas_are_not_passed_on():
    start = torch.zeros(50, 3, 2)
    start[0, 1] = math.nan
    x, info = tempering(quartic, start, num_steps=10, step_size=0.1, temperatures=[1.0, 2.0, 3.0], generator=seeded())
    assert x[0, 1].isnan().all() and x[0, [0, 2]].isfinite().all() and x[1:].isfinite().all()
    assert info.swap_acceptance > 0.5


def test_levels_and_temperatures_must_agree():
    with pytest.raises(ValueError, match=r"x of shape \(5, 2, 1\) must be \(B, 3, ...\)"):
        tempering(quartic, torch.zeros(5, 2, 1), num_steps=1, step_size=0.1, temperatures=[1.0, 2.0, 3.0])
