"""Two hosts, in network namespaces: torchrun and accelerate over them, and a cable that is pulled."""

import sys
import time

import pytest
from namespaces import ADDRESSES, Hosts, why_not
from runs import ROOT, TINY, Run, finish, last_step, records

from ebm.data.shards import ensure_shards

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
TIMEOUT, MARGIN = 10, 30
SETTINGS = TINY | {"train.steps": 100, "sampler.num_steps": 5, "train.collective_timeout": TIMEOUT}


def launch(hosts: Hosts, launcher: str, folder, arguments: list[str]) -> list[Run]:
    """The same command on each host."""
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
    words = {"torchrun": torchrun, "accelerate": accelerate}[launcher]
    commands = [[sys.executable, "-m", *words, str(i), str(ROOT / "train.py"), *arguments] for i in range(2)]
    return [
        Run(hosts.on(i, command), folder / f"log{i}", GLOO_SOCKET_IFNAME="eth0") for i, command in enumerate(commands)
    ]


def test_a_pulled_cable(tmp_path):
    ensure_shards(str(tmp_path / "digits"), "digits", "train")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"

    def arguments(path):
        return [f"{k}={v}" for k, v in (SETTINGS | {"run.dir": path, "data.shards": tmp_path / "digits"}).items()]

    finish([sys.executable, str(ROOT / "train.py"), *arguments(whole)], tmp_path / "log")
    with Hosts() as hosts:
        runs = launch(hosts, "torchrun", tmp_path, arguments(run_dir))
        assert runs[0].until_step(run_dir, 25)
        hosts.link(1, "down")
        t = time.time()
        for run in runs:
            print(run.wait(120), time.time() - t)
            print(run.log.read_text()[-6000:])
        hosts.link(1, "up")
        runs = launch(hosts, "accelerate", tmp_path, arguments(run_dir))
        for run in runs:
            print(run.wait(120), time.time() - t)
            print(run.log.read_text()[-6000:])
    assert (run_dir / "DONE").exists()
    assert (run_dir / "trace.jsonl").read_bytes() == (whole / "trace.jsonl").read_bytes()
