"""What only a GPU can show: the step never waits for the device, bf16 and fp16 train, a chain resumes exactly."""

import pytest
import torch
from runs import TINY, command, final_hashes, finish

from ebm.data.shards import ensure_shards

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "train"
    ensure_shards(str(path), "digits", "train")
    return path


def test_a_step_reads_no_device_memory(digits, tmp_path):
    from ebm.config import load_config
    from ebm.distributed import World
    from ebm.state import build_state
    from ebm.trainer import train_step

    settings = [f"{key}={value}" for key, value in TINY.items()]
    config = load_config(None, [*settings, f"data.shards={digits}", f"run.dir={tmp_path}"])
    state = build_state(config, World(config.train))
    batches = [next(state.reader) for _ in range(3)]
    train_step(state, batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        state.reader.close()
    assert int(state.skipped_steps) == 0


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
