"""MALA and HMC: exact moments at any step size, detailed balance at walls, the order of the leapfrog; and that a wrong
sign or factor would show."""

import inspect
import math
import types

import pytest
import torch
from densities import Density, double_well, gaussian, mixture, on_the_line, truncated

from ebm.samplers import adapted, hmc, langevin, mala, metropolis
from ebm.samplers.base import reflected
from ebm.samplers.metropolis import State, leapfrog
from ebm.streams import uniform_

CHAINS = 4000
TARGETS = {  # density, its temperature, steps, step sizes of MALA and HMC
    "gaussian": (gaussian(), 1.0, 60, 0.8, 0.85),
    "cold gaussian": (gaussian(0.5), 0.5, 60, 0.8, 0.85),
    "mixture": (mixture(1.2), 1.0, 150, 0.5, 0.67),
    "double well": (double_well(), 1.0, 200, 0.15, 0.35),
    "hot double well": (double_well(2.0), 2.0, 100, 0.15, 0.35),
}
SAMPLERS = {"mala": (mala, {"step_size": 0.3}), "hmc": (hmc, {"step_size": 0.4, "num_leapfrog": 4})}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chains_of(density: Density, sampler, seed, num=CHAINS, start=None, **settings):
    start = 3 * torch.rand(num, density.dim, generator=seeded(1000 + seed)) - 1.5 if start is None else start
    return sampler(density.energy, start, generator=seeded(seed), **settings)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["mala", "hmc"])
@pytest.mark.parametrize("target", TARGETS)
def test_moments(target, name, seed):
    density, temperature, num_steps, *step_sizes = TARGETS[target]
    settings = {"num_steps": num_steps, "temperature": temperature}
    if name == "mala":
        x, info = chains_of(density, mala, seed, step_size=step_sizes[0], **settings)
    else:
        x, info = chains_of(density, hmc, seed, step_size=step_sizes[1], num_leapfrog=3, **settings)
    assert density.z_scores(x).abs().max() < 4, density.z_scores(x)
    assert 0.4 < info.acceptance < 0.9, info.acceptance


def test_langevin_bias_falls_linearly_with_the_step():
    """The variance of a Gaussian's chain is 1 / (1 - h / 2), too large by about h / 2; MALA's at the same h is 1."""
    density, num = on_the_line(lambda x: x.square().sum(1) / 2), 200_000
    steps, errors = (0.1, 0.2, 0.4), {"langevin": [], "mala": []}
    start = torch.randn(num, 1, generator=seeded(9))
    for h in steps:
        k = round(6 / h)
        x, _ = chains_of(density, langevin, 0, start=start, num_steps=k, step_size=h, noise_scale=(2 * h) ** 0.5)
        errors["langevin"].append(x.var().item() - 1)
        x, _ = chains_of(density, mala, 0, start=start, num_steps=k, step_size=h)
        errors["mala"].append(x.var().item() - 1)
    noise = math.sqrt(2 / num)
    for h, biased, exact in zip(steps, *errors.values(), strict=True):
        assert biased == pytest.approx(1 / (1 - h / 2) - 1, abs=4 * noise * (1 + h))
        assert abs(exact) < 4 * noise
    slopes = [error / h for h, error in zip(steps, errors["langevin"], strict=True)]
    assert slopes == pytest.approx([0.5 / (1 - h / 2) for h in steps], rel=0.15)  # .5 in the limit


