"""Where chains start: those of a class-conditional energy follow the classes of the data."""

import pytest
import torch
from safetensors.torch import save_file
from test_step import new_state  # noqa: F401

from ebm.config import load_config, validate
from ebm.energies import UNetEnergyFunction
from ebm.errors import ConfigError
from ebm.losses import contrastive_divergence
from ebm.streams import StreamGenerators, generator
from ebm.training.loop import take_field
from ebm.training.negatives import ReplayBuffer, initial_states

SHARES = torch.tensor([0.1, 0.9])
MEANS = torch.tensor([-2.0, 1.0])  # of each class: x | y is N(MEANS[y], 1)
SLOTS, STREAMS, BATCH = 400, 2, 40


def classes(n: int, step: int) -> torch.Tensor:
    return torch.multinomial(SHARES, n, replacement=True, generator=generator(0, "classes", step=step))


def test_perfect_chains_of_unequal_classes_leave_the_class_weights_alone():
    """E(x, y) = (x - MEANS[y])^2 / 2 + b[y]: with chains that are exact samples given their class, the gradient of b is
    the difference between the shares of the classes in data and chains."""
    buffer = ReplayBuffer((1,), SLOTS, range(STREAMS), 0, labelled=True)
    b = torch.zeros(2, requires_grad=True)

    def energy(x, y):
        return (x[:, 0] - MEANS[y]).square() / 2 + b[y]

    for step in range(1, 401):
        y_pos = classes(BATCH, step)
        draw = buffer.draw(BATCH // STREAMS, step, 0.1, labels=y_pos)
        noise = torch.randn(2, BATCH, 1, generator=generator(0, "x", step=step))
        x_pos, x_neg = MEANS[y_pos][:, None] + noise[0], MEANS[draw.labels][:, None] + noise[1]
        contrastive_divergence(energy, x_pos, x_neg, y_pos=y_pos, y_neg=draw.labels).loss.backward()
        buffer.write(draw, x_neg, 10, torch.tensor(True), torch.zeros(BATCH, dtype=torch.bool))
    # Each step's shares have a standard deviation of .3 / sqrt(40) in data and in chains.
    assert (b.grad / 400).abs().max() < 4 * 0.3 * (2 / 40 / 400) ** 0.5 + 0.01
    assert buffer.labels.float().mean().item() == pytest.approx(0.9, abs=4 * 0.3 / (SLOTS * STREAMS) ** 0.5)


def test_a_chain_keeps_its_class_until_it_restarts():
    buffer = ReplayBuffer((1,), 8, [0], 0, labelled=True)
    fine, step = torch.zeros(8, dtype=torch.bool), 1
    first = buffer.draw(8, step, 0.0, labels=torch.arange(8) % 3)
    assert first.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1], "a chain that was never drawn takes the datum's class"
    buffer.write(first, first.x, 5, torch.tensor(True), fine)
    kept = buffer.labels.clone()
    for step in range(2, 20):
        draw = buffer.draw(8, step, 0.3, labels=torch.full((8,), 7))
        expected = torch.where(draw.fresh, 7, kept[draw.rows])
        assert torch.equal(draw.labels, expected)
        finite = torch.tensor(step % 5 != 0)
        buffer.write(draw, draw.x, 5, finite, fine)
        if finite:
            kept[draw.rows] = expected
        assert torch.equal(buffer.labels, kept), "a skipped step changes no class"


def test_classes_of_chains_do_not_depend_on_the_ranks():
    whole = ReplayBuffer((1,), 16, [0, 1], 3, labelled=True)
    halves = [ReplayBuffer((1,), 16, [v], 3, labelled=True) for v in (0, 1)]
    for step in range(1, 6):
        y = classes(8, step)
        for buffer, labels in ((whole, y), *zip(halves, y.chunk(2), strict=True)):
            draw = buffer.draw(4, step, 0.5, labels=labels)
            n = len(draw.x)
            buffer.write(draw, draw.x, 1, torch.tensor(True), torch.zeros(n, dtype=torch.bool))
    assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))


def test_fewer_chains_a_stream_than_classes_are_refused():
    values = {"data": {"shards": "d", "streams": 4}, "energy": {"num_classes": 10}, "train": {"batch_size": 32}}
    with pytest.raises(ConfigError, match=r"buffer\.size=36 .*raise buffer\.size to 40 or more"):
        validate(values | {"buffer": {"size": 36}}, "config")
    validate(values | {"buffer": {"size": 40}}, "config")


