"""What only a GPU can show: bf16 and fp16 train, a chain resumes exactly. (test_step_host_reads: no step waits.)"""

import pytest
import torch
from runs import command, final_hashes, finish

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precisions_train_and_resume_exactly(digits, tmp_path, precision):
    settings = {"train__mixed_precision": precision, "energy__spectral_norm": "true"}
    finish(command(1, tmp_path / "whole", digits, train__steps=40, **settings), tmp_path / "log")
    run = command(1, tmp_path / "run", digits, train__steps=40, train__time_limit=0.1, **settings)
    for _ in range(3):
        finish(run, tmp_path / "log", expect=1)
    finish(command(1, tmp_path / "run", digits, train__steps=40, **settings), tmp_path / "log")
    whole, resumed = final_hashes(tmp_path / "whole"), final_hashes(tmp_path / "run")
    assert resumed == whole


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
