"""Compiled chains are used where they are right and pay off; in all other cases the eager ones run, and the log says
why."""

import contextlib
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from contextvars import ContextVar
from functools import partial

import pytest
import torch
from runs import command, final_hashes, finish
from test_engine import SETTINGS, generators

from ebm.energies import EnergyOfTensors, FoldedEnergy, ResNetEnergyFunction, SpectralNorms
from ebm.losses import contrastive_divergence
from ebm.samplers import Engine, compiled, hmc, langevin, mala, tempering
from ebm.samplers.base import evaluate
from ebm.samplers.compiled import Compiler, EnergyOfLoss, in_time, relative_error
from ebm.samplers.engine import _first_inputs

CPU = torch.device("cpu")
NEEDS_A_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")


@pytest.fixture(autouse=True)
def every_line(caplog):
    caplog.set_level(logging.INFO, "ebm")
    torch._dynamo.reset()


def lines(caplog):
    """What the library has logged; torch's compiler logs too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("ebm.")]


def compiler(tmp_path, **settings):
    return Compiler(**{"always": True, "tolerance": 1e-4, "file": tmp_path / "compiled.json"} | settings)


def energy(x):
    return (x - 0.25).square().flatten(1).sum(1)


def start():
    return torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


@NEEDS_A_COMPILER
@pytest.mark.parametrize(
    ("threads", "network"), [(1, False), pytest.param(2, True, marks=pytest.mark.slow)], ids=["plain", "threads"]
)
def test_a_compiled_chain_is_the_eager_one(tmp_path, caplog, monkeypatch, threads, network):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    function, x = energy, start()
    if network:
        torch.manual_seed(0)
        folded = FoldedEnergy(ResNetEnergyFunction(1, 13, 13, (8, 16)).eval()).refresh()
        function, x = folded, torch.rand(8, 1, 13, 13) * 2 - 1
    engine = Engine(function, compiler=compiler(tmp_path))
    for _ in range(2):  # compiled once
        out, _ = engine(langevin, x, generator=generators(), **SETTINGS)
    expected, _ = Engine(function)(langevin, x, generator=generators(), **SETTINGS)
    assert torch.allclose(out, expected, atol=1e-5)
    (line,) = lines(caplog)
    assert line.startswith("chains are compiled (") and "gradients within" in line
    (used,) = engine._functions.values()
    assert used is not function
    assert list(json.loads((tmp_path / "compiled.json").read_text()).values()) == [True]


def with_gradient_times(factor: float):
    """The identity, whose gradient is wrong by `factor`."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return factor * grad

    return Scaled.apply


def test_a_wrong_compiled_gradient_is_found(tmp_path, caplog, monkeypatch):
    wrong_gradient = with_gradient_times(1.1)
    monkeypatch.setattr(compiled, "compiled", lambda energy: lambda x: energy(wrong_gradient(x)))
    engine = Engine(energy, compiler=compiler(tmp_path, tolerance=0.05))
    out, _ = engine(langevin, start(), generator=generators(), **SETTINGS)
    expected, _ = Engine(energy)(langevin, start(), generator=generators(), **SETTINGS)
    assert torch.equal(out, expected)
    (line,) = lines(caplog)
    assert "not compiled" in line and "gradients within 0.1" in line and "the compiler is wrong" in line


def test_values_that_are_not_finite_are_no_agreement():
    nan = torch.tensor([1.0, float("nan")])
    assert not relative_error(nan, torch.ones(2)) <= 1e9
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.full((2,), 3.0), torch.full((2,), 2.0)) == pytest.approx(0.5)


WITHOUT_A_COMPILER = """
import logging
import torch
from ebm.samplers import Engine, langevin
from ebm.samplers.compiled import Compiler

logging.basicConfig(format="%(message)s")
energy = lambda x: (x - 0.25).square().flatten(1).sum(1)
engines = Engine(energy, compiler=Compiler(always=True, tolerance=1e-4)), Engine(energy)
settings = {"num_steps": 5, "step_size": 0.1, "noise_scale": 0.1}
for _ in range(2):
    a, b = (e(langevin, torch.ones(4, 9), generator=[torch.Generator().manual_seed(0)], **settings)[0] for e in engines)
    assert torch.equal(a, b)
print("done")
"""


