"""What ends a command from outside ends it without a traceback: half an environment of a launcher, and Ctrl-C at any
time."""

import os
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, TINY, environment

from ebm.errors import ConfigError
from ebm.runtime.distributed import check_launch


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "no MASTER_ADDR"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR"),
        ({"LOCAL_RANK": "0"}, "no RANK and no WORLD_SIZE and no MASTER_ADDR"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK=2"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
    ],
)
def test_half_an_environment_is_refused(variables, words):
    with pytest.raises(ConfigError, match="unset RANK") as caught:
        check_launch(variables)
    assert words in str(caught.value)


def test_whole_environments_are_taken():
    for variables in ({}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "LOCAL_RANK": "1"}):
        check_launch(variables)


def test_a_rank_without_an_address_ends_clearly(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train.py", "tracking.wandb=disabled"], cwd=tmp_path, text=True,
                          capture_output=True, env=environment(RANK="0", WORLD_SIZE="2"), check=False)  # fmt: skip
    assert done.returncode == 2 and "MASTER_ADDR" in done.stderr and "Traceback" not in done.stderr


def interrupted(tmp_path, digits, after, *again) -> tuple[int, str]:
    """A training that gets Ctrl-C after some seconds, or, where `after` is None, at its first step; then `again`."""
    values = TINY | {"run.dir": tmp_path / "run", "data.shards": digits, "train.steps": 10**6}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *(f"{key}={value}" for key, value in values.items())],
            stdout=file, stderr=file, cwd=tmp_path, env=environment(), start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + (120 if after is None else after)
        while time.monotonic() < end and (after is not None or "step 1/" not in log.read_text()):
            time.sleep(0.01)
        for wait in (0.0, *again):
            time.sleep(wait)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
    return code, log.read_text()


@pytest.mark.parametrize("seconds", [0.5, 1.5, 4.0])
def test_ctrl_c_while_loading(tmp_path, digits, seconds):
    code, said = interrupted(tmp_path, digits, seconds)
    assert code in (130, 75) and "Traceback" not in said  # 75: a quick machine is at its first step


def test_a_second_ctrl_c_ends_at_once(tmp_path, digits):
    """A third may fall into the interpreter's own end, which it kills."""
    code, said = interrupted(tmp_path, digits, None, 0.02, 0.02)
    assert code in (130, 75, -signal.SIGINT) and "Traceback" not in said, said[-3000:]
