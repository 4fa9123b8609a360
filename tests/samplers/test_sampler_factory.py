"""From a config to a sampler, and all samplers through the engine."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from test_metropolis import quartic, seeded

from ebm.config import HMCConfig, LangevinConfig, MALAConfig, SamplerConfig, TemperingConfig, load_config
from ebm.samplers import (
    Engine,
    advance,
    chain_shape,
    chains_of_lengths,
    cold_states,
    factory,
    fresh_chains,
    hmc,
    langevin,
    mala,
    sampler_of,
    settings_of,
    tempering,
    with_replicas,
)

CONFIGS = [
    LangevinConfig(num_steps=3, step_size=0.1, noise_scale=0.1),
    MALAConfig(num_steps=3, step_size=0.1, temperature=0.5, bounds=(-1.5, 1.0)),
    HMCConfig(num_steps=3, step_size=0.3, num_leapfrog=2, boundary="reject"),
    TemperingConfig(num_steps=4, step_size=0.1, temperatures=(0.5, 1.0, 3.0), swap_every=2),
]
KINDS = [config.kind for config in CONFIGS]
every_kind = pytest.mark.parametrize("config", CONFIGS, ids=KINDS)


def generators(num=4):
    return [seeded(v) for v in range(num)]


def starts(config, num=8, shape=(1, 4, 4)):
    levels = (config.levels,) if config.kind == "tempering" else ()
    return torch.rand(num, *levels, *shape, generator=seeded(1)) * 2 - 1


def test_kinds():
    parse = TypeAdapter(SamplerConfig).validate_python
    assert [parse(config.model_dump(mode="json")) for config in CONFIGS] == CONFIGS
    assert parse({"num_steps": 7}) == LangevinConfig(num_steps=7)  # as it was before there were others
    assert parse({"kind": "mala"}).target_acceptance == 0.574
    for wrong, words in (
        ({"kind": "gibbs"}, "'langevin', 'mala', 'hmc', 'tempering'"),
        ({"kind": "mala", "noise_scale": 0.1}, "noise_scale"),
        ({"kind": "mala", "temperature": 0}, "greater than 0"),
        ({"kind": "hmc", "num_leapfrog": 0}, "num_leapfrog"),
        ({"kind": "hmc", "bounds": [1, 0]}, r"bounds \(1.0, 0.0\) must be \(low, high\) with low < high"),
        ({"kind": "tempering", "temperatures": [1, 3, 2]}, r"temperatures \(1.0, 3.0, 2.0\) must ascend"),
        ({"kind": "tempering", "temperatures": [1]}, "at least 2"),
        ({"kind": "tempering", "num_steps": 5, "swap_every": 6}, "swap_every=6 is above num_steps=5"),
        ({"temperature_end": 0.1, "schedule": "linear"}, "temperature_end goes with temperature"),
        ({"temperature": 1, "temperature_end": 0.1}, "schedule other than constant"),
    ):
        with pytest.raises(ValidationError, match=words):
            parse(wrong)


def test_the_kind_that_is_the_default_keeps_the_file_s_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {shards: d}\nsampler: {num_steps: 7}\n")
    assert load_config(path, ["sampler.kind=langevin"]).sampler.num_steps == 7


@every_kind
def test_what_every_kind_tells(config):
    halved = config.scaled(0.5)
    assert halved.step_size == config.step_size / 2 and halved.kind == config.kind
    assert config.implied_temperature == pytest.approx({"langevin": 0.05, "hmc": 1.0}.get(config.kind, 0.5))
    assert config.levels == (3 if config.kind == "tempering" else 1)
    calls = []

    def energy(x):
        calls.append(len(x) // 8)
        return quartic(x)

    sampler, settings = sampler_of(config)
    x = starts(config)
    sampler(energy, x, generator=seeded(), **settings)
    assert sum(calls) == config.evaluations
    assert config.last_step_size == {"langevin": 0.1, "hmc": pytest.approx(0.045)}.get(config.kind, 0.1)


@every_kind
def test_replicas_and_cold_states(config):
    x = torch.rand(8, 1, 4, 4, generator=seeded(1))
    states = with_replicas(config, x)
    assert states.shape == (8, *chain_shape(config, (1, 4, 4))) and states.is_contiguous()
    assert chain_shape(config, (1, 4, 4)) == ((3, 1, 4, 4) if config.kind == "tempering" else (1, 4, 4))
    assert torch.equal(cold_states(config, states), x)
    sampler, settings = sampler_of(config)
    moved, _ = sampler(quartic, states, generator=seeded(), **settings)
    assert cold_states(config, moved).shape == x.shape


def test_the_sampler_of_a_config():
    common = {"num_steps": 3, "step_size": 0.1}
    assert sampler_of(CONFIGS[0]) == (langevin, settings_of(CONFIGS[0]))
    assert sampler_of(CONFIGS[1]) == (
        mala,
        common | {"temperature": 0.5, "bounds": (-1.5, 1.0), "boundary": "reflect"},
    )
    bounds = {"bounds": (-1.0, 1.0)}
    more = bounds | {"temperature": 1.0, "boundary": "reject", "num_leapfrog": 2}
    assert sampler_of(CONFIGS[2], step_size=0.2) == (hmc, {"num_steps": 3, "step_size": 0.2} | more)
    more = bounds | {"temperatures": (0.5, 1.0, 3.0), "boundary": "reflect", "swap_every": 2}
    assert sampler_of(CONFIGS[3], 9) == (tempering, {"num_steps": 9, "step_size": 0.1} | more)
    annealed = LangevinConfig(step_size=1.0, schedule="linear", step_size_end=0.5)
    assert sampler_of(annealed, 3, step_size=2.0)[1]["step_size"] == [2.0, 1.5, 1.0]


SCALED = {
    "constant": LangevinConfig(step_size=0.4, noise_scale=0.3),
    "temperature": LangevinConfig(step_size=0.4, temperature=0.7),
    "linear": LangevinConfig(step_size=0.4, noise_scale=0.3, schedule="linear", step_size_end=0.1, noise_scale_end=0.2),
    "cosine": LangevinConfig(step_size=0.4, noise_scale=0.3, schedule="cosine", step_size_end=0.1),
    "geometric": LangevinConfig(step_size=0.4, noise_scale=0.3, schedule="geometric", noise_scale_end=0.01),
    "cooled": LangevinConfig(step_size=0.4, temperature=2.0, temperature_end=0.5, schedule="linear"),
    "cooled by noise": LangevinConfig(step_size=0.4, temperature=2.0, noise_scale_end=0.1, schedule="linear"),
    "mala": MALAConfig(step_size=0.4, temperature=0.7),
    "hmc": HMCConfig(step_size=0.4, temperature=0.7),
    "tempering": TemperingConfig(step_size=0.4, temperatures=(0.7, 1.4)),
}


@pytest.mark.parametrize("factor", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_steps_sample_at_the_same_temperatures(name, factor):
    config, scaled = SCALED[name], SCALED[name].scaled(factor)
    assert scaled.implied_temperature == pytest.approx(config.implied_temperature, rel=1e-12)
    (_, before), (_, after) = sampler_of(config), sampler_of(scaled)
    if config.kind != "langevin":
        assert after == before | {"step_size": 0.4 * factor}
        return
    temperatures = [
        [noise**2 / (2 * step) for step, noise in zip(each["step_size"], each["noise_scale"], strict=True)]
        for each in (before, after)
    ]
    assert temperatures[1] == pytest.approx(temperatures[0], rel=1e-12)
    assert after["step_size"] == pytest.approx([step * factor for step in before["step_size"]], rel=1e-12)
    assert config.scaled(1.0) == config
    _, given = sampler_of(config, step_size=0.4 * factor)  # goes the same way
    for name in ("step_size", "noise_scale"):
        assert given[name] == pytest.approx(after[name], rel=1e-12)


@pytest.mark.parametrize("factor", [1.0, 0.1])
def test_a_gaussian_s_chain_has_its_variance_at_scaled_steps(factor):
    """Noise .3 at steps of .4 is T = .1125: the chain of E = x^2 / 2 has the variance T / (1 - step / 2)."""
    config = LangevinConfig(step_size=0.4, noise_scale=0.3, grad_clamp=None, bounds=None).scaled(factor)
    sampler, settings = sampler_of(config, num_steps=round(20 / factor))
    x, _ = sampler(lambda x: x.square().sum(1) / 2, torch.zeros(20_000, 1), generator=seeded(), **settings)
    expected = 0.1125 / (1 - 0.2 * factor)
    assert x.var().item() == pytest.approx(expected, rel=4 * (2 / 20_000) ** 0.5)


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.3, 0.1, 0.01, 1 / 3, 2.0])
def test_a_scaled_flow_ends_at_the_same_time(factor):
    config = LangevinConfig(num_steps=24, step_size=0.05, temperature=0.3, schedule="flow", flow_end=0.8)
    scaled = config.scaled(factor)
    end = scaled.num_steps * scaled.step_size
    assert 1.2 - 1e-9 <= end < 1.2 + scaled.step_size - 1e-9
    if factor in (0.5, 0.1, 0.01, 1 / 3, 2.0):
        assert end == pytest.approx(1.2)
    _, settings = sampler_of(scaled)
    assert settings["num_steps"] == len(settings["noise_scale"]) == scaled.num_steps == scaled.evaluations
    for k, noise in enumerate(settings["noise_scale"]):
        temperature = 0.3 * min(max(0, k * scaled.step_size - 0.8) / 0.2, 1)
        assert noise == pytest.approx((2 * scaled.step_size * temperature) ** 0.5, abs=1e-9)


def test_an_adapted_step_size_replaces_the_config_s():
    step = torch.tensor(0.025)
    for config in CONFIGS[1:]:
        _, settings = sampler_of(config.scaled(0.1), step_size=step)
        assert settings["step_size"] is step
        assert settings == sampler_of(config)[1] | {"step_size": step}
    with pytest.raises(AssertionError, match="must be a number"):
        sampler_of(CONFIGS[0], step_size=step)


@every_kind
def test_every_sampler_refuses_empty_bounds_and_unknown_boundaries(config):
    sampler, settings = sampler_of(config)
    other = "reject" if config.kind == "langevin" else "clamp"
    for changes, words in (
        ({"bounds": (1.0, -1.0)}, r"bounds \(1.0, -1.0\) must be \(low, high\) with low < high"),
        ({"boundary": other}, f"boundary='{other}' must be '.*' or 'reflect'"),
        ({"boundary": other, "bounds": None}, f"boundary='{other}' must be"),
    ):
        with pytest.raises(ValueError, match=words):
            sampler(quartic, starts(config), generator=seeded(), **settings | changes)


def test_langevin_annealed_in_temperature():
    config = LangevinConfig(num_steps=3, step_size=0.5, temperature=4.0, temperature_end=1.0, schedule="geometric")
    assert settings_of(config)["noise_scale"] == pytest.approx([2.0, 2**0.5, 1.0])
    assert settings_of(config)["step_size"] == [0.5] * 3


@pytest.mark.parametrize("threads", [1, 2, 4])
@every_kind
def test_the_engine_gives_the_function_s_chains(monkeypatch, config, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sampler, settings = sampler_of(config)
    x = starts(config)
    expected, info = sampler(quartic, x, generator=generators(), **settings)
    out, told = Engine(quartic)(sampler, x, generator=generators(), **settings)
    assert torch.equal(out, expected) and type(told) is type(info)
    torch.testing.assert_close(torch.stack(told), torch.stack(info))


@pytest.mark.parametrize("threads", [1, 2])
@every_kind
def test_labels_go_with_their_chains(monkeypatch, config, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def energy(x, y):
        return 500 * (x - y.view(-1, 1, 1, 1) / 4).square().flatten(1).sum(1)

    labels, start = torch.arange(8) % 4, torch.rand(8, 1, 4, 4, generator=seeded(1))
    changes = {"bounds": None, "step_size": 0.03 if config.kind == "hmc" else 5e-4}
    changes |= {"noise_scale": 0.0, "grad_clamp": None} if config.kind == "langevin" else {}
    config = config.model_copy(update=changes)
    x = advance(Engine(energy), config, start, labels, num_steps=60, generator=generators())
    assert x.shape == (8, 1, 4, 4)
    assert ((x.mean((1, 2, 3)) - labels / 4).abs() < 0.08).all()


@every_kind
def test_fresh_chains_of_every_kind(config):
    def fresh(num, **settings):
        return fresh_chains(quartic, config, (1, 3, 3), num, 4, seed=0, **settings)[0]

    many = fresh(100)
    assert many.shape == (100, 1, 3, 3) and len(many.flatten(1).unique(dim=0)) == 100
    assert torch.equal(fresh(33, block=32), many[:33])
    assert config.bounds[0] <= many.min() and many.max() <= config.bounds[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_a_captured_chain_of_every_kind_is_the_plain_one(config, capsys):
    """The step size is a tensor that adapts: an input of one graph, not a reason for another."""
    sampler, settings = sampler_of(config)
    engine, plain = Engine(quartic), Engine(quartic, capture=False)
    noise, x = [torch.Generator("cuda") for _ in range(4)], starts(config).cuda()
    for round_, step_size in enumerate((0.1, 0.05, 0.2)):
        if config.kind != "langevin":
            settings["step_size"] = torch.tensor(step_size, device="cuda")
        out = []
        for run in (engine, plain):
            for stream, one in enumerate(noise):
                one.manual_seed(10 * round_ + stream)
            out.append(run(sampler, x, generator=noise, **settings))
        torch.testing.assert_close(out[0][0], out[1][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.stack(out[0][1]), torch.stack(out[1][1]), rtol=1e-4, atol=1e-5)
    assert engine.capture and len(engine._graphs) == 1 and capsys.readouterr().out == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_long_fresh_chains_are_captured_and_the_plain_ones(config, monkeypatch):
    def fresh():
        lengths = (150, 500)  # the first ends with half a stretch
        return chains_of_lengths(quartic, config, (1, 3, 3), 40, lengths, seed=0, device="cuda")[0]

    captured = fresh()
    monkeypatch.setattr(factory, "CAPTURED", 100)
    for length, x in fresh().items():
        torch.testing.assert_close(captured[length], x, rtol=0, atol=1e-4)
