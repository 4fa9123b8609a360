"""Langevin dynamics against its closed forms: the formula of one step, the moments of a Gaussian's chain."""

import math

import pytest
import torch

from ebm.config import LangevinConfig
from ebm.energies import MLPEnergyFunction
from ebm.samplers import LangevinDynamics, fresh_chains, langevin, schedule, settings_of
from ebm.samplers.base import inside
from ebm.samplers.langevin import move_
from ebm.streams import generator, normal_


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quartic(x):
    """E = sum x^4 / 4, so dE/dx = x^3; each state on its own, bit for bit."""
    return x.pow(4).flatten(1).sum(1) / 4


def images(n=6, shape=(2, 4, 4), seed=1):
    return torch.rand(n, *shape, generator=seeded(seed)) * 3 - 1.5


def noise(x, gen):
    """N(0, 1) of the shape of images, drawn in the order in which channels-last memory holds them."""
    n, c, h, w = x.shape
    return torch.randn(n, h, w, c, generator=gen).permute(0, 3, 1, 2)


class Gaussian:
    """E = sum_d a_d x_d^2 / 2: precision a, variance T / a at temperature T."""

    def __init__(self, *precision):
        self.precision = torch.tensor(precision)

    def __call__(self, x):
        return (self.precision * x.square()).sum(1) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_stationary_variance_of_a_gaussian(temperature):
    """x <- (1 - a h) x + sqrt(2 h T) z has the stationary variance 2 h T / (1 - (1 - a h)^2) = (T / a) / (1 - a h / 2).
    At a h = .2 and 1.2 that is 1.11 and 2.5 times the target's."""
    h, num, precision = 0.2, 40_000, torch.tensor([1.0, 6.0])
    sampler = LangevinDynamics(Gaussian(1.0, 6.0), step_size=h, temperature=temperature)
    x = sampler.sample_chain(initial_points=torch.full((num, 2), 2.0), n_steps=60, generator=seeded())
    expected = temperature / precision / (1 - precision * h / 2)
    assert ((x.var(0) / expected - 1).abs() < 4 * math.sqrt(2 / num)).all()
    assert (x.mean(0).abs() < 4 * (expected / num).sqrt()).all()
    assert abs(torch.corrcoef(x.T)[0, 1]) < 4 / math.sqrt(num)


def test_exact_noise_is_the_default():
    sampler = LangevinDynamics(Gaussian(1.0), step_size=0.02)
    assert sampler.temperature == pytest.approx(1) and sampler.noise_scale == pytest.approx(0.2)
    x = sampler.sample_chain(dim=1, n_samples=20_000, n_steps=150, generator=seeded())
    assert x.var().item() == pytest.approx(1 / 0.99, abs=4 * math.sqrt(2 / 20_000))


def test_mean_decays_geometrically():
    """Without noise, K steps on a quadratic take x to (1 - a h)^K x."""
    x, info = langevin(Gaussian(2.0), torch.full((3, 1), 5.0), num_steps=7, step_size=0.1, noise_scale=0.0)
    torch.testing.assert_close(x, torch.full((3, 1), 5 * 0.8**7))
    assert info.displacement.item() == pytest.approx(5 - 5 * 0.8**7, rel=1e-5)
    assert info.grad_norm.item() == pytest.approx(2 * 5 * 0.8**6, rel=1e-5)
    assert info.saturated == 0


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_one_step_is_the_formula(clamp):
    start = images()
    kept = start.clone()
    x, info = langevin(
        quartic, start, num_steps=1, step_size=0.3, noise_scale=0.7, grad_clamp=clamp, generator=seeded(5)
    )
    z = noise(start, seeded(5))
    gradient = start**3
    drift = gradient if clamp is None else gradient.clip(-clamp, clamp)
    torch.testing.assert_close(x, start - 0.3 * drift + 0.7 * z, rtol=1e-6, atol=1e-6)
    assert info.grad_norm.item() == pytest.approx(gradient.flatten(1).norm(dim=1).mean().item(), rel=1e-5)
    assert info.displacement.item() == pytest.approx((x - start).flatten(1).norm(dim=1).mean().item(), rel=1e-5)
    assert torch.equal(start, kept) and not start.requires_grad and not x.requires_grad
    assert x.data_ptr() != start.data_ptr()


