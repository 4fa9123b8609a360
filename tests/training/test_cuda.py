"""What only a GPU can show: every precision trains and resumes exactly, compiled too; a captured chain is the plain
one, a captured loss the eager one; batches are copied beside the computation. (test_step_host_reads: no step waits.)"""

import pytest
import torch
from test_step import (
    VARIANTS,
    advance,
    assert_trains_and_resumes_exactly,
    differing,
    everything,
    new_state,  # noqa: F401 - a fixture
)

from ebm.runtime.process import _copy_stream, to_device
from ebm.samplers.engine import CapturedFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RESNET = ["energy.kind=resnet", "energy.features=[8,8]", "energy.blocks=1", "energy.spectral_norm=true"]


@pytest.mark.parametrize(
    ("precision", "compiled"), [("no", "false"), ("bf16", "false"), ("fp16", "false"), ("bf16", "true")]
)
def test_precisions_train_and_resume_exactly(new_state, precision, compiled):  # noqa: F811
    settings = [*RESNET, f"train.mixed_precision={precision}", f"train.compile={compiled}"]
    whole = assert_trains_and_resumes_exactly(new_state, settings, steps=10)  # fp16 finds its scale in the first ones
    assert int(whole.skipped_steps) <= (10 if precision == "fp16" else 0)


def test_a_batch_is_copied_while_the_device_computes():
    device, x = torch.device("cuda", torch.cuda.current_device()), torch.arange(1 << 20)
    to_device(x, device)  # the first copy allocates
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    copy = to_device(x, device)
    _copy_stream(device).synchronize()
    assert not torch.cuda.current_stream().query(), "the copy waited for the computation"
    assert torch.equal(copy.cpu(), x)