def test_half_of_the_chains_of_energy_matching_start_at_data():
    """The first half of what is computed at a time: with two streams in two parts each, of four data."""
    config = load_config(
        None,
        [
            "loss.kind=energy_matching", "loss.warmup_steps=0", "sampler.schedule=flow", "sampler.start=normal",
            "sampler.temperature=0.1", "train.accumulate=2", "data.streams=2", "train.batch_size=16",
        ],
    )  # fmt: skip
    x = torch.arange(16.0).view(16, 1) + 100
    found = initial_states(config, StreamGenerators(0, [0, 1]), None, x, None, step=1)
    at_data = found.x.squeeze(1) > 50
    assert at_data.view(4, 4).tolist() == [[True, True, False, False]] * 4
    assert torch.equal(found.x[at_data], x[at_data])
    plain = config.model_copy(update={"loss": config.loss.model_copy(update={"from_data": False})})
    noise = initial_states(plain, StreamGenerators(0, [0, 1]), None, x, None, step=1)
    assert torch.equal(noise.x[~at_data], found.x[~at_data]) and noise.x.abs().max() < 50
    odd = ["train.batch_size=6", "train.accumulate=1"]
    with pytest.raises(ConfigError, match="which is 3"):
        load_config(None, ["loss.kind=energy_matching", "sampler.schedule=flow", "sampler.start=normal",
                           "sampler.temperature=0.1", "data.streams=2", *odd])  # fmt: skip


def test_a_field_that_is_never_used_is_refused():
    flow = ["loss.kind=energy_matching", "sampler.schedule=flow", "sampler.start=normal", "sampler.temperature=0.1"]
    assert load_config(None, [*flow, "loss.field=a:b"]).loss.trained_field == "a:b"
    for unused in ("loss.warmup_steps=0", "loss.flow_weight=0"):
        with pytest.raises(ConfigError, match=r"loss\.field=a:b is for the flow .* or loss\.field=null"):
            load_config(None, [*flow, "loss.field=a:b", unused])


def test_the_second_phase_has_averages_of_its_own():
    loss = load_config(None, ["loss.kind=energy_matching", "loss.warmup_steps=3", "sampler.schedule=flow",
                              "sampler.start=normal", "sampler.temperature=0.1"]).loss  # fmt: skip
    assert [loss.ema_decay_at(step, 0.9999) for step in (1, 3, 4)] == [0.9999, 0.9999, 0.99]
    kept = loss.model_copy(update={"second_ema_decay": None})
    assert kept.ema_decay_at(4, 0.9999) == 0.9999


def test_a_chain_restarts_in_its_own_state_augmented():
    """One that has run: a constant picture of value c becomes one of a c + b; a new one starts in noise."""
    config = load_config(None, ["buffer.restart=augmented", "buffer.reinit_prob=0.5", "sampler.bounds=[-2,2]"])
    buffer = ReplayBuffer((1, 8, 8), 64, [0, 1], 0)
    buffer.x[:] = torch.linspace(-1, 1, 128).view(-1, 1, 1, 1)
    buffer.age[::2] = 20
    x = torch.zeros(64, 1, 8, 8)
    start = initial_states(config, StreamGenerators(0, [0, 1]), buffer, x, None, step=3)
    draw, before = start.draw, buffer.x[start.draw.rows]
    ran = buffer.age[draw.rows] > 0
    assert torch.equal(start.x[~draw.fresh], before[~draw.fresh])
    assert torch.equal(start.x[draw.fresh & ~ran], draw.noise[draw.fresh & ~ran])
    again = start.x[draw.fresh & ran]
    assert len(again) > 5 and (again.flatten(1).std(1) < 1e-6).all()
    off = again[:, 0, 0, 0] - before[draw.fresh & ran][:, 0, 0, 0]
    assert (off.abs() <= 0.5 * before[draw.fresh & ran][:, 0, 0, 0].abs() + 0.25).all() and len(set(off.tolist())) > 5
    again_ = initial_states(config, StreamGenerators(0, [0, 1]), buffer, x, None, step=3)
    assert torch.equal(again_.x, start.x)
    with pytest.raises(ConfigError, match="restart=augmented"):
        load_config(None, ["buffer.restart=augmented", "data.shape=[2]", "energy.kind=mlp"])


def test_a_run_starts_from_a_field(new_state, tmp_path):  # noqa: F811
    settings = ["energy.kind=unet", "energy.features=[4,8]", "energy.head=quadratic"]
    field = UNetEnergyFunction(1, 8, 8, (4, 8))
    save_file(field.state_dict(), tmp_path / "field.safetensors")
    state = new_state(*settings)
    take_field(state, str(tmp_path / "field.safetensors"))
    x = torch.rand(2, 1, 8, 8)
    for energy in (state.energy, state.ema):
        torch.testing.assert_close(energy.field(x), -field.field(x))
    for other, words in ((["energy.features=[4,4]"], "this config's sizes"), (["energy.norm=none"], "other weights")):
        with pytest.raises(ConfigError, match=words):
            take_field(new_state(*settings, *other), str(tmp_path / "field.safetensors"))
    with pytest.raises(ConfigError, match=r"energy\.kind=unet"):
        take_field(new_state(), str(tmp_path / "field.safetensors"))
