"""torchrun: two ranks, and starting them again when one dies."""

import os
import signal
import sys

from runs import ROOT, TINY, Run, final_hashes, free_port, last_step

STEPS = 80


def torchrun(run_dir, digits, *options: str, steps: int = STEPS) -> list[str]:
    settings = TINY | {"run.dir": run_dir, "data.shards": digits, "train.steps": steps}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--master-port",
        str(free_port()),
        "--nproc_per_node",
        "2",
    ]
    return [*launcher, *options, str(ROOT / "train.py"), *(f"{key}={value}" for key, value in settings.items())]


def test_a_killed_rank_is_started_again(digits, tmp_path):
    """One restart is enough, and the result is that of a run without one, to the bit."""
    assert Run(torchrun(tmp_path / "whole", digits), tmp_path / "log").wait(400) == 0
    run = Run(torchrun(tmp_path / "run", digits, "--max-restarts", "1"), tmp_path / "log1")
    assert run.until_step(tmp_path / "run", 25, 300), run.log.read_text()
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait(400) == 0, run.log.read_text()
    assert f"resuming {tmp_path / 'run'} at step" in run.log.read_text()
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "whole")
    assert (tmp_path / "run/trace.jsonl").read_bytes() == (tmp_path / "whole/trace.jsonl").read_bytes()


def test_a_stopped_run_is_not_started_again(digits, tmp_path):
    """Its ranks end with 0, which the launcher takes for no failure; RUN/exit_code says that they were stopped."""
    run = Run(torchrun(tmp_path / "run", digits, "--max-restarts", "1", steps=10**6), tmp_path / "log")
    assert run.until_step(tmp_path / "run", 15, 300), run.log.read_text()
    os.kill(run.ranks()[0], signal.SIGUSR1)
    assert run.wait(400) == 0 and (tmp_path / "run/exit_code").read_text() == "75\n"
    said = run.log.read_text()
    (stopped,) = (int(line.split()[3].rstrip(",")) for line in said.splitlines() if line.startswith("stopped at step"))
    assert 15 <= stopped == last_step(tmp_path / "run") and "Traceback" not in said
