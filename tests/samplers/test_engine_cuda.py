"""The engine on a GPU: a capture that fails leaves the process as it was; so does a missing C compiler."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from test_engine import SETTINGS, generators

from ebm.samplers import Engine, hmc, langevin, mala
from ebm.samplers.engine import CapturedUpdate
from ebm.streams import Philox

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def reads_the_device(x):
    """E = |x|^2, times 1 or 2 by a value that is read on the host."""
    return x.square().flatten(1).sum(1) * (2.0 if x.sum().item() > 0 else 1.0)


def copies_from_the_host(x):
    return x.square().flatten(1).sum(1) * torch.tensor([2.0], device=x.device)


def plain(x):
    return x.square().flatten(1).sum(1)


def start(seed=0):
    return torch.rand(32, 3, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize("energy", [reads_the_device, copies_from_the_host])
def test_a_capture_that_fails_leaves_all_as_it_was(energy, caplog):
    pools = memory_pools()
    torch.cuda.manual_seed(7)
    expected_draws = torch.randn(5, device="cuda")
    x, noise = start(), generators("cuda")
    expected, _ = langevin(energy, x, generator=generators("cuda"), **SETTINGS)
    following = [torch.randn(5, device="cuda", generator=advanced(one)) for one in generators("cuda")]

    torch.cuda.manual_seed(7)
    stream, engine = torch.cuda.current_stream(), Engine(energy)
    out, _ = engine(langevin, x, generator=noise, **SETTINGS)
    assert torch.allclose(out, expected, atol=1e-5)
    assert len(caplog.records) == 1 and "can't be captured" in caplog.text and not engine.capture
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.randn(5, device="cuda"), expected_draws)  # the default generator
    for one, draws in zip(noise, following, strict=True):
        assert torch.equal(torch.randn(5, device="cuda", generator=one), draws)
    torch.cuda.synchronize()

    # Memory: a failed capture keeps no pool. And another chain is captured after it.
    del out, expected
    assert memory_pools() <= pools
    other = Engine(plain)
    for seed in range(2):
        x = start(seed)
        captured, _ = other(langevin, x, generator=generators("cuda"), **SETTINGS)
        expected, _ = langevin(plain, x, generator=generators("cuda"), **SETTINGS)
        assert torch.allclose(captured, expected, atol=1e-6)
    assert other.capture and len(other._graphs) == 1


def memory_pools():
    """Those that hold memory of the device; graphs of other tests may be alive."""
    gc.collect()
    torch.cuda.empty_cache()
    return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()} | {(0, 0)}


def advanced(one):
    """`one` after the draws of a chain of SETTINGS on a quarter of `start()`."""
    for _ in range(SETTINGS["num_steps"]):
        torch.empty(8 * 3 * 8 * 8, device="cuda").normal_(generator=one)
    return one


def test_replays_advance_the_callers_generators_and_take_any():
    engine, x = Engine(plain), start()
    noise = generators("cuda")
    for one in noise:
        one.manual_seed(5)
    for call in range(3):  # the same generators go on; new ones begin anew; the graph is one
        out, _ = engine(langevin, x, generator=noise, **SETTINGS)
        again = [torch.Generator("cuda").manual_seed(5) for _ in noise]
        for _ in range(call):
            langevin(plain, x, generator=again, **SETTINGS)
        expected, _ = langevin(plain, x, generator=again, **SETTINGS)
        assert torch.allclose(out, expected, atol=1e-6)
        fresh, _ = engine(langevin, x, generator=generators("cuda"), **SETTINGS)
        plain_fresh, _ = langevin(plain, x, generator=generators("cuda"), **SETTINGS)
        assert torch.allclose(fresh, plain_fresh, atol=1e-6)
    assert len(engine._graphs) == 1


def test_an_energy_that_draws_from_the_default_generator_draws_anew_at_each_replay():
    def noisy(x):
        return (x + 0.1 * torch.randn_like(x)).square().flatten(1).sum(1)

    engine, x = Engine(noisy), start()
    settings = {"num_steps": 2, "step_size": 0.01, "boundary": "reflect"}
    outs = []
    engine(mala, x, generator=generators("cuda"), **settings)
    for _ in range(2):
        torch.cuda.manual_seed(3)
        outs += [engine(mala, x, generator=generators("cuda"), **settings)[0] for _ in range(2)]
    assert engine.capture and not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


@pytest.mark.parametrize("sampler", [langevin, mala, hmc])
def test_captured_chains_of_a_counter_are_the_plain_ones_on_any_device(sampler):
    """One graph for all seeds; a source that is not reseeded goes on; a CPU draws the same numbers."""
    settings = {"num_steps": 4, "step_size": 0.02, "bounds": (0.0, 1.0), "boundary": "reflect"}
    settings |= {"noise_scale": 0.1} if sampler is langevin else {}
    settings |= {"num_leapfrog": 2} if sampler is hmc else {}
    engine, x = Engine(plain), start()
    captured, eager, on_cpu = Philox([1, 2], "cuda"), Philox([1, 2], "cuda"), Philox([1, 2])
    for seeds in (None, None, [5, 7], None):
        if seeds is not None:
            for source in (captured, eager, on_cpu):
                source.reseed(seeds)
        out, _ = engine(sampler, x, generator=captured, **settings)
        expected, _ = sampler(plain, x, generator=eager, **settings)
        elsewhere, _ = sampler(plain, x.cpu(), generator=on_cpu, **settings)
        assert torch.allclose(out, expected, atol=1e-6) and torch.allclose(out.cpu(), elsewhere, atol=1e-4)
        assert captured.draws == eager.draws == on_cpu.draws > 0
    assert engine.capture and len(engine._graphs) == 1


def test_a_counter_is_unharmed_by_a_capture_that_fails():
    engine, x, source = Engine(reads_the_device), start(), Philox([1, 2], "cuda")
    out, _ = engine(langevin, x, generator=source, **SETTINGS)
    expected, _ = langevin(reads_the_device, x, generator=Philox([1, 2], "cuda"), **SETTINGS)
    assert torch.allclose(out, expected, atol=1e-5) and source.draws == SETTINGS["num_steps"]


def test_a_first_replay_draws_by_its_own_seeds_however_late_those_of_the_capture_are_set(monkeypatch):
    """torch sets them on the stream of the capture, which a device that is busy with other processes runs later."""
    begin = torch.cuda.CUDAGraph.capture_begin

    def late(graph, *args, **kwargs):
        torch.cuda._sleep(10**9)  # half a second
        begin(graph, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", late)
    engine, x = Engine(plain), start()
    out, _ = engine(langevin, x, generator=generators("cuda"), **SETTINGS)
    expected, _ = langevin(plain, x, generator=generators("cuda"), **SETTINGS)
    assert engine.capture and torch.allclose(out, expected, atol=1e-6)


WITHOUT_A_COMPILER = """
import logging
import torch
from ebm.streams import Philox
from ebm.samplers import Engine, langevin
logging.basicConfig(format="%(message)s")
x = torch.rand(8, 3, 8, 8, device="cuda")
energy = lambda x: x.square().flatten(1).sum(1)
engine = Engine(energy)
for _ in range(2):
    out, _ = engine(langevin, x, num_steps=5, step_size=0.1, noise_scale=0.0, grad_clamp=0.5, bounds=(-1.0, 1.0),
                    generator=[torch.Generator("cuda")])
