"""Forward and backward pass of the loss as one graph: the same run as by the passes, and the passes where a graph is
wrong or can't be. On a CPU a function that runs again stands in for the graph; test_cuda has real ones."""

import logging
from types import SimpleNamespace

import pytest
import torch
from test_step import VARIANTS, advance, differing, everything, new_state  # noqa: F401 - a fixture

from ebm.config.energies import ImportConfig
from ebm.config.losses import ContrastiveConfig
from ebm.energies import MLPEnergyFunction
from ebm.losses import LossOutput, loss_of
from ebm.losses.factory import LossInputs, StepLoss
from ebm.samplers.engine import CapturedFunction, CaptureError
from ebm.streams import Philox, derive_seed
from ebm.training.state import Meters, Objective, build_loss

NORMALISED = ["energy.kind=resnet", "energy.features=[8,8]", "energy.blocks=1", "energy.spectral_norm=true"]
CASES = {
    "spectral_norm": NORMALISED,
    "bf16": [*NORMALISED, "train.mixed_precision=bf16"],
    **{name: VARIANTS[name] for name in ("conditional", "improved", "noise_levels", "energy_matching", "equilibrium")},
    **{name: VARIANTS[name] for name in ("sliced", "contrastive_latent", "jem", "energy_discrepancy", "mala")},
}


class Again:
    """In place of a graph: runs the function twice, "captures" it by a third run, and runs it again at a replay, whose
    values it writes into the tensors of the capture. The function sees no replay's noise before it, as in a graph."""

    made = 0

    def __init__(self, function, generator, device):
        self.function, self.counter = function, Philox([0] * len(generator), device)
        for _ in range(2):
            function(self.counter)
        self.counter.draws = 0
        self.results = function(self.counter)
        self.draws = self.counter.draws
        for x in self.tensors(self.results):
            x.fill_(float("nan"))  # a capture computes nothing
        type(self).made += 1

    def replay(self, generator):
        self.counter.reseed(generator.seeds.tolist())
        torch.add(generator.first, generator.draws, out=self.counter.first)
        for static, value in zip(self.tensors(self.results), self.tensors(self.function(self.counter)), strict=True):
            static.copy_(value)
        assert self.counter.draws == self.draws
        generator.draws += self.draws

    def tensors(self, results):
        output, gradients = results
        found = [output.loss, output.e_pos, output.e_neg, *output.terms.values(), *gradients]
        return [x for x in found if x is not None]


class Counters:
    """The sources of a GPU, on a CPU."""

    def __init__(self, seed, streams):
        self.seed, self.streams = seed, streams

    def __call__(self, purpose, step):
        return Philox([derive_seed(self.seed, purpose, stream, step) for stream in self.streams])


@pytest.fixture
def pair(new_state):  # noqa: F811
    """Builds two states of a run, of which the second captures its loss with `capture`."""

    def build(settings, capture=Again):
        states = [new_state(*settings) for _ in range(2)]
        for state in states:
            state.random = Counters(state.config.run.seed, state.random.streams)
        states[1].loss.capture = capture
        return states

    Again.made = 0
    return build


def assert_same(eager, captured):
    assert differing(everything(eager), everything(captured)) == []
    assert eager.meters.read(eager.world) == captured.meters.read(captured.world)


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_by_graphs(pair, case, caplog):
    eager, captured = (advance(state, 5) for state in pair(CASES[case]))
    assert_same(eager, captured)
    assert captured.loss.captured is not None and eager.loss.captured is None
    assert Again.made == (2 if case in ("noise_levels", "energy_matching") else 1)  # whose chains begin at step 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_one_that_adapts_its_step_size_is_one_graph(pair):
    """The step size is a tensor: an input of the graph, not a number that is built in."""
    eager, captured = (advance(state, 4) for state in pair([*VARIANTS["mala"], "sampler.adapt=true"]))
    assert_same(eager, captured)
    assert Again.made == 1


def test_other_settings_of_the_chain_make_another_graph(pair):
    states = pair(VARIANTS["improved"])
    for state in states:
        advance(state, 2)
        state.divergence.step_scale = 0.5
        advance(state, 2)
    assert_same(*states)
    assert Again.made == 2


def test_other_shapes_or_memory_of_the_weights_make_another_graph(pair):
    eager, captured = pair(NORMALISED)
    for state in (eager, captured):
        advance(state, 2)
        weight = state.loss.parameters[0]
        weight.data = weight.data.clone()
        advance(state, 1)
    assert_same(eager, captured)
    assert Again.made == 2


class Wrong(Again):
    """A graph that does not compute what was captured: `damage` changes a replay's values."""

    def replay(self, generator):
        super().replay(generator)
        self.damage(*self.results)


def wrong_loss(graph, output, gradients):
    output.loss.mul_(1.1)


def wrong_energies(graph, output, gradients):
    output.e_neg.mul_(1.1)


def wrong_gradient(graph, output, gradients):
    max((g for g in gradients if g.ndim > 1), key=torch.Tensor.numel).mul_(-1)


def nan_gradient(graph, output, gradients):
    gradients[0].fill_(float("nan"))


