"""The step itself, in this process: every variant trains, resumes exactly, and survives a NaN."""

import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from runs import TINY
from safetensors.torch import save_file

from ebm.config import load_config
from ebm.energies import UNetEnergyFunction
from ebm.runtime.checkpoint import Saver
from ebm.runtime.distributed import World
from ebm.runtime.run_directory import RunDirectory
from ebm.training.state import build_state, load, snapshot
from ebm.training.step import train_step

FLOW = ["sampler.start=normal", "sampler.schedule=flow", "sampler.bounds=null", "sampler.temperature=0.01"]
FLOW += ["sampler.num_steps=12", "sampler.step_size=0.1", "sampler.grad_clamp=null"]
VARIANTS = {
    "default": [],
    "accumulated": ["train.accumulate=2"],
    "conditional": ["energy.num_classes=10"],
    "from_data": ["loss.negatives=data"],
    "from_noise": ["loss.negatives=noise"],
    "from_mixture": ["sampler.start=mixture", "energy.num_classes=10"],
    "bf16": ["train.mixed_precision=bf16"],
    "mlp": ["energy.kind=mlp"],
    "resnet": ["energy.kind=resnet", "energy.features=[8,8]", "energy.blocks=1", "optim.weight_decay=0.01"],
    "wide_resnet": ["energy.kind=wide_resnet", "energy.depth=10", "energy.widen=1"],
    "unet": ["energy.kind=unet", "energy.features=[4,8]", "energy.attention=[1]", "energy.num_classes=10"],
    "transformer": ["energy.kind=transformer", "energy.dim=16", "energy.depth=1", "energy.num_classes=10"],
    "graph": ["energy.kind=graph", "energy.hidden_dim=8", "energy.num_layers=2", "energy.spectral_norm=true"],
    "gaussian": ["energy.kind=gaussian", "energy.covariance=full"],
    "hybrid": ["energy.kind=hybrid", "energy.network.kind=conv", "energy.network.features=[8,16]"],
    "annealed": ["sampler.schedule=cosine", "sampler.step_size_end=1.0", "sampler.boundary=reflect"],
    "exact_noise": ["sampler.temperature=1e-5", "sampler.grad_clamp=null"],
    "augmented": ["data.augment_flip=true", "data.augment_crop=1", "data.dequantize=false"],
    "improved": ["loss.kind=improved_contrastive", "sampler.step_size=1", "buffer.augment_flip=true"],
    "score_matching": ["loss.kind=score_matching"],
    "sliced": ["loss.kind=score_matching", "loss.method=sliced", "energy.num_classes=10"],
    "denoising": ["loss.kind=denoising", "loss.sigma=0.3", "train.accumulate=2"],
    "multilevel_denoising": ["loss.kind=multilevel_denoising", "energy.num_classes=10", "train.accumulate=2"],
    "equilibrium": ["loss.kind=equilibrium"],
    "noise_contrastive": ["loss.kind=noise_contrastive", "loss.noise=uniform"],
    "energy_discrepancy": ["loss.kind=energy_discrepancy", "loss.num_samples=4"],
    "contrastive_latent": ["loss.kind=contrastive_latent", "energy.latent.dim=8", "buffer.restart=augmented"],
    "recovery": ["loss.kind=recovery", "sampler.temperature=1", "sampler.step_size=0.002", "train.accumulate=2"],
    "recovery_conditional": ["loss.kind=recovery", "sampler.kind=mala", "energy.num_classes=10"],
    "recovery_levels": [
        "loss.kind=recovery",
        "loss.levels=3",
        "energy.noise_conditional.initialiser.features=[4,8]",
        "energy.num_classes=10",
        "sampler.kind=mala",
        "sampler.bounds=null",
        "data.noise_std=0",
    ],
    "energy_matching": ["loss.kind=energy_matching", "loss.warmup_steps=2", *FLOW],
    "jem": ["loss.kind=jem", "energy.num_classes=10", "loss.gradient_penalty=0.1"],
    "jem_bounded": ["loss.kind=jem", "loss.bounded=true", "energy.num_classes=10"],
    "jem_joint": ["loss.kind=jem", "loss.joint=true", "energy.num_classes=10"],
    "mala": ["sampler.kind=mala", "sampler.num_steps=2"],
    "hmc": ["sampler.kind=hmc", "sampler.num_steps=2", "train.accumulate=2"],
    "tempering": ["sampler.kind=tempering", "sampler.num_steps=2", "energy.num_classes=10"],
    "levels": [
        "loss.kind=dual_score_matching",
        "data.noise_std=0",
        "sampler.kind=noise_levels",
        "energy.noise_conditional.sigma_min=0.1",
        "energy.spectral_norm=true",
    ],
    "noise_levels": [
        "loss.kind=dual_score_matching",
        "loss.contrastive_weight=0.01",
        "loss.warmup_steps=2",
        "data.noise_std=0",
        "sampler.kind=noise_levels",
        "energy.noise_conditional.sigma_min=0.1",
    ],
    "annealed_levels": [
        "loss.kind=dual_score_matching",
        "loss.contrastive_weight=0.01",
        "loss.warmup_steps=2",
        "data.noise_std=0",
        "sampler.kind=noise_levels",
        "sampler.level_moves=annealed",
        "sampler.anneal_steps=10",
        "energy.noise_conditional.sigma_min=0.1",
        "energy.num_classes=10",
    ],
    "hybrid_denoised": ["energy.kind=hybrid", "energy.network.hidden_dim=16", "loss.kind=denoising"],
}