def test_the_memory_of_a_copy_is_kept_until_it_was_used():
    device, sums = torch.device("cuda", torch.cuda.current_device()), []
    for number in range(50):
        copy = to_device(torch.full((1 << 16,), number), device)
        torch.cuda._sleep(5_000_000)  # the use comes long after the next copies have been asked for
        sums.append(copy.sum())
        del copy
    assert torch.stack(sums).tolist() == [number << 16 for number in range(50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_chain_is_the_plain_one(dtype, caplog):
    from test_engine import SETTINGS

    from ebm.energies import FoldedEnergy, ResNetEnergyFunction
    from ebm.samplers import Engine, langevin
    from ebm.streams import StreamGenerators

    torch.manual_seed(0)
    energy = ResNetEnergyFunction(3, 16, 16, (16, 32), num_classes=3).eval().cuda()
    folded = FoldedEnergy(energy, dtype).refresh()
    engine, plain, random = Engine(folded), Engine(folded, capture=False), StreamGenerators(0, range(4), "cuda")
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for seed in range(3):  # the second and third time by replay, from other states, labels, weights and seeds
        x = torch.rand(32, 3, 16, 16, device="cuda") * 2 - 1
        y = torch.randint(3, (32,), device="cuda")
        out = [run(langevin, x, y, generator=random("chain", seed), **SETTINGS) for run in (engine, plain)]
        assert torch.allclose(out[0][0], out[1][0], atol=tolerance)
        assert torch.allclose(torch.stack(out[0][1]), torch.stack(out[1][1]), rtol=1e-2)
        with torch.no_grad():
            energy.head.scale.mul_(3)
        folded.refresh()
    assert engine.capture and len(engine._graphs) == 1
    assert not caplog.records


def test_the_fused_update_on_the_device():
    from ebm.kernels import move_ as fused
    from ebm.samplers.langevin import move_

    x = torch.randn(5, 3, 9, 7, device="cuda").contiguous(memory_format=torch.channels_last)
    grad, z = torch.randn(5, 3, 9, 7, device="cuda"), torch.randn_like(x)
    for bounds, boundary in ((None, "clamp"), ((-1.0, 1.0), "clamp"), ((-0.5, 1.5), "reflect")):
        a, b = x.clone(), x.clone()
        for move, state in ((move_, a), (fused, b)):
            move(state, grad, z, 0.7, 0.4, 0.3, bounds, boundary)
        assert torch.allclose(a, b, atol=1e-6)


NARROW = [*RESNET, "train.mixed_precision=bf16", "sampler.num_steps=4"]
EXACT = {
    "contrastive": NARROW,
    "compiled": [*NARROW, "train.compile=true"],
    "conditional": ["energy.num_classes=10", "optim.grad_clip=0.1"],
    "denoising": [*RESNET, "loss.kind=denoising"],
    **{name: VARIANTS[name] for name in ("levels", "noise_levels", "energy_matching", "equilibrium")},
}
NEAR = {"fastest": [*NARROW, "train.deterministic=false"]}
NEAR |= {name: VARIANTS[name] for name in ("improved", "contrastive_latent", "jem", "unet")}
LOSSES = EXACT | NEAR


@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_loss_trains_as_the_eager_one(new_state, loss, caplog):  # noqa: F811
    """20 steps, to the last bit: weights, averages, optimizer, chains and what the log says. Where an operation has no
    deterministic algorithm, a graph is near enough to be used."""
    captured, eager = new_state(*LOSSES[loss]), new_state(*LOSSES[loss])
    assert captured.loss.capture is CapturedFunction
    eager.loss.capture, eager.fold = None, eager.folded.refresh
    for state in (captured, eager):
        advance(state, 20)
    assert captured.loss.captured is not None and eager.loss.captured is None
    assert not [record.message for record in caplog.records if record.levelname == "WARNING"]
    if loss in EXACT:
        assert differing(everything(captured), everything(eager)) == []
        assert captured.meters.read(captured.world) == eager.meters.read(eager.world)


@pytest.mark.parametrize("loss", ["contrastive", "levels", "energy_matching"])
def test_a_run_with_a_captured_loss_resumes_exactly(new_state, loss):  # noqa: F811
    whole = assert_trains_and_resumes_exactly(new_state, LOSSES[loss], steps=4)
    assert whole.loss.captured is not None


def reads_the_host(output):
    output.loss.item()
    return output


def copies_from_the_host(output):
    return output._replace(loss=output.loss * torch.tensor(1.0, device=output.loss.device))


def runs_out_of_memory(output):
    if torch.cuda.is_current_stream_capturing():
        torch.empty(1 << 50, device="cuda", dtype=torch.uint8)
    return output


@pytest.mark.parametrize("fault", [reads_the_host, copies_from_the_host, runs_out_of_memory])
def test_a_loss_that_can_not_be_captured_leaves_all_as_it_was(new_state, fault, caplog):  # noqa: F811
    settings = LOSSES["contrastive"]
    captured, eager = new_state(*settings), new_state(*settings)
    eager.loss.capture = None
    loss = captured.model.loss
    captured.model.loss = lambda *args, **kwargs: fault(loss(*args, **kwargs))
    torch.cuda.manual_seed(7)
    default, stream = torch.cuda.get_rng_state(), torch.cuda.current_stream()
    for state in (captured, eager):
        advance(state, 3)
    assert captured.loss.captured is None and captured.loss.capture is None
    assert caplog.text.count("the loss runs operation by operation: it can't be captured") == 1
    assert differing(everything(captured), everything(eager)) == []
    assert torch.equal(torch.cuda.get_rng_state(), default) and torch.cuda.current_stream() == stream

    other = advance(new_state(*settings), 3)  # and another loss is captured after it
    assert other.loss.captured is not None and differing(everything(other), everything(eager)) == []


def test_a_captured_loss_gives_its_memory_back(new_state):  # noqa: F811
    state = new_state(*VARIANTS["improved"])
    advance(state, 2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for scale in (0.9, 0.8, 0.7):  # other settings of the chain: a graph in place of the one before, of chain and loss
        state.divergence.step_scale = scale
        advance(state, 2)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < 1.2 * before
