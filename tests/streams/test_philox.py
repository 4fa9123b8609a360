"""Philox: known answers, moments, uniformity, independence of streams, steps and draws; the kernels agree with it."""

import os
import subprocess
import sys

import pytest
import torch
from scipy import stats

from ebm.samplers import hmc, langevin, mala
from ebm.samplers.base import initial_
from ebm.samplers.levels import tempering
from ebm.streams import (
    Philox,
    StreamGenerators,
    derive_seed,
    normal_,
    normals,
    philox4x32,
    plain_fill,
    uniform_,
    words,
)

# "kat_vectors" of the authors' library Random123, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def integers(text):
    return [torch.tensor(int(word, 16)) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert [int(word) for word in philox4x32(integers(counter), integers(key))] == [int(w) for w in integers(result)]


def test_key_and_counter_of_a_word():
    seed = (0x299F31D0 << 32) + 0xA4093822
    found = words(torch.tensor([5, seed]), torch.tensor(3), 4, 10)
    assert found.shape == (2, 3, 4)
    expected = philox4x32([torch.tensor(i) for i in (2, 7, 0, 0)], integers("a4093822 299f31d0"))
    assert found[1, 2].tolist() == [int(word) for word in expected]


def seeds(streams, purpose="chain", step=0):
    return [derive_seed(3, purpose, stream, step) for stream in streams]


def test_each_stream_fills_its_part_as_if_alone():
    for fill in (normal_, uniform_):
        together = Philox(seeds(range(4)))
        draws = [fill(torch.empty(8, 3, 5, 7), together) for _ in range(3)]
        for stream in range(4):
            alone = Philox(seeds([stream]))
            for draw in draws:
                assert torch.equal(fill(torch.empty(2, 3, 5, 7), alone), draw.chunk(4)[stream])
        pair = Philox(seeds([1, 3]))  # as a rank of two owns them
        assert torch.equal(fill(torch.empty(4, 3, 5, 7), pair), torch.cat([draws[0].chunk(4)[v] for v in (1, 3)]))


def test_a_larger_part_begins_with_the_numbers_of_a_smaller():
    large, small = (normal_(torch.empty(n, 7), Philox(seeds([0]))) for n in (9, 4))
    assert torch.equal(large[:4], small)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_is_filled_in_its_own_order(layout):
    x = normal_(torch.empty(4, 3, 5, 7).to(memory_format=layout), Philox(seeds(range(2))))
    flat = x.permute(0, 2, 3, 1).flatten() if layout == torch.channels_last else x.flatten()
    assert torch.equal(flat, normal_(torch.empty(4, 105), Philox(seeds(range(2)))).flatten())


def test_numbers_go_on_and_begin_anew():
    source = Philox(seeds(range(2)))
    first, second = (normal_(torch.empty(2, 50), source) for _ in range(2))
    assert source.draws == 2 and not torch.equal(first, second)
    source.reseed(seeds(range(2)))
    assert torch.equal(normal_(torch.empty(2, 50), source), first)
    source.reseed(seeds(range(2)))
    source.first.fill_(1)  # as a replay of a graph goes on from its caller's draws
    assert torch.equal(normal_(torch.empty(2, 50), source), second)


N = 200_000


def test_moments_and_distribution():
    z = normal_(torch.empty(4, N // 4), Philox(seeds(range(4)))).flatten()
    assert abs(z.mean()) < 4 / N**0.5 and abs(z.var() - 1) < 4 * (2 / N) ** 0.5
    assert abs(z.pow(3).mean()) < 4 * (15 / N) ** 0.5 and abs(z.pow(4).mean() - 3) < 4 * (96 / N) ** 0.5
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    u = uniform_(torch.empty(4, N // 4), Philox(seeds(range(4)))).flatten()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    for lane in range(4):  # each word of a counter
        assert stats.kstest(u[lane::4].numpy(), "uniform").pvalue > 1e-3
    shifted = uniform_(torch.empty(4, N // 4), Philox(seeds(range(4))), -3.0, 1.0)
    assert shifted.min() >= -3 and shifted.max() < 1 and torch.allclose(shifted.flatten(), 4 * u - 3, atol=1e-6)


def test_the_largest_words_stay_in_their_range():
    extreme = torch.tensor([[0, 0, 2**32 - 1, 2**32 - 1], [2**32 - 1, 0, 0, 2**32 - 1]])
    assert normals(extreme).isfinite().all() and normals(extreme).abs().max() < 6.8


def test_streams_steps_purposes_and_draws_are_independent():
    rows = [normal_(torch.empty(3, N // 10), Philox(seeds(range(3), *at))) for at in (("chain", 0), ("chain", 1))]
    rows.append(normal_(torch.empty(3, N // 10), Philox(seeds(range(3), "start", 0))))
    source = Philox(seeds(range(3), "loss"))
    rows += [normal_(torch.empty(3, N // 10), source) for _ in range(2)]
    correlations = torch.corrcoef(torch.cat(rows))
    correlations.fill_diagonal_(0)
    assert correlations.abs().max() < 5 / (N // 10) ** 0.5
    z = torch.cat(rows).flatten()
    for lag in (1, 2, 3, 4, 8, 1024):  # within a draw, also of the squares: pairs of Box and Muller share a radius
        for x in (z, z.square() - 1):
            assert abs((x[:-lag] * x[lag:]).mean() / x.square().mean()) < 5 / len(z) ** 0.5


def test_other_types_and_parts_that_do_not_divide():
    double = normal_(torch.empty(4, 9, dtype=torch.float64), Philox(seeds(range(2))))
    assert torch.equal(double.float(), normal_(torch.empty(4, 9), Philox(seeds(range(2)))))
    with pytest.raises(ValueError, match="batch of 5 can't be cut into 2 equal parts"):
        normal_(torch.empty(5, 2), Philox(seeds(range(2))))


def energy(x):
    return (x - 0.3).square().flatten(1).sum(1)


@pytest.mark.parametrize("sampler", [langevin, mala, hmc, tempering])
def test_a_chain_of_two_streams_is_the_two_chains_of_one(sampler):
    settings = {"num_steps": 5, "step_size": 0.05, "bounds": (-1.0, 1.0), "boundary": "reflect"}
    settings |= {"noise_scale": 0.2} if sampler is langevin else {}
    settings |= {"num_leapfrog": 2} if sampler is hmc else {}
    settings |= {"temperatures": (0.5, 1.0, 2.0)} if sampler is tempering else {}
    shape = (3, 5, 5) if sampler is tempering else (3, 5)
    x = initial_(torch.empty(8, *shape), Philox(seeds(range(2), "start")), (-1.0, 1.0))
    both, _ = sampler(energy, x, generator=Philox(seeds(range(2))), **settings)
    for stream in range(2):
        alone, _ = sampler(energy, x.chunk(2)[stream], generator=Philox(seeds([stream])), **settings)
        torch.testing.assert_close(both.chunk(2)[stream], alone)
    assert (both - x).abs().mean() > 0.05


def test_stream_generators_on_a_gpu_are_a_counter():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    random = StreamGenerators(3, [1, 5], "cuda")
    source = random("chain", 10)
    assert isinstance(source, Philox)
    x = normal_(torch.empty(6, 1000, device="cuda"), source)
    again = normal_(torch.empty(6, 1000, device="cuda"), random("chain", 10))
    expected = normal_(torch.empty(6, 1000), Philox([derive_seed(3, "chain", v, 10) for v in (1, 5)]))
    assert torch.equal(x, again) and torch.allclose(x.cpu(), expected, atol=1e-5)


INTERPRETED = """
import torch
from ebm.streams import Philox, plain_fill
from ebm.kernels import fill
from ebm.kernels import move_ as fused
from ebm.samplers.langevin import move_

seeds = [5, 2**63 - 1, 0x299F31D0A4093822]
first = torch.tensor(2**32 - 1)  # the number of the draw wraps around like the kernel's 32 bits
for kind in ("normal", "uniform"):
    for size in (1, 5, 1024, 1031):
        for draw in (0, 1, 16):
            a, b = torch.empty(3 * size), torch.empty(3 * size)
            plain_fill(a, torch.tensor(seeds), first, draw, kind)
            fill(b, torch.tensor(seeds), first, draw, kind)
            assert torch.equal(a, b) if kind == "uniform" else torch.allclose(a, b, atol=2e-6), (kind, size, draw)

x = torch.randn(6, 3, 9, 7, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
grad = torch.randn(6, 3, 9, 7, generator=torch.Generator().manual_seed(1))
a, b = x.clone(), x.clone()
sources = Philox(seeds), Philox(seeds)
for _ in range(3):
    for move, state, source in zip((move_, fused), (a, b), sources):
        move(state, grad, source, 0.1, 0.4, 0.3, (-1.0, 1.0), "reflect")
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(b, x, atol=0.1)
assert sources[0].draws == sources[1].draws == 3
print("equal")
"""


def test_the_kernels_draw_the_same_numbers():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_the_device(kind):
    from ebm.kernels import fill

    own = torch.tensor(seeds(range(3)), device="cuda")
    first = torch.zeros((), dtype=torch.int64, device="cuda")
    on_device, plain = torch.empty(3 * 10_001, device="cuda"), torch.empty(3 * 10_001)
    for draw in (0, 1, 16):
        fill(on_device, own, first, draw, kind)
        plain_fill(plain, own.cpu(), first.cpu(), draw, kind)
        assert torch.allclose(on_device.cpu(), plain, atol=0 if kind == "uniform" else 1e-5)
