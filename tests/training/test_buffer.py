"""The replay buffer: what a step draws and writes is a function of seed, stream and step, never of the ranks."""

import pytest
import torch

from ebm.config import load_config
from ebm.errors import DataError
from ebm.streams import generator, owned_streams
from ebm.training.negatives import ReplayBuffer, fitted_mixture, reinit_probabilities

SHAPE, SLOTS, STREAMS = (2, 3, 3), 10, 4


def make(streams=range(STREAMS), seed=3, slots=SLOTS, **settings):
    return ReplayBuffer(SHAPE, slots, streams, seed, **settings)


def none_broken(draw):
    return torch.zeros(len(draw.x), dtype=torch.bool)


def yes():
    return torch.tensor(True)


def advance(x):
    """A deterministic stand-in for a chain, of each state's own numbers."""
    return (1.7 * x + 0.1).sin()


def rounds(world_size, steps=6, n=4, **settings):
    """Per stream: all draws, and the final states and ages, of a run dealt over `world_size` ranks."""
    seen = {}
    for rank in range(world_size):
        streams = owned_streams(STREAMS, rank, world_size)
        buffer = make(streams, **settings)
        draws = []
        for step in range(1, steps + 1):
            draw = buffer.draw(n, step, 0.3)
            draws.append((draw.slots, draw.reinit, draw.x.view(len(streams), n, *SHAPE)))
            buffer.write(draw, advance(draw.x), 5, yes(), none_broken(draw))
        for index, stream in enumerate(streams):
            state = buffer.stream_state(index)
            seen[stream] = [part[index] for draw in draws for part in draw] + [state["x"], state["age"]]
    return seen


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_gives_the_same_chains(world_size):
    alone, dealt = rounds(1), rounds(world_size)
    assert sorted(dealt) == sorted(alone) == list(range(STREAMS))
    for stream in range(STREAMS):
        assert all(torch.equal(a, b) for a, b in zip(alone[stream], dealt[stream], strict=True))
    assert len({alone[stream][-2].sum().item() for stream in range(STREAMS)}) == STREAMS


