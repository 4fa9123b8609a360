"""Bad input: the exit code, one clear message that names what is wrong, no traceback."""

import json
import subprocess
import sys

import pytest
from runs import ROOT, command, environment, finish

from ebm.__main__ import main
from ebm.data.shards import ensure_shards


@pytest.fixture
def digits(tmp_path):
    ensure_shards(str(tmp_path / "shards"), "digits", "train")
    return tmp_path / "shards"


def refusal(capsys, *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("train.stepz=5", ["train.stepz", "did you mean train.steps"]),
        ("train.steps=many", ["train.steps='many'", "integer"]),
        ("train.batch_size=130", ["train.batch_size=130", "data.streams=4", "132"]),
        ("optim.lr=-1", ["optim.lr=-1", "greater than 0"]),
        ("energy.kind=magic", ["energy", "magic", "'resnet'"]),
        ("data.shape=[1,8]", ["data.shape"]),
        ("nonsense", ["nonsense", "key=value"]),
    ],
)
def test_configs(capsys, argument, named):
    message = refusal(capsys, argument)
    assert all(part in message for part in named), message


def fail(tmp_path, shards, expect: int, ranks: int = 1, **settings) -> str:
    """The message of a run that must end with `expect`; one rank runs as `python train.py`, which keeps its code."""
    arguments = command(ranks, tmp_path / "run", shards, **settings)
    if ranks == 1:
        script = arguments.index(str(ROOT / "train.py"))
        arguments = [sys.executable, *arguments[script:]]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=environment(), cwd=tmp_path)
    output = done.stdout + done.stderr
    if ranks == 1:
        assert done.returncode == expect, output
        assert "Traceback" not in output
    assert output.count("error:") >= 1, output
    return output


def test_no_shards(tmp_path):
    message = fail(tmp_path, tmp_path / "nowhere", 4, data__source="null")
    assert "nowhere" in message and "python -m ebm shard" in message


def test_a_mistyped_directory_of_shards(tmp_path, digits):
    """The source is the config's own: its digits are not written to any path that someone mistypes."""
    message = fail(tmp_path, tmp_path / "shrads", 2)
    assert f"data.shards={tmp_path}/shrads: there are no shards" in message and f"did you mean {digits}?" in message
    assert not (tmp_path / "shrads").exists() and not (tmp_path / "run").exists()


def test_missing_shard(tmp_path, digits):
    (digits / "shard-000001.tar").unlink()
    assert "shard-000001.tar" in fail(tmp_path, digits, 4)


def test_shard_of_the_wrong_size(tmp_path, digits):
    with (digits / "shard-000000.tar").open("ab") as shard:
        shard.write(b"\0" * 512)
    assert "shard-000000.tar" in fail(tmp_path, digits, 4)


@pytest.mark.parametrize("shape", ["[1,28,28]", "[3,8,8]"])
def test_images_of_another_shape(tmp_path, digits, shape):
    message = fail(tmp_path, digits, 4, data__shape=shape)
    assert "data.shape" in message and "1x8x8" in message.replace("[1, 8, 8]", "1x8x8"), message


def test_an_error_while_a_checkpoint_is_being_written(tmp_path, digits):
    """The process waits for the thread that writes: one inside torch at the interpreter's end aborts it (exit 134)."""
    large = {"energy.features": "[256,512,512]", "buffer.size": 8192}
    settings = {key.replace(".", "__"): value for key, value in large.items()}
    assert "data.shape" in fail(tmp_path, digits, 4, data__shape="[1,28,28]", **settings)


def test_run_directory_of_another_config(tmp_path, digits):
    """A config binds once there is a checkpoint, which another config would not go on with."""
    finish(command(1, tmp_path / "run", digits, train__steps=10), tmp_path / "log")
    message = fail(tmp_path, digits, 2, train__steps=10, optim__lr=0.5, sampler__num_steps=3)
    assert "optim.lr: 0.0001 there, 0.5 now" in message and "sampler.num_steps: 2 there, 3 now" in message
    assert "train.steps" not in message


def test_fp16_without_a_gpu(tmp_path, digits):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU computes in fp16")
    assert "train.mixed_precision=fp16" in fail(tmp_path, digits, 2, train__mixed_precision="fp16")


def test_ranks_that_do_not_divide_the_streams(tmp_path, digits):
    message = fail(tmp_path, digits, 2, ranks=2, data__streams=1, buffer__size=256)
    assert "data.streams=1 is not divisible by 2 processes" in message


def test_ranks_that_did_not_join_one_group():
    """A process that was launched as one of two, but sees itself alone."""
    code = (
        "import os; from accelerate import Accelerator; Accelerator(cpu=True)\n"
        "os.environ |= {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}\n"
        "os.environ |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1'}\n"
        "from ebm.config import TrainConfig; from ebm.runtime.distributed import World; World(TrainConfig())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert "2 processes were launched, but this one sees a group of 1" in done.stderr, done.stderr


def test_flipped_manifest_count(tmp_path, digits):
    manifest = json.loads((digits / "manifest.json").read_text())
    manifest["shards"][0]["samples"] -= 1
    (digits / "manifest.json").write_text(json.dumps(manifest))
    assert "shard-000000.tar" in fail(tmp_path, digits, 4, train__steps=30)