def same_noise_again(graph, output, gradients):
    """As where the seeds were built into the graph."""
    graph.counter.reseed([0] * len(graph.counter))
    for static, value in zip(graph.tensors(graph.results), graph.tensors(graph.function(graph.counter)), strict=True):
        static.copy_(value)


FAULTS = [(damage, []) for damage in (wrong_loss, wrong_energies, wrong_gradient, nan_gradient)]
FAULTS += [(same_noise_again, VARIANTS["sliced"])]


@pytest.mark.parametrize(("damage", "settings"), FAULTS)
def test_a_wrong_graph_is_not_used(pair, damage, settings, caplog):
    kind = type("Damaged", (Wrong,), {"damage": damage})
    eager, captured = (advance(state, 3) for state in pair(settings or NORMALISED, kind))
    assert_same(eager, captured)
    assert captured.loss.captured is None and captured.loss.capture is None
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "operation by operation" in record.message and "is wrong" in record.message


def test_a_graph_that_leaves_other_buffers_is_not_used(pair, caplog):
    class Forgets(Again):
        def replay(self, generator):
            before = [buffer.clone() for buffer in buffers]
            super().replay(generator)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    eager, captured = pair(NORMALISED, Forgets)
    buffers = captured.loss.buffers
    for state in (eager, captured):
        advance(state, 2)
    assert_same(eager, captured)
    assert captured.loss.captured is None and "buffers within" in caplog.text


@pytest.mark.parametrize("error", [CaptureError, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("when", ["before", "in the first runs", "at the capture"])
def test_a_capture_that_fails_leaves_all_as_it_was(pair, error, when, caplog):
    def capture(function, generator, device):
        source = Philox([0] * len(generator))
        if when != "before":
            function(source)
        if when == "at the capture":
            function(source)
        raise error("operation not permitted\nwhen stream is capturing")

    global_state = torch.get_rng_state()
    eager, captured = pair(NORMALISED, capture)
    for state in (eager, captured):
        advance(state, 3)
    assert_same(eager, captured)
    assert torch.equal(torch.get_rng_state(), global_state)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.message.endswith("can't be captured as a CUDA graph: operation not permitted")


def test_a_broken_batch_says_nothing_of_a_graph(pair):
    eager, captured = pair([])
    for state in (eager, captured):
        state.buffer.x.fill_(float("nan"))
        advance(state, 1)
    assert Again.made == 0 and captured.loss.capture is Again
    for state in (eager, captured):
        state.buffer.x.zero_()
        state.meters = Meters()
        advance(state, 2)
    assert_same(eager, captured)
    assert Again.made == 1


@pytest.mark.parametrize("settings", [["train.accumulate=2"], []])
def test_parts_of_a_batch_and_torchs_generators_have_no_graph(new_state, settings):  # noqa: F811
    state = new_state(*settings)
    if settings:
        state.random = Counters(state.config.run.seed, state.random.streams)
    state.loss.capture = Again
    Again.made = 0
    advance(state, 2)
    assert Again.made == 0


def small_loss(capture=Again):
    section = ContrastiveConfig()
    model = Objective(MLPEnergyFunction(4, 8), loss_of(section))
    return StepLoss(model, torch.Tensor.backward, section.negatives_at, capture, 1e-2, None)


def batch(seed):
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))
    return LossInputs(x[0], x[1], None, None, 1, {})


def test_what_is_returned_stays_as_it_is():
    loss = small_loss()
    outputs = []
    for seed in range(3):
        output = loss(batch(seed), Philox([1, 2]))
        assert isinstance(output, LossOutput) and not output.loss.requires_grad
        outputs.append((output, [x.clone() for x in output[:3]]))
        for parameter in loss.parameters:
            parameter.grad = None
    assert loss.captured is not None
    for output, values in outputs:
        assert all(torch.equal(a, b) for a, b in zip(output[:3], values, strict=True))
    assert len({float(output.loss) for output, _ in outputs}) == 3


def test_each_call_gives_the_gradients_back():
    loss = small_loss()
    for seed in range(3):
        found = []
        for compute in (loss, loss.passes):
            for parameter in loss.parameters:
                parameter.grad = None
            compute(batch(seed), Philox([1, 2]))
            found.append([parameter.grad.clone() for parameter in loss.parameters])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        for parameter in loss.parameters:
            parameter.grad = None
    assert loss.captured is not None


def test_what_is_captured(new_state):  # noqa: F811
    """A whole batch on one GPU, by energies of the project's, without a loss scale or a sum over ranks."""
    state = new_state()
    assert state.loss.capture is None, "a CPU has no graphs"
    gpu = {"device": torch.device("cuda"), "size": 1, "scaler": None, "backward": None}
    config, model = state.config, state.model
    foreign = config.model_copy(update={"energy": ImportConfig(path="torch.nn:Identity")})
    parts = config.model_copy(update={"train": config.train.model_copy(update={"accumulate": 2})})

    def captured(config=config, model=model, **changes):
        world = SimpleNamespace(**gpu | changes, autocast_dtype=lambda: torch.bfloat16)
        return build_loss(config, world, model).capture is CapturedFunction

    assert captured()
    assert not captured(foreign) and not captured(parts) and not captured(model=torch.nn.Sequential(model))
    assert not captured(size=2) and not captured(scaler=object()) and not captured(device=torch.device("cpu"))