@pytest.fixture
def new_state(digits, tmp_path):
    """Builds the state of a tiny run, as often as wanted, all in one run directory."""
    made, run = [], tmp_path / "run"
    run.mkdir()

    def build(*overrides: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        settings = [f"{key}={value}" for key, value in TINY.items() if key != "energy.features"]
        if not any("energy.kind" in o for o in overrides):
            settings.append("energy.features=[8,16]")
        else:
            settings = [s for s in settings if not s.startswith("energy.")]
        settings += ["train.compile=false", f"data.shards={digits}", f"run.dir={run}"]
        config = load_config(None, [*settings, *overrides])
        made.append(build_state(config, World(config.train)))
        return made[-1]

    yield build
    for state in made:
        state.reader.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def advance(state, steps: int):
    for _ in range(steps):
        train_step(state, next(state.reader))
    return state


def everything(state) -> dict[str, torch.Tensor]:
    tensors = {f"model.{k}": v for k, v in state.energy.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in state.ema.state_dict().items()}
    for i, values in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    if state.buffer is not None:
        tensors |= {"x": state.buffer.x, "age": state.buffer.age}
        if state.buffer.labels is not None:
            tensors["labels"] = state.buffer.labels
    return tensors


def differing(a: dict, b: dict) -> list[str]:
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def assert_trains_and_resumes_exactly(new_state, settings: list[str], steps: int = 3):
    """Twice `steps` steps, at once and by way of a checkpoint. Returns the state of the whole run."""
    whole = advance(new_state(*settings), 2 * steps)
    expected = {k: v.clone() for k, v in everything(whole).items()}

    first = new_state(*settings)
    begin = {k: v.clone() for k, v in first.energy.state_dict().items()}
    advance(first, steps)
    run = RunDirectory(first.config, first.world)
    saver = Saver(run.checkpoints, first.world)
    saver.start(first.step, *snapshot(first))
    path = saver.finish(keep=2)
    second = new_state(*settings)
    load(second, path)
    assert second.step == steps
    advance(second, steps)
    assert differing(everything(second), expected) == []
    assert second.reader.positions == whole.reader.positions
    assert any(not torch.equal(v, begin[k]) for k, v in second.energy.state_dict().items())
    return whole


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_resume_exactly(new_state, variant):
    whole = assert_trains_and_resumes_exactly(new_state, VARIANTS[variant])
    assert int(whole.skipped_steps) == 0


def test_a_distilled_energy_trains_and_resumes_exactly(new_state, tmp_path):
    """With the field of a file: it is in no checkpoint, and none of its numbers moves."""
    file = tmp_path / "field.safetensors"
    save_file(UNetEnergyFunction(2, 8, 8, (4, 8), planes=1).state_dict(), file)
    before = file.read_bytes()
    network = ["energy.kind=unet", "energy.features=[4,8]"]
    matching = ["loss.kind=energy_matching", "loss.warmup_steps=4", f"loss.field={file}", *FLOW]
    whole = assert_trains_and_resumes_exactly(new_state, [*network, *matching])
    plain = advance(new_state(*network, *[s for s in matching if "field" not in s]), 1)
    assert list(whole.model.state_dict()) == list(plain.model.state_dict()) and file.read_bytes() == before
    assert snapshot(whole)[1]["field_sha256"] == hashlib.sha256(before).hexdigest()
    assert snapshot(plain)[1]["field_sha256"] is None
    assert differing(everything(advance(new_state(*network, *matching), 1)), everything(plain))


def test_parts_of_a_batch_add_up_to_the_whole(new_state):
    """Without chain noise, whose order depends on the parts, accumulation changes nothing but rounding."""
    settings = ["sampler.noise_scale=0", "optim.grad_clip=null"]
    a, b = (advance(new_state(*settings, f"train.accumulate={parts}"), 1) for parts in (1, 4))
    torch.testing.assert_close(a.buffer.x, b.buffer.x, atol=1e-5, rtol=0)
    for one, other in zip(a.optimizer.state_dict()["state"].values(), b.optimizer.state_dict()["state"].values(),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one["exp_avg_sq"], other["exp_avg_sq"], atol=1e-9, rtol=1e-3)


def test_a_step_with_a_nan_is_skipped(new_state):
    state = advance(new_state(), 2)
    before = {k: v.clone() for k, v in everything(state).items()}
    draw = state.buffer.draw(16, state.step + 1, state.config.buffer.reinit_prob)
    chosen = draw.rows[~draw.fresh][0]
    state.buffer.x[chosen, 0, 0, 0] = float("nan")
    before["x"] = state.buffer.x.clone()
    train_step(state, next(state.reader))
    after = everything(state)
    assert torch.isfinite(after["x"]).all() and after["age"][chosen] == 0, "the chain starts again"
    for name in ("x", "age"):
        before[name][chosen], after[name] = 0, after[name].clone()
        after[name][chosen] = 0
    changed = [key for key in differing(before, after) if not key.startswith("ema.")]
    assert changed == []
    assert (int(state.skipped_steps), int(state.skipped_in_row), int(state.reset_chains)) == (1, 1, 1)
    advance(state, 1)
    assert (int(state.skipped_steps), int(state.skipped_in_row)) == (1, 0)
    assert differing(before, everything(state))


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "told"),
    [(64, 1, 1, "OMP_NUM_THREADS=64"), (64, 4, 1, "OMP_NUM_THREADS=16"), (2, 2, 1, None), (8, 1, 8, None)],
)
def test_a_run_that_leaves_cores_idle_says_how_to_use_them(monkeypatch, cores, ranks, threads, told):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    said = World.idle_cores(SimpleNamespace(device=torch.device("cpu")))
    assert said is None if told is None else told in said
