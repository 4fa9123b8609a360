"""W&B absent, out of reach, lost in mid-run, out of disk: the run is the same run, and loses nothing.

Whole runs under `accelerate launch` with the real client; the reference is the run without W&B."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError
from runs import ROOT, Run, command, environment, final_hashes, finish, free_port, records
from wandb_reader import history
from wandb_server import KEY, StandIn, service

STEPS = 300  # at 10 to 20 ms: long enough for the client to start, and to be killed, under way
SETTINGS = {"train__steps": STEPS, "checkpoint__every": 100, "data__trace": "false", "tracking__wandb_timeout": 8}


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    """The final weights, chains and state of the run without W&B."""
    path = tmp_path_factory.mktemp("reference")
    finish(command(1, path / "run", digits, **SETTINGS), path / "log")
    return final_hashes(path / "run")


@pytest.fixture
def server():
    servers = []
    yield lambda behaviour: servers.append(StandIn(behaviour)) or servers[-1]
    for server in servers:
        server.close()


def start(path: Path, shards: Path, mode: str, **env) -> Run:
    homes = {f"WANDB_{name}_DIR": str(path / "home") for name in ("CONFIG", "CACHE", "DATA")}
    return Run(command(1, path / "run", shards, tracking__wandb=mode, **SETTINGS), path / "log", **homes, **env)


def end(run: Run, run_dir: Path, reference: dict) -> str:
    """What the run said; it must have ended as the one without W&B did."""
    code, said = run.wait(300), run.log.read_text()
    assert code == 0, said[-4000:]
    assert "Traceback" not in said, said[-4000:]
    assert [r["step"] for r in records(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert final_hashes(run_dir) == reference
    return said


def steps_in(run_dir: Path, pattern: str) -> list[int]:
    """The steps that can be synced."""
    steps = []
    for file in run_dir.glob(f"wandb/{pattern}/*.wandb"):
        steps += [row["step"] for row in history(file) if "train/loss" in row]
    return steps


def until(condition, seconds: float = 60) -> None:
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, f"not so within {seconds} s"
        time.sleep(0.05)


@pytest.mark.parametrize("behaviour", ["closed", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_server_out_of_reach_leaves_the_whole_run_offline(digits, reference, server, tmp_path, behaviour):
    env = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY}
    run = start(tmp_path, digits, "online", **(env if behaviour == "closed" else server(behaviour).environment))
    said = end(run, tmp_path / "run", reference)
    assert said.count("logging offline instead") == 1 and "python -m ebm sync" in said
    assert steps_in(tmp_path / "run", "offline-run-*") == list(range(1, STEPS + 1))


def test_its_service_is_killed_in_mid_run(digits, reference, server, tmp_path):
    works = server("works")
    run = start(tmp_path, digits, "online", **works.environment)
    until(lambda: len(steps_in(tmp_path / "run", "*run-*")) >= 20)
    os.kill(service(run), signal.SIGKILL)
    assert run.process.poll() is None
    said = end(run, tmp_path / "run", reference)
    assert said.count("training goes on") == 1 and "wandb sync --include-online" in said
    steps = steps_in(tmp_path / "run", "*run-*")
    assert len(steps) >= 20 and steps == list(range(1, len(steps) + 1))
    hint = re.search(r"wandb sync --include-online .*", said)[0]
    env = environment(**works.environment) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(hint, shell=True, cwd=tmp_path, env=env, check=True, timeout=120)
    (rows,) = (works.history(name) for name in works.runs)
    assert {row["step"] for row in rows if "train/loss" in row} == set(steps)


@pytest.mark.slow
def test_its_service_stalls_in_mid_run(digits, reference, tmp_path):
    """As it does where its disk hangs: calls to it block once the pipe to it is full, and so would its exit hook."""
    run = start(tmp_path, digits, "offline")
    until(lambda: len(steps_in(tmp_path / "run", "*run-*")) >= 5)
    stalled = service(run)
    os.kill(stalled, signal.SIGSTOP)
    try:
        said = end(run, tmp_path / "run", reference)
    finally:
        os.kill(stalled, signal.SIGKILL)
    assert "did not finish in 8 s" in said and "python -m ebm sync" in said


@pytest.mark.slow
def test_its_disk_is_full(digits, reference, tmp_path):
    folder = tmp_path / "run/wandb"
    folder.mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs root: {mount.stderr.strip()}")
    try:
        said = end(start(tmp_path, digits, "offline"), tmp_path / "run", reference)
        steps = []
        with pytest.raises(DecodeError):  # the file ends where the disk did
            steps += steps_in(tmp_path / "run", "offline-run-*")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    assert said.count("no space left") == 1


def test_it_is_not_installed(digits, reference, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/__init__.py").write_text("raise ImportError('it needs another protobuf')\n")
    run = start(tmp_path, digits, "auto", PYTHONPATH=f"{tmp_path}:{ROOT}")
    said = end(run, tmp_path / "run", reference)
    assert said.count("W&B can't be used (it needs another protobuf)") == 1
