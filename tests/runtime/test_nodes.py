"""Two hosts, in network namespaces: torchrun and accelerate over them, and a cable that is pulled."""

import sys

import pytest
from namespaces import ADDRESSES, Hosts, why_not
from runs import ROOT, TINY, Run

from ebm.data.shards import ensure_shards

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
SETTINGS = TINY | {"train.steps": 60}
TIMEOUT = 20  # seconds that a step may take; the default is 600


def launch(hosts: Hosts, launcher: list[str], folder, arguments: list[str]) -> list[Run]:
    """The same command on each host, with its number."""
    commands = [[sys.executable, "-m", *launcher, str(i), str(ROOT / "train.py"), *arguments] for i in range(2)]
    return [Run(hosts.on(i, c), folder / f"log{i}", GLOO_SOCKET_IFNAME="eth0") for i, c in enumerate(commands)]


def test_a_pulled_cable(tmp_path):
    """Both hosts end within the timeout, each saying why; the run goes on by another launcher to the same result."""
    ensure_shards(str(tmp_path / "digits"), "digits", "train")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"

    def arguments(path):
        return [f"{k}={v}" for k, v in (SETTINGS | {"run.dir": path, "data.shards": tmp_path / "digits"}).items()]

    assert Run([sys.executable, str(ROOT / "train.py"), *arguments(whole)], tmp_path / "log").wait(400) == 0
    torchrun = ["torch.distributed.run", "--nnodes", "2", "--master-addr", ADDRESSES[0], "--node-rank"]
    file = str(ROOT / "launch/accelerate/cpu_nodes.yaml")
    accelerate = [
        "accelerate.commands.launch",
        "--config_file",
        file,
        "--main_process_ip",
        ADDRESSES[0],
        "--machine_rank",
    ]
    with Hosts() as hosts:
        runs = launch(hosts, torchrun, tmp_path, [*arguments(run_dir), f"train.collective_timeout={TIMEOUT}"])
        assert runs[0].until_step(run_dir, 25, 300), runs[0].log.read_text()
        hosts.link(1, "down")
        for rank, run in enumerate(runs):
            assert run.wait(300) == 1
            said = run.log.read_text()
            why = f"rank {rank}: no step in {TIMEOUT} s (train.collective_timeout): a rank hangs, or its host"
            assert why in said and "ebm/training/loop.py" in said, said
        hosts.link(1, "up")
        for run in launch(hosts, accelerate, tmp_path, arguments(run_dir)):
            assert run.wait(400) == 0, run.log.read_text()
    assert f"resuming {run_dir} at step" in (tmp_path / "log0").read_text()
    assert (run_dir / "trace.jsonl").read_bytes() == (whole / "trace.jsonl").read_bytes()
