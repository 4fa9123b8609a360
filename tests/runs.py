"""Real runs for the tests: the command users type, in processes of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
TINY = {
    "data.window": 64,
    "data.workers": 0,
    "data.trace": "true",
    "energy.features": "[8,16]",
    "energy.hidden_dim": 16,
    "sampler.num_steps": 2,
    "optim.lr": 1e-4,  # the default's is too much for chains of two steps
    "buffer.size": 256,
    "train.batch_size": 64,
    "train.log_every": 1,
    "train.steps": 60,
    "checkpoint.every": 10,
    "tracking.wandb": "disabled",
    "tracking.samples_every": 100000,
    "tracking.sample_steps": 5,
}


def command(ranks: int, run_dir: Path, shards: Path, script: str = "train.py", **settings) -> list[str]:
    """The command line of a tiny digits run; keys use `__` for the dot."""
    values = TINY | {"run.dir": run_dir, "data.shards": shards}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    if ranks > 1:
        launcher += ["--config_file", str(ROOT / "launch/accelerate/cpu_2.yaml"), "--num_processes", str(ranks)]
    return [*launcher, str(ROOT / script), *(f"{key}={value}" for key, value in values.items())]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**extra) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"} | extra


class Run:
    """A training command under way, in a process group of its own."""

    def __init__(self, arguments: list[str], log: Path, **env):
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                arguments,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=environment(**env),
                start_new_session=True,
            )

    def wait(self, timeout: float = 180) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.log.read_text()[-3000:]}") from None

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in rank order."""
        children = psutil.Process(self.process.pid).children()
        ranks = [p for p in children if any(a.endswith(".py") for a in p.cmdline())]
        return [p.pid for p in sorted(ranks, key=lambda p: int(p.environ()["RANK"]))]

    def kill(self) -> None:
        """SIGKILL to the launcher, the ranks and their workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def until_step(self, run_dir: Path, step: int, timeout: float = 120) -> bool:
        """Wait until metrics.jsonl has reached `step`; False where the command ended before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                return False
            if last_step(run_dir) >= step:
                return True
            time.sleep(0.005)
        self.kill()
        raise AssertionError(f"step {step} not reached in {timeout} s:\n{self.log.read_text()[-3000:]}")


def finish(arguments: list[str], log: Path, expect: int = 0, **env) -> str:
    """Run a command to its end; its output."""
    code = Run(arguments, log, **env).wait()
    text = log.read_text()
    assert code == expect, f"exit {code}, not {expect}:\n{text[-4000:]}"
    return text


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_step(run_dir: Path) -> int:
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def final_hashes(run_dir: Path) -> dict[str, str]:
    """sha256 of each file of the newest checkpoint: weights, EMA, optimizer, chains, state."""
    newest = max((run_dir / "checkpoints").glob("step_????????"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {"step": newest.name} | {name: entry["sha256"] for name, entry in manifest["files"].items()}