def of_classes(n=30_000, noise=0.0, **overrides):
    """The mixture fitted to data of three classes, N(k - 1, S_k) on 18 values, and these data, with labels."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    mix = torch.randn(3, 18, 18, generator=gen) / 18**0.5
    x = (torch.einsum("nij,nj->ni", mix[labels], torch.randn(n, 18, generator=gen)) * 0.3).view(n, *SHAPE)
    x = x + labels.view(-1, 1, 1, 1) - 1.0
    keys = {"sampler.start": "mixture", "sampler.bounds": "[-3,3]", "data.noise_std": noise} | overrides
    config = load_config(None, ["data.shards=d", "data.shape=[2,3,3]", *(f"{k}={v}" for k, v in keys.items())])
    return fitted_mixture(config, x, labels), x, labels


def moments(x):
    return x.flatten(1).mean(0), torch.cov(x.flatten(1).T)


def test_chains_start_in_the_gaussian_of_their_class():
    mixture, x, labels = of_classes(noise=0.2, **{"energy.kind": "conv", "energy.num_classes": "3"})
    drawn = mixture.fill_(torch.empty_like(x), generator(0, "start"), labels)
    for k in range(3):
        (mean, covariance), (own_mean, own) = moments(drawn[labels == k]), moments(x[labels == k])
        torch.testing.assert_close(mean, own_mean, atol=0.02, rtol=0)
        torch.testing.assert_close(covariance, own + 0.04 * torch.eye(18), atol=0.015, rtol=0)
    everything, whole = moments(mixture.fill_(torch.empty_like(x), generator(1, "start"))), moments(drawn)
    torch.testing.assert_close(everything, whole, atol=0.03, rtol=0.05)  # without labels: by the classes' shares
    data = torch.tensor([2, 0, 1, 1] * STREAMS)
    buffer = make(start=mixture, labelled=True)
    draw = buffer.draw(4, 1, 0.0, labels=data)
    assert torch.equal(draw.x.flatten(1).mean(1).round().long() + 1, data)  # though none restarts


def test_chains_without_a_class_start_in_clusters():
    mixture, x, _ = of_classes()
    assert (mixture.shares > 0.03).all() and mixture.classes.unique().tolist() == [0]
    drawn = mixture.fill_(torch.empty(30_000, 2, *SHAPE), generator(0, "start"))  # of two replicas a chain
    for replica in drawn.unbind(1):
        torch.testing.assert_close(moments(replica), moments(x), atol=0.03, rtol=0.06)
    narrow, _, _ = of_classes(**{"sampler.bounds": "[-0.5,0.5]"})
    drawn = narrow.fill_(torch.empty_like(x), generator(0, "start"))
    assert drawn.abs().max() == 0.5
    alone, dealt = rounds(1, start=mixture), rounds(2, start=mixture)
    assert all(torch.equal(a, b) for stream in alone for a, b in zip(alone[stream], dealt[stream], strict=True))
    few, _, _ = of_classes(n=40)
    assert few.shares.tolist() == [1.0] + [0.0] * 9
    with pytest.raises(DataError, match="too few"):
        of_classes(n=6)


def test_new_chains_are_uniform_and_differ():
    buffer = make(slots=2000, start=(-0.5, 1.5))
    assert buffer.x.shape == (8000, *SHAPE) and buffer.x.dtype == torch.float32
    assert -0.5 <= buffer.x.min() < -0.49 and 1.49 < buffer.x.max() <= 1.5
    assert buffer.x.mean().item() == pytest.approx(0.5, abs=4 * (4 / 12 / buffer.x.numel()) ** 0.5)
    assert len(buffer.x.flatten(1).unique(dim=0)) == 8000
    assert (buffer.age == 0).all()
    assert torch.equal(make().x, make().x) and not torch.equal(make().x, make(seed=4).x)


def test_draws_are_without_replacement_and_differ_by_step_and_stream():
    buffer = make()
    draws = [buffer.draw(SLOTS, step, 0.0) for step in range(3)]
    for draw in draws:
        assert torch.equal(draw.slots.sort(1).values, torch.arange(SLOTS).expand(STREAMS, SLOTS))
        assert torch.equal(draw.rows, (draw.slots + SLOTS * torch.arange(STREAMS).unsqueeze(1)).flatten())
        assert torch.equal(draw.x, buffer.x[draw.rows])
    orders = torch.cat([draw.slots for draw in draws])
    assert len(orders.unique(dim=0)) == 3 * STREAMS
    again = buffer.draw(SLOTS, 1, 0.0)
    assert torch.equal(again.rows, draws[1].rows)


def test_every_slot_is_drawn_equally_often():
    buffer, counts, steps = make(streams=[0]), torch.zeros(SLOTS), 2000
    for step in range(steps):
        counts[buffer.draw(3, step, 0.0).slots[0]] += 1
    expected = steps * 3 / SLOTS
    assert ((counts - expected).abs() < 4.5 * (expected * (1 - 3 / SLOTS)) ** 0.5).all()


def test_the_share_of_new_chains():
    buffer = make(slots=5000, start=(2.0, 3.0))
    buffer.x.zero_()
    draw = buffer.draw(5000, 1, 0.2)
    new = (draw.x >= 2).flatten(1)
    assert torch.equal(new.all(1), draw.fresh) and torch.equal(new.any(1), draw.fresh)
    assert torch.equal(draw.reinit.flatten(), draw.fresh)
    assert torch.equal(draw.x[~draw.fresh], torch.zeros(int((~draw.fresh).sum()), *SHAPE))
    assert draw.fresh.float().mean().item() == pytest.approx(0.2, abs=4.5 * (0.16 / 20_000) ** 0.5)
    assert len(draw.x[draw.fresh].flatten(1).unique(dim=0)) == int(draw.fresh.sum())
    assert not buffer.draw(10, 1, 0.0).fresh.any() and buffer.draw(10, 1, 1.0).fresh.all()
    assert not torch.equal(buffer.draw(10, 1, 1.0).x, buffer.draw(10, 2, 1.0).x)


def test_chains_go_back_to_their_own_slots():
    buffer = make()
    before = buffer.x.clone()
    draw = buffer.draw(4, 1, 0.5)
    written = advance(draw.x)
    assert torch.equal(buffer.x, before)  # drawing alone changes nothing
    buffer.write(draw, written, 5, yes(), none_broken(draw))
    assert torch.equal(buffer.x[draw.rows], written)
    others = torch.ones(len(before), dtype=torch.bool)
    others[draw.rows] = False
    assert int(others.sum()) == STREAMS * (SLOTS - 4)
    assert torch.equal(buffer.x[others], before[others]) and (buffer.age[others] == 0).all()


def test_ages_count_the_steps_since_noise():
    buffer, ages = make(), [[0] * SLOTS for _ in range(STREAMS)]
    for step in range(1, 30):
        draw = buffer.draw(4, step, 0.2)
        buffer.write(draw, draw.x, step, yes(), none_broken(draw))
        for stream, (slots, reinit) in enumerate(zip(draw.slots.tolist(), draw.reinit.tolist(), strict=True)):
            for slot, new in zip(slots, reinit, strict=True):
                ages[stream][slot] = step if new else ages[stream][slot] + step
    assert buffer.age.view(STREAMS, SLOTS).tolist() == ages
    assert buffer.age.dtype == torch.int32


def test_a_bad_step_writes_nothing():
    buffer = make()
    draw = buffer.draw(4, 1, 0.5)
    buffer.write(draw, advance(draw.x), 5, yes(), none_broken(draw))
    x, age = buffer.x.clone(), buffer.age.clone()
    draw = buffer.draw(4, 2, 0.5)
    buffer.write(draw, torch.full_like(draw.x, torch.nan), 5, torch.tensor(False), none_broken(draw))
    assert torch.equal(buffer.x, x) and torch.equal(buffer.age, age)


def test_a_stream_moves_to_another_rank():
    source = make([0, 2])
    draw = source.draw(4, 1, 0.2)
    source.write(draw, advance(draw.x), 5, yes(), none_broken(draw))
    saved = {name: tensor.clone() for name, tensor in source.stream_state(1).items()}
    target = make([1, 2, 3])
    neighbours = [target.stream_state(index)["x"].clone() for index in (0, 2)]
    target.load_stream(1, saved)
    assert all(torch.equal(target.stream_state(1)[name], saved[name]) for name in saved)
    assert all(torch.equal(target.stream_state(i)["x"], x) for i, x in zip((0, 2), neighbours, strict=True))
    a, b = source.draw(4, 2, 0.2), target.draw(4, 2, 0.2)
    assert torch.equal(a.x[4:8], b.x[4:8]) and torch.equal(a.slots[1], b.slots[1])


def test_sick_chains_start_again_whatever_became_of_the_step():
    for ok in (True, False):
        buffer = ReplayBuffer((2,), 20, [0, 1], seed=0)
        buffer.age += 7
        before = buffer.x.clone()
        draw = buffer.draw(5, 1, 0.0)
        sick = torch.arange(10) % 3 == 0
        buffer.write(draw, torch.full_like(draw.x, 0.5), 4, torch.tensor(ok), sick)
        assert torch.equal(buffer.x[draw.rows[sick]], draw.noise[sick])
        assert (buffer.age[draw.rows[sick]] == 0).all() and (draw.noise[sick] != before[draw.rows[sick]]).all()
        assert torch.equal(buffer.x[draw.rows[~sick]], torch.full((6, 2), 0.5) if ok else before[draw.rows[~sick]])
        assert (buffer.age[draw.rows[~sick]] == (11 if ok else 7)).all()


def test_chains_kept_in_float16_are_drawn_in_float32_and_lose_no_more_than_its_rounding():
    exact, kept = make(slots=500), make(slots=500, dtype=torch.float16)
    assert kept.x.dtype == torch.float16 and torch.equal(kept.x, exact.x.half())
    for step in range(1, 4):
        a, b = exact.draw(100, step, 0.2), kept.draw(100, step, 0.2)
        assert b.x.dtype == torch.float32 and torch.allclose(a.x, b.x, atol=2e-3) and torch.equal(a.slots, b.slots)
        exact.write(a, a.x * 0.9, 5, yes(), none_broken(a))
        kept.write(b, b.x * 0.9, 5, yes(), none_broken(b))
    before = kept.x.clone()
    draw = kept.draw(100, 9, 0.0)
    kept.write(draw, draw.x + 1, 5, torch.tensor(False), none_broken(draw))
    assert torch.equal(kept.x, before)


def test_restarts_are_spread_over_the_slots_with_the_mean_asked_for():
    probabilities = reinit_probabilities(0.04, 100.0, 257).double()
    assert probabilities.mean().item() == pytest.approx(0.04, rel=1e-6)
    assert (probabilities[0] / probabilities[-1]).item() == pytest.approx(100, rel=1e-5)
    assert (probabilities.log().diff() - probabilities.log().diff().mean()).abs().max() < 1e-5  # even in log
    assert torch.equal(reinit_probabilities(0.04, 1.0, 5), torch.full((5,), 0.04))


def test_a_slot_starts_again_as_often_as_its_probability_says():
    buffer, steps = make(streams=[0]), 4000
    counts = torch.zeros(SLOTS)
    for step in range(steps):
        draw = buffer.draw(SLOTS, step, 0.1, 30.0)
        counts[draw.slots[0]] += draw.reinit[0].float()
    expected = reinit_probabilities(0.1, 30.0, SLOTS)
    assert ((counts / steps - expected).abs() < 5 * (expected / steps).sqrt()).all()
    # Without a spread the same chains start again as by one probability.
    assert torch.equal(buffer.draw(4, 7, 0.3).reinit, buffer.draw(4, 7, 0.3, 1.0).reinit)
