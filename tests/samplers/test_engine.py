"""The engine gives the chains of the plain loop, whatever it does for speed."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from ebm.energies import ConvolutionalEnergyFunction, FoldedEnergy, ResNetEnergyFunction, chain_dtype
from ebm.runtime.process import prepare_process
from ebm.samplers import Engine, langevin
from ebm.samplers.langevin import move_
from ebm.streams import normal_

langevin_module = importlib.import_module("ebm.samplers.langevin")  # the package's `langevin` is the function
SETTINGS = {"num_steps": 20, "step_size": 2.0, "noise_scale": 0.01, "grad_clamp": 0.05, "bounds": (-1.0, 1.0)}


def generators(device="cpu"):
    return [torch.Generator(device).manual_seed(stream) for stream in range(4)]


def plain_loop(energy, x, num_steps, step_size, noise_scale, grad_clamp, bounds):
    """The loop of the textbook, on the module itself."""
    noise = generators(x.device)
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(num_steps):
        x = x.detach().requires_grad_(True)
        (grad,) = torch.autograd.grad(energy(x).sum(), x)
        z = normal_(torch.empty_like(x), noise)
        x = (x - step_size * grad.clamp(-grad_clamp, grad_clamp) + noise_scale * z).clamp(*bounds)
    return x.detach()


@pytest.mark.parametrize(("channels", "threads"), [(1, 1), (3, 1), (3, 2), (1, 3)])
def test_engine_gives_the_chain_of_the_plain_loop(monkeypatch, channels, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # 3 threads for 4 streams: 2 of them work
    torch.manual_seed(0)
    energy = ResNetEnergyFunction(channels, 16, 16, (16, 32)).eval()
    x = torch.rand(32, channels, 16, 16) * 2 - 1
    expected = plain_loop(energy, x, **SETTINGS)
    engine = Engine(FoldedEnergy(energy).refresh())
    out, info = engine(langevin, x, generator=generators(), **SETTINGS)
    assert (out - x).abs().mean() > 0.05
    assert torch.allclose(out, expected, atol=1e-5)
    assert engine(langevin, x[:30], generator=generators()[:1], **SETTINGS)[0].shape == x[:30].shape  # one stream
    assert info.displacement.isclose((expected - x).flatten(1).norm(dim=1).mean(), rtol=1e-4)


@pytest.mark.slow
def test_chains_in_bf16_are_those_in_fp32_within_rounding():
    torch.manual_seed(0)
    energy = ConvolutionalEnergyFunction(1, 8, 8, spectral_norm=True).eval()
    energy.head.scale.data.fill_(30.0)  # so that chains move by the gradient and not by the noise alone
    exact = FoldedEnergy(energy).refresh()
    x = torch.rand(10_000, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ends = {}
    for name, folded in (("fp32", exact), ("bf16", FoldedEnergy(energy, torch.bfloat16).refresh())):
        ends[name], _ = Engine(folded)(langevin, x, generator=generators(), **SETTINGS)
    a, b = ends["fp32"], ends["bf16"]
    assert (a - x).abs().mean() > 0.1
    assert (a - b).abs().mean() < 0.02 * (a - x).abs().mean()
    for moment in (1, 2):
        assert torch.allclose((a**moment).mean(0), (b**moment).mean(0), atol=4e-3)
    fall, error = exact(x).mean() - exact(a).mean(), exact(a).mean() - exact(b).mean()
    assert fall > 0 and error.abs() < 0.01 * fall


INTERPRETED = """
import torch
from ebm.kernels import move_ as fused
from ebm.samplers.langevin import move_

generator = torch.Generator().manual_seed(0)
x, grad, z = (torch.randn(3, 3, 9, 7, generator=generator) for _ in range(3))
x, z = (t.contiguous(memory_format=torch.channels_last) for t in (3 * x, z))
x[0, 0, 0, 0] = float("nan")
for bounds, boundary in ((None, "clamp"), ((-1.0, 1.0), "clamp"), ((-0.5, 1.5), "reflect")):
    for clamp in (None, 0.3):
        for noise in (None, z):
            a, b = x.clone(), x.clone()
            for move, state in ((move_, a), (fused, b)):
                move(state, grad, noise, 0.7, 0.4, clamp, bounds, boundary)
            assert torch.allclose(a, b, atol=1e-6, equal_nan=True), (bounds, boundary, clamp, noise is None)
            assert b.isnan().sum() == 1 and not torch.equal(b, x)
print("equal")
"""


def test_fused_update_is_the_update():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert result.stdout == "equal\n", result.stderr


def test_an_update_that_triton_cannot_build_is_done_without_it(caplog, monkeypatch):
    """As without a C compiler, or here: triton finds no GPU to build for."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        monkeypatch.setenv("CC", "/nowhere/cc")
        monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere/cache")
    langevin_module._mover.cache_clear()
    fused_or_not = langevin_module._mover("cuda")
    grad, z = (torch.randn(4, 9, generator=generator) for generator in generators()[:2])
    x = torch.zeros(4, 9)
    for _ in range(3):
        expected = x.clone()
        move_(expected, grad, z, 0.7, 0.4, 0.3, (-1.0, 1.0), "clamp")
        fused_or_not(x, grad, z, 0.7, 0.4, 0.3, (-1.0, 1.0), "clamp")
        assert torch.equal(x, expected) and x.abs().max() > 0
    langevin_module._mover.cache_clear()
    assert len(caplog.records) == 1 and "the fused Langevin update can't be built" in caplog.text


def test_bf16_chains_are_fp32_ones_where_a_cpu_only_emulates_it(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"amx_bf16": has, "cpu_name": "bf16"})
        assert chain_dtype(torch.bfloat16, cpu) == expected
        assert chain_dtype(torch.bfloat16, cuda) == torch.bfloat16
        assert chain_dtype(torch.float32, cpu) == torch.float32


def test_what_the_user_says_of_threads_and_memory_stands(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("set in spite of MALLOC_ARENA_MAX"))
    prepare_process()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