@pytest.mark.parametrize("boundary", ["reject", "reflect"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("bounds", [(-0.5, 2.0), (1.0, 1.5)])
def test_detailed_balance_at_walls(name, boundary, bounds):
    """A normal cut to an interval as narrow as a step or wider. A proposal that is clamped, or folded without turning
    the momentum, piles up at the walls."""
    density, (sampler, settings) = truncated(*bounds), SAMPLERS[name]
    start = uniform_(torch.empty(20_000, 1), seeded(3), *bounds)
    x, info = chains_of(density, sampler, 0, start=start, num_steps=60, bounds=bounds, boundary=boundary, **settings)
    assert density.z_scores(x).abs().max() < 4
    assert x.min() >= bounds[0] and x.max() <= bounds[1] and info.saturated < 0.001


def textbook_mala(energy, gradient, x, h, temperature, z, u):
    """Roberts & Tweedie's step in float64: the densities of both proposals, and the ratio of all four."""
    x, z, u = x.double(), z.double(), u.double()

    def log_q(to, at):
        return -(to - at + h * gradient(at)).square().sum(1) / (4 * h * temperature)

    proposal = x - h * gradient(x) + math.sqrt(2 * h * temperature) * z
    log_ratio = (energy(x) - energy(proposal)) / temperature + log_q(x, proposal) - log_q(proposal, x)
    probability = log_ratio.exp().clamp(max=1)
    return torch.where((u < probability)[:, None], proposal, x), probability


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_step_of_mala_is_the_textbooks(temperature):
    def energy(x):
        return (x.pow(4) / 4 + x).sum(1)

    start, h = torch.randn(500, 3, generator=seeded(1)), 0.2
    x, info = mala(energy, start, num_steps=1, step_size=h, temperature=temperature, generator=seeded(2))
    draws = seeded(2)
    z, u = torch.randn(500, 3, generator=draws), torch.rand(500, generator=draws)
    expected, probability = textbook_mala(energy, lambda x: x**3 + 1, start, h, temperature, z, u)
    torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)
    assert info.acceptance.item() == pytest.approx(probability.mean().item(), abs=1e-5)
    assert 0.3 < info.acceptance < 0.9
    assert info.displacement.item() == pytest.approx((x - start).norm(dim=1).mean().item(), rel=1e-5)
    assert info.grad_norm.item() == pytest.approx((x**3 + 1).norm(dim=1).mean().item(), rel=1e-4)


def test_mala_is_hmc_of_one_leapfrog_step():
    density = gaussian()
    settings = {"num_steps": 10, "boundary": "reflect", "bounds": (-4.0, 2.0)}
    x, _ = chains_of(density, mala, 0, step_size=0.32, **settings)
    y, _ = chains_of(density, hmc, 0, step_size=0.8, num_leapfrog=1, **settings)
    torch.testing.assert_close(x, y)


MUTATIONS = {
    "sign of the ratio": ("log_ratio = -(", "log_ratio = ("),
    "sign of the energies": ("proposal.energy - state.energy", "state.energy - proposal.energy"),
    "sign of the kinetic energy": ("state.energy + kinetic", "state.energy - kinetic"),
    "half of the kinetic energy": (".flatten(1).sum(1) / 2", ".flatten(1).sum(1)"),
    "no temperature in the ratio": ("+ kinetic) / temperature", "+ kinetic)"),
    "no temperature in the momentum": ("start.mul_(temperature**0.5", "start.mul_(1.0"),
    "no test": ("probability = torch.where(possible, log_ratio", "probability = torch.where(possible, 0 * log_ratio"),
    "sign of the second kick": ("        momentum.sub_(state.grad * (length / 2))\n    return", "    return"),
    "the momentum does not turn": ("turned, -1.0, 1.0", "turned, 1.0, 1.0"),
    "proposals outside pass": ("possible &= (", "possible |= ("),
    "the old gradient is kept": (
        "for a, b in zip(new, old, strict=True)",
        "for a, b in zip((*new[:2], old.grad), old)",
    ),
    "the old energy is kept": (
        "for a, b in zip(new, old, strict=True)",
        "for a, b in zip((new.x, old.energy, new.grad), old)",
    ),
    "half of the step": ("length=(2 * step_size) ** 0.5", "length=step_size**0.5"),
}


def moments_are_right(module) -> bool:
    """Whether MALA of a module passes: a normal at T = .5, free and cut by walls; and its step size is the one said."""
    density, cut = on_the_line(lambda x: x.square().sum(1) / 2, 0.5), truncated(-0.3, 1.2, 0.5)
    walls, right = (-0.3, 1.2), True
    for one, bounds, boundary in ((density, None, "reject"), (cut, walls, "reject"), (cut, walls, "reflect")):
        start = torch.rand(20_000, 1, generator=seeded(5))
        settings = {"num_steps": 40, "step_size": 0.6, "temperature": 0.5, "bounds": bounds, "boundary": boundary}
        x, _ = module.mala(one.energy, start, generator=seeded(6), **settings)
        right = right and bool(one.z_scores(x).abs().max() < 4)
    x, _ = module.mala(lambda x: 0 * x.sum(1), torch.zeros(20_000, 1), num_steps=1, step_size=0.5, generator=seeded(7))
    return right and abs(x.var().item() - 1) < 4 * math.sqrt(2 / 20_000)


@pytest.mark.parametrize("mutation", [None, *MUTATIONS])
def test_a_wrong_sign_would_be_noticed(mutation):
    source = inspect.getsource(metropolis)
    if mutation is not None:
        old, new = MUTATIONS[mutation]
        assert source.count(old) == 1
        source = source.replace(old, new)
    module = types.ModuleType("mutated")
    exec(compile(source, "mutated", "exec"), module.__dict__)
    assert moments_are_right(module) == (mutation is None)


def quartic(x):
    return (x.pow(4) / 4 + x.square()).flatten(1).sum(1)


def trajectory(x, p, step_size, num, walls=None):
    grad = x**3 + 2 * x
    state, end = leapfrog(quartic, State(x, quartic(x), grad), p, step_size, num, walls)
    return state.x, end


@pytest.mark.parametrize("walls", [None, (-0.7, 1.1)])
def test_the_leapfrog_is_reversible_and_keeps_volume(walls):
    x = torch.rand(200, 2, generator=seeded(), dtype=torch.float64) * 1.6 - 0.6
    p = torch.randn(200, 2, generator=seeded(1), dtype=torch.float64)
    y, q = trajectory(x, p, 0.1, 25, walls)
    if walls is not None:
        free, _ = trajectory(x, p, 0.1, 25)
        assert y.min() >= -0.7 and y.max() <= 1.1 and ((free - y).abs().amax(1) > 0.1).float().mean() > 0.5
    back, reversed_p = trajectory(y, -q, 0.1, 25, walls)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(reversed_p, -p, rtol=0, atol=1e-10)
    columns = []
    for i in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[i] = 1e-6
        ends = [torch.cat(trajectory(x + s * shift[:2], p + s * shift[2:], 0.1, 25, walls), 1) for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / 2e-6)
    volumes = torch.linalg.det(torch.stack(columns, 2)).abs()
    torch.testing.assert_close(volumes.median(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-5)
    assert (volumes - 1).abs().quantile(0.95) < 1e-4  # a difference across the moment of a bounce is none


def test_the_leapfrog_s_error_falls_with_the_square_of_the_step():
    x = torch.randn(500, 2, generator=seeded(), dtype=torch.float64)
    p = torch.randn(500, 2, generator=seeded(1), dtype=torch.float64)

    def error(step_size):
        y, q = trajectory(x, p, step_size, round(1.2 / step_size))
        change = quartic(y) + q.square().sum(1) / 2 - quartic(x) - p.square().sum(1) / 2
        return change.square().mean().sqrt().item()

    errors = [error(step_size) for step_size in (0.04, 0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05) and errors[1] / errors[2] == pytest.approx(4, rel=0.02)


def test_reflection_at_walls_any_number_of_times():
    """Against a walk that folds back one wall at a time and reverses its momentum at each."""

    def bounced(x, p, low, high):
        while not low <= x <= high:
            x, p = (2 * low - x if x < low else 2 * high - x), -p
        return x, p

    x, low, high = torch.linspace(-9.0, 9.0, 173), -0.53, 0.71
    expected = torch.tensor([bounced(value, 2.0, low, high) for value in x.tolist()])
    start = x.clone().requires_grad_(True)
    y, turned = reflected(start, (low, high))
    torch.testing.assert_close(y.detach(), expected[:, 0], rtol=0, atol=3e-6)
    assert torch.equal(torch.where(turned, -2.0, 2.0), expected[:, 1])
    (slope,) = torch.autograd.grad(y.sum(), start)
    assert torch.equal(slope, torch.where(turned, -1.0, 1.0)) and torch.equal(start.detach(), x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SAMPLERS)
def test_where_the_energy_is_not_finite_no_chain_goes(name, value):
    sampler, settings = SAMPLERS[name]

    def energy(x):
        return torch.where(x[:, 0] > 0.5, value, x.square().sum(1) / 2)

    x, info = sampler(energy, torch.zeros(2000, 2), num_steps=20, generator=seeded(), **settings)
    assert x.isfinite().all() and x[:, 0].max() <= 0.5 and x[:, 0].max() > 0.3
    assert 0.2 < info.acceptance < 0.95 and info.grad_norm.isfinite()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sick_chain_stays_visible_and_alone(name):
    sampler, settings = SAMPLERS[name]
    start = torch.zeros(3, 2)
    start[1, 0] = math.nan
    x, info = sampler(quartic, start, num_steps=5, generator=seeded(), **settings)
    assert x[1].isnan().any() and x[[0, 2]].isfinite().all() and info.acceptance.isfinite()


@pytest.mark.parametrize("name", SAMPLERS)
def test_pieces_of_a_chain(name):
    """Lists of generators are parts of the batch; steps are steps in turn; layout, start and gradients stay out."""
    sampler, settings = SAMPLERS[name]
    settings = settings | {"bounds": (-1.0, 1.0), "boundary": "reflect"}
    start = torch.rand(8, 1, 4, 4, generator=seeded(1)).requires_grad_(True)
    kept = start.detach().clone()
    together, info = sampler(quartic, start, num_steps=4, generator=[seeded(v) for v in range(4)], **settings)
    for stream, part in enumerate(start.chunk(4)):
        alone, _ = sampler(quartic, part, num_steps=4, generator=seeded(stream), **settings)
        assert torch.equal(together.chunk(4)[stream], alone)
    gens, x = [seeded(v) for v in range(4)], start.to(memory_format=torch.channels_last)
    for _ in range(4):
        x, _ = sampler(quartic, x, num_steps=1, generator=gens, **settings)
    assert torch.equal(x, together)
    assert torch.equal(start, kept) and not together.requires_grad and together.stride() == (16, 1, 4, 1)
    assert all(value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad for value in info)
    scaled, _ = sampler(
        quartic, start, num_steps=4, generator=[seeded(v) for v in range(4)], grad_scale=64.0, **settings
    )
    assert torch.equal(scaled, together)


@pytest.mark.parametrize("name", SAMPLERS)
def test_step_sizes_may_be_tensors(name):
    sampler, settings = SAMPLERS[name]
    tensor = settings | {"step_size": torch.tensor(settings["step_size"])}
    x, _ = sampler(quartic, torch.ones(50, 2), num_steps=5, generator=seeded(), **settings)
    y, _ = sampler(quartic, torch.ones(50, 2), num_steps=5, generator=seeded(), **tensor)
    torch.testing.assert_close(x, y)


def test_temperatures_of_their_own():
    """Annealing: at the last of falling temperatures the chain is a cold one's, from wherever it came."""
    density = on_the_line(lambda x: x.square().sum(1) / 2, 0.1)
    temperatures = [4.0] * 20 + [0.1] * 30
    x, _ = chains_of(density, mala, 0, num_steps=50, step_size=0.6, temperature=temperatures)
    assert density.z_scores(x).abs().max() < 4
    with pytest.raises(ValueError, match="temperature has 2 values for num_steps=3"):
        mala(quartic, torch.zeros(1, 1), num_steps=3, step_size=0.1, temperature=[1.0, 2.0])


def test_what_is_refused():
    for sampler, settings in SAMPLERS.values():
        with pytest.raises(ValueError, match="boundary='clamp' must be 'reject' or 'reflect'"):
            sampler(quartic, torch.zeros(1, 1), num_steps=1, bounds=(-1, 1), boundary="clamp", **settings)


def test_adapted_step_sizes():
    assert adapted(0.5, 0.9, 0.574, 2.0) == pytest.approx(0.5 * math.exp(2 * 0.326))
    assert adapted(0.5, 0.574, 0.574, 2.0) == 0.5
    for step, acceptance in ((0.5, 0.9), (torch.tensor(0.5), 0.9), (0.5, torch.tensor(0.9)), (torch.tensor(0.5),) * 2):
        result = adapted(step, acceptance, 0.6, 1.0)
        assert isinstance(result, torch.Tensor) == any(isinstance(v, torch.Tensor) for v in (step, acceptance))
        assert float(result) == pytest.approx(0.5 * math.exp(float(acceptance) - 0.6))


@pytest.mark.parametrize("first", [1e-3, 20.0])
def test_steps_that_adapt_as_in_training(first):
    """A call a training step, the step size a tensor that follows the acceptance: it reaches .574."""
    density = gaussian()
    step, x, late = torch.tensor(first), torch.zeros(256, 2), []
    noise = seeded()
    for k in range(150):
        x, info = mala(density.energy, x, num_steps=2, step_size=step, generator=noise)
        step = adapted(step, info.acceptance, 0.574, 0.3)
        late += [info.acceptance.item()] if k >= 100 else []
    assert sum(late) / len(late) == pytest.approx(0.574, abs=0.02)
