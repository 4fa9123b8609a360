"""What the launcher and the environment ask for: without effect on the run, or refused by name."""

import json
import subprocess
import sys
import time

import pytest
import torch
from runs import ROOT, TINY, Run, command, environment, final_hashes, finish, free_port

from ebm.__main__ import main

SHORT = {"train__steps": 12, "checkpoint__every": 6}
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be used")


def alone(run_dir, digits, env: dict, **settings) -> subprocess.CompletedProcess:
    """`python train.py`, with its own exit code."""
    arguments = command(1, run_dir, digits, **(SHORT | settings))
    script = arguments.index(str(ROOT / "train.py"))
    call = [sys.executable, *arguments[script:]]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, env=environment(**env), cwd=run_dir.parent)


def test_the_launchers_settings_change_nothing(digits, tmp_path):
    """Gradient accumulation, compilation and precision, as a config file of `accelerate launch` sets them."""
    foreign = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_MIXED_PRECISION": "bf16",
    }
    plain = alone(tmp_path / "plain", digits, {})
    done = alone(tmp_path / "foreign", digits, foreign)
    assert plain.returncode == done.returncode == 0, done.stderr
    assert final_hashes(tmp_path / "plain") == final_hashes(tmp_path / "foreign")
    for name, value in foreign.items():
        assert f"{name}={value.lower()}" in done.stdout and name not in plain.stdout
    assert "train.accumulate decides" in done.stdout and "train.mixed_precision decides" in done.stdout
    threads = torch.get_num_threads()
    assert f"device: CPU, float32, 1 rank, {threads} thread a rank" in plain.stdout


@NO_GPU
def test_a_gpu_that_was_asked_for_and_is_not_there_is_missed(digits, tmp_path):
    """launch/accelerate/gpu_1.yaml names GPU 0."""
    file = tmp_path / "gpu_1.yaml"
    file.write_text((ROOT / "launch/accelerate/gpu_1.yaml").read_text())
    arguments = command(1, tmp_path / "run", digits, **(SHORT | {"train__steps": 1}))
    at = arguments.index(str(ROOT / "train.py"))
    said = finish([*arguments[:at], "--config_file", str(file), *arguments[at:]], tmp_path / "log")
    assert "CUDA_VISIBLE_DEVICES=0 names GPUs, but the run is on the CPU" in said and "device: CPU" in said
    quiet = alone(tmp_path / "cpu", digits, {"CUDA_VISIBLE_DEVICES": "0"}, train__device="cpu", train__steps=1)
    assert quiet.returncode == 0 and "CUDA_VISIBLE_DEVICES" not in quiet.stdout


@pytest.mark.parametrize(
    ("env", "settings", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "ACCELERATE_USE_FSDP=true"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, {}, "ACCELERATE_USE_DEEPSPEED=True"),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, {}, "ACCELERATE_USE_MEGATRON_LM=1"),
        ({"ACCELERATE_TORCH_DEVICE": "meta"}, {}, "ACCELERATE_TORCH_DEVICE=meta"),
        pytest.param({}, {"train__device": "cuda"}, "train.device=cuda", marks=NO_GPU),
        pytest.param({"ACCELERATE_USE_CPU": "yes"}, {"train__device": "cuda"}, "ACCELERATE_USE_CPU", marks=NO_GPU),
        pytest.param({}, {"train__backend": "nccl"}, "train.backend=nccl", marks=NO_GPU),
        ({}, {"buffer__size": "4e12"}, "buffer.size=4000000000000"),
        ({}, {"buffer__size": "auto", "train__steps": "4e12"}, "raise buffer.age"),
        ({}, {"train__batch_size": "4e12", "buffer__size": "4e12"}, "train.batch_size=4000000000000"),
        ({}, {"tracking__num_samples": "4e12"}, "tracking.num_samples=4000000000000"),
    ],
)
def test_refused_by_name(digits, tmp_path, monkeypatch, capsys, env, settings, named):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    arguments = command(1, tmp_path / "run", digits, **(SHORT | settings))
    assert main(["train", *arguments[arguments.index(str(ROOT / "train.py")) + 1 :]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said
    assert not (tmp_path / "run").exists()


def test_a_long_tmpdir(digits, tmp_path):
    """Where the sockets of worker processes have no room for their names."""
    folder = tmp_path / ("x" * (109 - len(str(tmp_path))))
    folder.mkdir()
    done = alone(tmp_path / "run", digits, {"TMPDIR": str(folder)}, data__workers=1)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert f"TMPDIR={folder}" in done.stderr and "such as /tmp" in done.stderr


def test_a_rank_that_never_comes_ends_the_start(digits, tmp_path):
    """The watchdog is there before the ranks have met."""
    values = TINY | {"run.dir": tmp_path / "run", "data.shards": digits, "train.collective_timeout": 3}
    arguments = [sys.executable, str(ROOT / "train.py"), *(f"{key}={value}" for key, value in values.items())]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    run = Run(arguments, tmp_path / "log", **ranks, MASTER_PORT=str(free_port()))
    assert run.wait(60) == 1
    assert "rank 0: no step in 3 s (train.collective_timeout)" in run.log.read_text()


def test_a_slow_source_is_waited_for(digits, tmp_path):
    """Rank 0 takes far longer than the timeout to write the shards; the ranks wait in short exchanges."""
    fault = json.dumps({"kind": "slow_source", "seconds": 30})
    settings = SHORT | {"train__collective_timeout": 6}
    run = Run(command(2, tmp_path / "run", digits, script="tests/faulty.py", **settings), tmp_path / "log",
              EBM_FAULT=fault)  # fmt: skip
    assert run.wait(150) == 0, run.log.read_text()[-3000:]


def test_a_rank_that_fails_leaves_its_code_and_ends(digits, tmp_path):
    """Though leaving the group would take for ever: the others, which it would need, are on their way down."""
    fault, code = json.dumps({"kind": "lost_data", "rank": 1, "step": 5}), tmp_path / "code"
    run = Run(command(2, tmp_path / "run", digits, script="tests/faulty.py", **SHORT), tmp_path / "log",
              EBM_FAULT=fault, EBM_EXIT_FILE=str(code))  # fmt: skip
    began = time.monotonic()
    assert run.wait(100) == 1 and time.monotonic() - began < 90
    assert code.read_text() == "4\n" and "error: shard lost at step 5" in run.log.read_text()