def test_without_a_compiler_chains_run_eagerly(tmp_path):
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout == "done\n", result.stderr
    assert result.stderr.count("chains are not compiled (") == 1
    assert "InvalidCxxCompiler" in result.stderr


def test_a_compilation_that_takes_too_long_is_given_up(tmp_path, caplog, monkeypatch):
    with pytest.raises(TimeoutError, match="within 0 s"):
        in_time(lambda: time.sleep(2), 0.05, CPU)
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0, 5, CPU)
    monkeypatch.setattr(compiled, "compiled", lambda energy: lambda x: time.sleep(2) or energy(x))
    engine = Engine(energy, compiler=compiler(tmp_path, limit=0.05))
    engine(langevin, start(), generator=generators(), **SETTINGS)
    assert list(engine._functions.values()) == [energy] and "TimeoutError" in caplog.text


@NEEDS_A_COMPILER
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_compiles_as_many_shapes_as_it_is_given(tmp_path, monkeypatch, threads):
    """Dynamo's own limit is 8 for one function, after which it runs eagerly and says so in a log of its own alone."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    engine, before = Engine(energy, compiler=compiler(tmp_path)), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for rows in range(2, 11):
        engine(langevin, torch.rand(4, threads, rows, 3) * 2 - 1, generator=generators(), **SETTINGS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 9


def test_a_compilation_has_the_settings_of_its_caller():
    name, seen = ContextVar("name"), []
    name.set("the caller's")
    in_time(lambda: seen.append(name.get(None)), 5, CPU)
    assert seen == ["the caller's"]


class Held:
    """What a call refers to."""


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_of_a_compilation_outlives_it_and_holds_nothing_of_it(fails):
    held, threads = Held(), []
    gone = weakref.ref(held)

    def call(held):
        threads.append(threading.current_thread())
        if fails:
            raise KeyError(held)

    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        in_time(partial(call, held), 5, CPU)
    del held
    gc.collect()
    assert threads[0].is_alive() and gone() is None


def chosen(compiler, gain=2.0):
    times = {energy: gain}
    chosen = compiler.choose(
        energy, [start()], lambda f: evaluate(f, start()), lambda function: function(), lambda f: times.get(f, 1.0)
    )
    return chosen is not energy


def test_what_was_chosen_is_kept(tmp_path, caplog, monkeypatch):
    tries = []
    monkeypatch.setattr(compiled, "compiled", lambda energy: tries.append(1) or (lambda x: energy(x)))
    auto = compiler(tmp_path, always=False)
    assert not chosen(auto, gain=0.9) and "0.90 times as fast" in caplog.text and len(tries) == 1
    assert not chosen(auto, gain=9.0) and len(tries) == 1  # as it was chosen before, without another try
    (tmp_path / "compiled.json").unlink()
    assert chosen(auto, gain=2.0) and "2.00 times as fast" in caplog.text
    assert chosen(auto, gain=0.5) and len(tries) == 3
    monkeypatch.setattr(compiled, "compiled", lambda energy: 1 / 0)
    assert not chosen(auto) and "was compiled before, and goes on with other rounding" in caplog.text


def test_all_ranks_compile_or_none(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "compiled", lambda energy: lambda x: energy(x))
    asked = []
    other = compiler(tmp_path, agree=lambda flag: bool(asked.append(flag)), writes=False)
    assert not chosen(other) and asked == [True] and not (tmp_path / "compiled.json").exists()


def test_a_damaged_file_of_choices_is_told_and_a_full_disk_ends_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(compiled, "compiled", lambda energy: lambda x: energy(x))
    (tmp_path / "compiled.json").write_text("[")
    assert chosen(compiler(tmp_path)) and "can't be read" in caplog.text
    assert chosen(compiler(tmp_path, file=tmp_path / "nowhere" / "compiled.json")) and "can't be written" in caplog.text
    # Kept by a handler, an exception would keep all frames up to the loss, and its graph, which then can't be captured.
    assert not [a for record in caplog.records for a in record.args or () if isinstance(a, BaseException)]


@pytest.mark.parametrize("sampler", [langevin, mala, hmc, tempering])
def test_the_energy_is_compiled_for_what_samplers_give_it(sampler):
    settings = {"num_steps": 1, "step_size": 0.1}
    settings |= {"noise_scale": 0.1} if sampler is langevin else {"num_leapfrog": 1} if sampler is hmc else {}
    settings |= {"temperatures": (1.0, 2.0)} if sampler is tempering else {}
    x = torch.rand(6, 2, 3, 4, 5) if sampler is tempering else torch.rand(6, 3, 4, 5)
    seen, labels = _first_inputs(sampler, [x, torch.arange(6)], settings)
    rows = x.flatten(0, 1) if sampler is tempering else x
    assert torch.equal(seen, rows) and seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, torch.arange(6).repeat_interleave(len(rows) // 6))


def network(**options):
    torch.manual_seed(0)
    return ResNetEnergyFunction(1, 9, 9, (4,), **options).train()


def loss_and_gradients(module, evaluated, seed, dtype=torch.float32, **labels):
    """A contrastive loss after one power iteration, and its gradients; of `evaluated`, which reads `module`."""
    x_pos, x_neg = torch.rand(2, 8, 1, 9, 9, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with SpectralNorms(module).computed(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = contrastive_divergence(evaluated, x_pos, x_neg, l2=0.1, **labels).loss
    return loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))


def test_an_energy_of_given_tensors_is_the_module():
    module, y = network(num_classes=3), torch.arange(8) % 3
    of_tensors = EnergyOfTensors(module)
    same = [
        loss_and_gradients(module, evaluated, 0, y_pos=y, y_neg=y)
        for evaluated in (lambda *inputs: of_tensors(of_tensors.tensors(), *inputs), module)
        if module.load_state_dict(network(num_classes=3).state_dict())
    ]
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))


@NEEDS_A_COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_a_compiled_loss_is_the_eager_one_and_is_compiled_once(tmp_path, caplog, dtype):
    torch._dynamo.utils.counters.clear()
    module, tolerance = network(), {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    evaluated = EnergyOfLoss(module, dtype, compiler(tmp_path, tolerance=tolerance))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for step in range(3):
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        expected = loss_and_gradients(module, module, step, dtype)
        module.load_state_dict(state)
        found = loss_and_gradients(module, evaluated, step, dtype)
        for parameter, a, b in zip(module.parameters(), found[1:], expected[1:], strict=True):
            assert relative_error(a, b) < 3 * tolerance, parameter.shape
            parameter.grad = a
        assert found[0] == pytest.approx(expected[0].item(), abs=tolerance)
        optimizer.step()
    (line,) = lines(caplog)
    assert line.startswith("the loss is compiled (")
    (kind,) = json.loads((tmp_path / "compiled.json").read_text())
    assert kind.startswith("loss of [16, 1, 9, 9] on CPU")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_wrong_gradient_of_a_single_weight_leaves_the_loss_eager(tmp_path, caplog, monkeypatch):
    wrong_gradient = with_gradient_times(1.5)
    module = network()

    def wrong(energy):
        return lambda tensors, x: energy([wrong_gradient(t) if t.shape == (4, 1, 3, 3) else t for t in tensors], x)

    monkeypatch.setattr(compiled, "compiled", wrong)
    evaluated = EnergyOfLoss(module, torch.float32, compiler(tmp_path, tolerance=0.05))
    found = loss_and_gradients(module, evaluated, 0)
    module.load_state_dict(network().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found, loss_and_gradients(module, module, 0), strict=True))
    (line,) = lines(caplog)
    assert line.startswith("the loss is not compiled (") and "gradients within 0.5" in line


@pytest.mark.slow
@NEEDS_A_COMPILER
def test_a_run_compiles_and_resumes_as_it_began(digits, tmp_path):
    settings = {"train__compile": "true", "train__steps": 20}
    log = finish(command(1, tmp_path / "run", digits, train__time_limit=0.1, **settings), tmp_path / "log")
    finish(command(1, tmp_path / "whole", digits, **settings), tmp_path / "log")
    assert "chains are compiled (" in log and "the loss is compiled (" in log
    finish(command(1, tmp_path / "run", digits, **settings), tmp_path / "log")
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "whole")