def test_several_steps_are_steps_in_turn():
    start = images()
    settings = {"step_size": 0.1, "noise_scale": 0.3, "grad_clamp": 0.4, "bounds": (-1.0, 1.0)}
    gen, x = seeded(), start
    for _ in range(4):
        x, _ = langevin(quartic, x, num_steps=1, generator=gen, **settings)
    together, _ = langevin(quartic, start, num_steps=4, generator=seeded(), **settings)
    assert torch.equal(x, together)


def test_no_steps_return_a_copy():
    start = images()
    x, info = langevin(quartic, start, num_steps=0, step_size=0.1, noise_scale=0.1)
    assert torch.equal(x, start) and x.data_ptr() != start.data_ptr()
    assert info.displacement == 0


def test_initial_gradients_are_not_followed():
    start = images().requires_grad_(True)
    x, _ = langevin(quartic, start * 1, num_steps=2, step_size=0.1, noise_scale=0.1)
    assert not x.requires_grad
    with torch.no_grad():
        x, _ = langevin(quartic, start, num_steps=1, step_size=0.1, noise_scale=0.0)
    torch.testing.assert_close(x, (start - 0.1 * start**3).detach())


def test_weights_get_no_gradient():
    energy = MLPEnergyFunction(4, 8)
    langevin(energy, images(3, (4,)), num_steps=2, step_size=0.1, noise_scale=0.1)
    assert all(parameter.grad is None for parameter in energy.parameters())


def test_non_finite_states_stay_visible():
    """A chain that diverged must not be made to look sound, by a clamp for one."""
    start = images(2, (3,))
    start[0, 1] = torch.nan
    for boundary in ("clamp", "reflect"):
        x, info = langevin(
            quartic,
            start,
            num_steps=2,
            step_size=0.1,
            noise_scale=0.1,
            grad_clamp=0.1,
            bounds=(-1, 1),
            boundary=boundary,
        )
        assert x[0, 1].isnan() and x[1].isfinite().all() and info.grad_norm.isnan()


def test_clamped_states():
    x, info = langevin(
        quartic, images(), num_steps=5, step_size=0.1, noise_scale=2.0, bounds=(-0.5, 0.75), generator=seeded()
    )
    assert x.min() == -0.5 and x.max() == 0.75
    assert info.saturated.item() == pytest.approx(((x == -0.5) | (x == 0.75)).float().mean().item())
    assert 0.3 < info.saturated < 1


def test_reflection_of_steps_of_any_length():
    """Against a walk that folds back one wall at a time."""

    def folded(value, low, high):
        while not low <= value <= high:
            value = 2 * low - value if value < low else 2 * high - value
        return value

    low, high = -0.5, 0.75
    targets = torch.linspace(-9.0, 9.0, 173)
    start = torch.zeros(len(targets), 1)
    x, _ = langevin(
        lambda x: -(targets * x.squeeze(1)),  # dE/dx = -target: one step of size 1 leads there
        start,
        num_steps=1,
        step_size=1.0,
        noise_scale=0.0,
        bounds=(low, high),
        boundary="reflect",
    )
    expected = torch.tensor([[folded(t, low, high)] for t in targets.tolist()])
    torch.testing.assert_close(x, expected, rtol=0, atol=3e-6)
    assert x.min() >= low and x.max() <= high


def test_states_are_kept_inside_as_the_chain_keeps_them():
    """`inside`, which improved contrastive divergence differentiates, is the end of the chain's update, bit for bit."""
    x = 4 * torch.randn(1000, generator=seeded())
    for boundary in ("clamp", "reflect"):
        for bounds in ((-1.0, 1.0), (-0.53, 0.71), None):
            moved = x.clone()
            move_(moved, torch.zeros_like(x), None, 1.0, 0.0, None, bounds, boundary)
            assert torch.equal(inside(x, bounds, boundary), moved)


def test_reflected_noise_keeps_the_uniform_density():
    """Reflected Brownian motion on an interval is uniform in the end; a clamp would pile mass up on the bounds."""
    x, info = langevin(
        lambda x: 0 * x.sum(1),
        torch.zeros(20_000, 1),
        num_steps=40,
        step_size=1.0,
        noise_scale=0.8,
        bounds=(-1.0, 1.0),
        boundary="reflect",
        generator=seeded(),
    )
    counts = torch.histc(x, bins=10, min=-1, max=1)
    assert ((counts - 2000).abs() < 4.5 * math.sqrt(2000)).all()
    assert info.saturated < 0.001


