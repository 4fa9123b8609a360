"""launch/train.sbatch and launch/submit.py on a real Slurm of two nodes: a job goes on over whatever ends it."""

import os
import re
import signal
import sys
import time

import pytest
from runs import ROOT, TINY, environment, finish, last_step, records
from slurm_cluster import Cluster, why_not

from ebm.data.shards import ensure_shards

REASON = why_not()
slurm = pytest.mark.skipif(REASON is not None, reason=REASON or "")
STEPS = 150
# Steps slow enough that a job can be caught in the middle of them.
SETTINGS = TINY | {"train.steps": STEPS, "sampler.num_steps": 20, "data.workers": 1, "train.collective_timeout": 60}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "train"
    ensure_shards(str(path), "digits", "train")
    return path


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """trace.jsonl of an uninterrupted run; it does not depend on the number of ranks."""
    path = tmp_path_factory.mktemp("whole")
    arguments = [sys.executable, str(ROOT / "train.py"), *overrides(path / "run", digits)]
    finish(arguments, path / "log")
    return (path / "run/trace.jsonl").read_bytes()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def overrides(run_dir, shards) -> list[str]:
    return [f"{key}={value}" for key, value in (SETTINGS | {"run.dir": run_dir, "data.shards": shards}).items()]


def submit(cluster, run_dir, digits, *options: str) -> int:
    """The id of a job of two nodes with a CPU rank each."""
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--nodes", "2", "--time", "30", *options]
    variables = environment(GLOO_SOCKET_IFNAME="lo", EBM_MIN_FREE_GB="0.1")
    said = cluster.run(*command, *overrides(run_dir, digits), **variables)
    return int(re.search(r"Submitted batch job (\d+)", said)[1])


def until_step(cluster, job, run_dir, step):
    cluster.until(lambda: last_step(run_dir) >= step, f"step {step}\n{log(run_dir)}", 120)


def log(run_dir) -> str:
    return "\n".join(path.read_text() for path in sorted((run_dir / "logs").glob("*")))


def done(cluster, job, run_dir, whole) -> str:
    """Wait for the job's end, which must be the run's, as if nothing had happened; what it said."""
    assert cluster.until_state(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT") == "COMPLETED", log(run_dir)
    assert (run_dir / "DONE").exists()
    assert (run_dir / "trace.jsonl").read_bytes() == whole
    assert [r["step"] for r in records(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return log(run_dir)


@slurm
def test_a_signal_saves_and_requeues(cluster, digits, whole, tmp_path):
    run_dir = tmp_path / "a run"
    job = submit(cluster, run_dir, digits)
    until_step(cluster, job, run_dir, 25)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    cluster.until_restart(job, 1)
    stopped = last_step(run_dir)
    assert 25 <= stopped < STEPS
    said = done(cluster, job, run_dir, whole)
    print(said)