expected = x.clone()
for _ in range(5):
    expected = (expected - 0.1 * (2 * expected).clamp(-0.5, 0.5)).clamp(-1, 1)
assert torch.allclose(out, expected, atol=1e-6) and engine.capture
source = Philox([1, 2], "cuda")
out, _ = engine(langevin, x, num_steps=5, step_size=0.1, noise_scale=0.1, generator=source)
on_cpu, _ = langevin(energy, x.cpu(), num_steps=5, step_size=0.1, noise_scale=0.1, generator=Philox([1, 2]))
assert torch.allclose(out.cpu(), on_cpu, atol=1e-5)
torch.randn(3, device="cuda")
print("done")
"""


def test_without_a_c_compiler_the_plain_update_stands_in(tmp_path):
    pytest.importorskip("triton")
    environment = os.environ | {"CC": "/nowhere/cc", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "done\n", result.stderr
    assert result.stderr.count("the fused Langevin update can't be built") == 1


def test_an_update_is_one_graph(caplog):
    x, total = torch.ones(3, device="cuda"), torch.zeros((), device="cuda")
    update = CapturedUpdate(lambda: total.copy_(x.sum()), x.device)
    for value in (1.0, 2.0):
        x.fill_(value)
        update()
        assert total.item() == 3 * value and not caplog.records


def test_an_update_that_reads_the_host_runs_as_it_is(caplog):
    x, seen = torch.ones(3, device="cuda"), []
    update = CapturedUpdate(lambda: seen.append(x.sum().item()), x.device)
    update()
    x.fill_(2.0)
    update()
    assert seen[-1] == 6 and caplog.text.count("can't be captured") == 1