def test_an_unknown_boundary_is_refused():
    with pytest.raises(ValueError, match="boundary='wrap' must be 'clamp' or 'reflect'"):
        langevin(quartic, images(), num_steps=1, step_size=1, noise_scale=0, bounds=(-1, 1), boundary="wrap")


def test_step_sizes_and_noise_of_their_own():
    steps, noises, start = [0.3, 0.2, 0.0], [0.0, 0.5, 0.1], images()
    x, _ = langevin(quartic, start, num_steps=3, step_size=steps, noise_scale=noises, generator=seeded())
    gen, y = seeded(), start
    for step, scale in zip(steps, noises, strict=True):
        y = y - step * y**3 + (scale * noise(y, gen) if scale else 0)
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["step_size", "noise_scale"])
def test_the_wrong_number_of_steps_is_refused(name):
    settings = {"step_size": 0.1, "noise_scale": 0.1, name: [0.1, 0.2]}
    with pytest.raises(ValueError, match=f"{name} has 2 values for num_steps=3"):
        langevin(quartic, images(), num_steps=3, **settings)


def test_schedules():
    assert schedule("constant", 0.5, None, 3) == schedule("linear", 0.5, None, 3) == [0.5] * 3
    assert schedule("linear", 1.0, 0.0, 5) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert schedule("geometric", 1.0, 0.01, 3) == pytest.approx([1, 0.1, 0.01])
    assert schedule("cosine", 1.0, 0.0, 5) == pytest.approx([1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0])
    assert schedule("cosine", 1.0, 0.0, 1) == [1.0]


def test_settings_of_a_config():
    config = LangevinConfig(
        num_steps=3, step_size=2.0, temperature=0.25, schedule="linear", step_size_end=1.0, noise_scale_end=0.5
    )
    settings = settings_of(config)
    assert settings["step_size"] == [2.0, 1.5, 1.0]
    assert settings["noise_scale"] == pytest.approx([1.0, 0.75, 0.5])  # sqrt(2 * 2 * .25) at the start
    assert len(settings_of(config, 5)["step_size"]) == settings_of(config, 5)["num_steps"] == 5
    x, _ = langevin(quartic, images(), **settings)
    assert x.min() >= -1 and x.max() <= 1


def test_states_stay_float32_where_the_network_computes_in_bfloat16():
    """Steps of 1e-4 from 1 vanish in bfloat16, whose spacing there is .004."""
    total = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(total.weight)
    seen = []

    def energy(x):
        seen.append(x.dtype)
        values = total(x)
        seen.append(values.dtype)
        return values.squeeze(1)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, info = langevin(energy, torch.ones(2, 4), num_steps=50, step_size=1e-4, noise_scale=0.0)
    assert set(seen[::2]) == {torch.float32} and set(seen[1::2]) == {torch.bfloat16}
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.full((2, 4), 0.995))
    assert all(value.dtype == torch.float32 for value in info)
    x, _ = langevin(energy, torch.ones(2, 4, dtype=torch.float64), num_steps=1, step_size=0.1, noise_scale=0.1)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_streams_move_as_if_alone(layout):
    """A list of generators is as many separate runs, whatever streams share the batch."""
    start = images(8).to(memory_format=layout)
    settings = {"num_steps": 5, "step_size": 0.1, "noise_scale": 0.2, "grad_clamp": 0.5, "bounds": (-1.0, 1.0)}

    def run(x, streams):
        return langevin(quartic, x, generator=[generator(0, "chain", v) for v in streams], **settings)[0]

    together = run(start, range(4))
    for stream, part in enumerate(start.chunk(4)):
        alone, _ = langevin(quartic, part, generator=generator(0, "chain", stream), **settings)
        assert torch.equal(together.chunk(4)[stream], alone)
    dealt = run(torch.cat([start[2:4], start[6:8]]), [1, 3])
    assert torch.equal(dealt, torch.cat([together[2:4], together[6:8]]))


def test_the_layout_of_the_initial_states_changes_nothing():
    start = images(8)
    awkward = start.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)  # the batch innermost
    settings = {"num_steps": 3, "step_size": 0.1, "noise_scale": 0.2}
    runs = [
        langevin(quartic, x, generator=[seeded(v) for v in range(4)], **settings)[0]
        for x in (start, start.to(memory_format=torch.channels_last), awkward)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("grad_scale", [1024.0, 2.0**-6])
def test_the_gradients_scale_changes_nothing(grad_scale):
    settings = {"num_steps": 4, "step_size": 0.1, "noise_scale": 0.2, "grad_clamp": 0.3}
    plain, plain_info = langevin(quartic, images(), generator=seeded(), **settings)
    scaled, info = langevin(quartic, images(), generator=seeded(), grad_scale=grad_scale, **settings)
    assert torch.equal(plain, scaled)
    assert all(torch.equal(a, b) for a, b in zip(info, plain_info, strict=True))


FRESH = LangevinConfig(num_steps=3, step_size=0.1, noise_scale=0.1, grad_clamp=None)


def test_the_first_fresh_chains_depend_on_the_seed_alone():
    def fresh(num, seed=0, **settings):
        return fresh_chains(quartic, FRESH, (1, 3, 3), num, 4, seed=seed, **settings)[0]

    many = fresh(150)
    assert many.shape == (150, 1, 3, 3) and len(many.flatten(1).unique(dim=0)) == 150
    for num, block in ((1, 512), (31, 512), (33, 32), (100, 64), (150, 96), (70, 16)):
        assert torch.equal(fresh(num, block=block), many[:num]), (num, block)
    assert not torch.equal(fresh(8, seed=1), many[:8])
    assert many.abs().max() <= 1


def test_fresh_chains_start_uniformly_inside_the_bounds():
    config = LangevinConfig(step_size=1.0, noise_scale=0.0, bounds=(0.0, 3.0))
    x, labels = fresh_chains(lambda x: 0 * x.flatten(1).sum(1), config, (1, 5, 5), 400, 1, seed=0)
    assert labels is None
    counts = torch.histc(x, bins=10, min=0, max=3)
    assert ((counts - 1000).abs() < 4.5 * math.sqrt(1000)).all()


def test_fresh_chains_of_classes():
    """Each chain is pulled to its own label's place."""
    config = LangevinConfig(step_size=0.5, noise_scale=0.0, grad_clamp=None, bounds=(-5.0, 5.0))

    def energy(x, y):
        return (x - y.view(-1, 1, 1, 1)).square().flatten(1).sum(1) / 2

    x, labels = fresh_chains(energy, config, (1, 2, 2), 70, 40, seed=0, num_classes=3, block=32)
    assert labels.tolist() == [i % 3 for i in range(70)]
    torch.testing.assert_close(x, labels.view(-1, 1, 1, 1).float().expand_as(x), rtol=0, atol=1e-4)


class TestLangevinDynamics:
    """The front with the names of the guide."""

    def test_is_langevin(self):
        start = images()
        sampler = LangevinDynamics(quartic, 0.1, noise_scale=0.3, grad_clamp=0.4, bounds=(-1, 1), boundary="reflect")
        x = sampler.sample_chain(initial_points=start, n_steps=5, generator=seeded())
        settings = {"step_size": 0.1, "noise_scale": 0.3, "grad_clamp": 0.4, "bounds": (-1, 1), "boundary": "reflect"}
        assert torch.equal(x, langevin(quartic, start, num_steps=5, generator=seeded(), **settings)[0])

    def test_shapes_and_trajectory(self):
        sampler = LangevinDynamics(quartic, step_size=0.1)
        assert sampler.sample_chain(dim=2, n_samples=7, n_steps=3).shape == (7, 2)
        assert sampler.sample_chain(shape=(1, 4, 4), n_samples=7, n_steps=3).shape == (7, 1, 4, 4)
        settings = {"dim": 2, "n_samples": 7, "n_steps": 20}
        kept = sampler.sample_chain(**settings, burn_in=5, thin=3, return_trajectory=True, generator=seeded())
        every = sampler.sample_chain(**settings, return_trajectory=True, generator=seeded())
        final = sampler.sample_chain(**settings, burn_in=5, thin=3, generator=seeded())
        assert kept.shape == (5, 7, 2) and every.shape == (20, 7, 2)
        assert torch.equal(kept, every[7::3])  # after 8, 11, 14, 17 and 20 steps
        assert torch.equal(final, every[-1]) and torch.equal(final, kept[-1])
        assert sampler.sample_chain(**settings, burn_in=20, return_trajectory=True).shape == (0, 7, 2)

    def test_noise_and_temperature(self):
        assert LangevinDynamics(quartic, 0.1, temperature=0.5).noise_scale == pytest.approx(math.sqrt(0.1))
        assert LangevinDynamics(quartic, 0.1, noise_scale=0.2).temperature == pytest.approx(0.2)
        assert LangevinDynamics(quartic, 0.1, temperature=0).noise_scale == 0
        with pytest.raises(ValueError, match="not both"):
            LangevinDynamics(quartic, 0.1, noise_scale=0.2, temperature=1.0)
        with pytest.raises(ValueError, match="step_size=0 must be above 0"):
            LangevinDynamics(quartic, 0)

    def test_what_it_refuses(self):
        sampler = LangevinDynamics(quartic)
        for where in ({}, {"dim": 2, "initial_points": torch.zeros(1, 2)}):
            with pytest.raises(ValueError, match="initial_points, or by one of shape and dim"):
                sampler.sample_chain(**where)
        for settings in ({"burn_in": 11}, {"burn_in": -1}, {"thin": 0}):
            with pytest.raises(ValueError, match=r"burn_in=.* n_steps=10.*thin="):
                sampler.sample_chain(dim=2, n_steps=10, **settings)

    def test_starts_at_a_normal_inside_the_bounds(self):
        start = LangevinDynamics(quartic).sample_chain(dim=3, n_samples=9, n_steps=0, generator=seeded())
        assert torch.equal(start, normal_(torch.empty(9, 3), seeded()))
        bounded = LangevinDynamics(quartic, bounds=(-0.5, 0.5))
        assert bounded.sample_chain(dim=3, n_samples=99, n_steps=0).abs().max() == 0.5

    def test_compute_type_is_never_the_states(self):
        energy, seen = MLPEnergyFunction(2, 16), []
        energy.body.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        sampler = LangevinDynamics(energy, step_size=0.1)
        settings = {"dim": 2, "n_samples": 50, "n_steps": 10}
        half = sampler.sample_chain(**settings, dtype=torch.bfloat16, generator=seeded())
        full = sampler.sample_chain(**settings, generator=seeded())
        assert half.dtype == full.dtype == torch.float32
        assert seen == [torch.bfloat16] * 10 + [torch.float32] * 10
        assert 0 < (half - full).abs().max() < 0.05


@pytest.mark.parametrize("streams", [1, 3])
def test_chains_that_start_at_data_have_the_full_noise_at_once(streams):
    """Without a gradient: the variances add up. The halves are those of each generator's chains."""
    x = torch.zeros(12_000, 2)
    noises = [0.0, 0.0, 0.1, 0.2]
    generators = [torch.Generator().manual_seed(i) for i in range(streams)]
    found, _ = langevin(
        lambda x: 0.0 * x.sum(1), x, num_steps=4, step_size=1.0, noise_scale=noises, noise_scale_from_data=0.2,
        generator=generators,
    )  # fmt: skip
    first, second = found.view(streams, 2, -1).unbind(1)
    assert first.var().item() == pytest.approx(4 * 0.2**2, rel=0.05)
    assert second.var().item() == pytest.approx(0.1**2 + 0.2**2, rel=0.05)
    same, _ = langevin(
        lambda x: 0.0 * x.sum(1), x, num_steps=4, step_size=1.0, noise_scale=0.2, noise_scale_from_data=0.2,
        generator=[torch.Generator().manual_seed(i) for i in range(streams)],
    )  # fmt: skip
    plain, _ = langevin(
        lambda x: 0.0 * x.sum(1), x, num_steps=4, step_size=1.0, noise_scale=0.2,
        generator=[torch.Generator().manual_seed(i) for i in range(streams)],
    )  # fmt: skip
    torch.testing.assert_close(same, plain)
