"""Two hours of trouble, then the same bits: python tests/soak.py --minutes 120 --dir /tmp/soak

A run of two ranks on a disk of its own is killed every 40 to 200 s, at random a data worker, a rank, the launcher or
the fork server of the workers; now and then it is suspended for a while, and twice its disk is full for a minute.
Beside it the same run goes on undisturbed and keeps all its checkpoints. In the end the newest checkpoint of the
disturbed run, its trace and its metrics are compared with those of the other. Prints a line for each event, then one
JSON object; exit code 1 where anything differs. The disk is a tmpfs, which needs the right to mount; without it no
disk is filled, and it says so. The energy mostly sleeps, which leaves the processors to others.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
from runs import ROOT, Run, command, last_step, records

SETTINGS = {
    "train__steps": 10_000_000, "optim__decay_start": 1.0, "checkpoint__every": 50, "train__log_every": 10,
    "data__workers": 1, "sampler__num_steps": 5, "health__every": 1_000_000, "health__max_restarts": 100_000,
    "train__collective_timeout": 60,
    "data__trace": "true", "energy__kind": "import", "energy__path": "slow_energy:SlowEnergy",
}  # fmt: skip
SLOW = {"EBM_TEST_SECONDS": "0.02", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
TARGETS = ("worker", "rank", "launcher", "fork server")


def arguments_of(run_dir: Path, shards: Path, **settings) -> list[str]:
    """The command line, without what another kind of energy does not have."""
    every = command(2, run_dir, shards, **SETTINGS, **settings)
    return [argument for argument in every if not argument.startswith(("energy.features", "energy.hidden_dim"))]


def find(run: Run, target: str, rng: random.Random) -> int | None:
    """A process of the run; None where there is none at this moment."""
    if target == "launcher":
        return run.process.pid
    ranks = run.ranks()
    if target == "rank":
        return rng.choice(ranks) if ranks else None
    below = [p for rank in ranks for p in psutil.Process(rank).children(recursive=True)]
    servers = [p for p in below if any(p in q.parents() for q in below)]
    found = servers if target == "fork server" else [p for p in below if p not in servers and p.parent() in servers]
    return rng.choice(found).pid if found else None


def end(run: Run) -> None:
    """Whatever is left of a run some seconds after a kill; a run that still goes on by itself is given a minute."""
    with suppress(subprocess.TimeoutExpired):
        run.process.wait(100)
    run.kill()


def fill(disk: Path, seconds: float) -> None:
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(b"\0" * (1 << 16))
            file.flush()
    time.sleep(seconds)
    ballast.unlink()


def hashes(checkpoint: Path) -> dict[str, str]:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


def newest(run_dir: Path) -> Path:
    """The newest checkpoint of a step at which the undisturbed run saves too."""
    every = SETTINGS["checkpoint__every"]
    return max(p for p in (run_dir / "checkpoints").glob("step_????????") if int(p.name[5:]) % every == 0)


def disturb(arguments: list[str], run_dir: Path, where: Path, minutes: float, every: list[float], seed: int) -> Counter:
    rng, events, start = random.Random(seed), Counter(), time.monotonic()
    fills = [0.33, 0.66] if os.path.ismount(run_dir.parent) else []
    run = Run(arguments, where / "log", **SLOW)
    while (elapsed := (time.monotonic() - start) / 60) < minutes:
        deadline = time.monotonic() + rng.uniform(*every)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, every[0] / 2))
            os.killpg(run.process.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(1, every[0]))
            os.killpg(run.process.pid, signal.SIGCONT)
            events["suspended"] += 1
        if fills and elapsed / minutes > fills[0]:
            fills.pop(0)
            fill(run_dir.parent, min(60.0, every[1]))
            events["disk full"] += 1
        time.sleep(max(0.0, deadline - time.monotonic()))
        target = rng.choice(TARGETS)
        pid = None
        for _ in range(100):  # a start has no workers for some seconds
            with suppress(psutil.NoSuchProcess):
                pid = find(run, target, rng) if run.process.poll() is None else None
            if pid is not None or run.process.poll() is not None:
                break
            time.sleep(0.1)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            events[target] += 1
            if target != "fork server":  # a run does not need it again until its workers do
                end(run)
        if run.process.poll() is not None:
            events["starts"] += 1
            run = Run(arguments, where / "log", **SLOW)
        print(f"{elapsed:6.1f} min  step {last_step(run_dir)}  killed: {target}", flush=True)
    before = newest(run_dir)
    while newest(run_dir) == before and run.process.poll() is None:
        time.sleep(0.2)
    run.kill()
    return events


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, nargs=2, default=[40.0, 200.0], help="seconds between kills")
    parser.add_argument("--dir", type=Path, required=True, help="an empty directory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    where = options.dir.resolve()
    disk = where / "disk"
    disk.mkdir(parents=True)
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]).returncode
    if not mounted:
        print("no file system can be mounted here: no disk is filled")
    shards, run_dir, whole_dir = where / "digits", disk / "run", where / "whole"
    whole = Run(arguments_of(whole_dir, shards, checkpoint__keep=1_000_000), where / "whole.log", **SLOW)
    try:
        assert whole.until_step(whole_dir, 20)  # its shards are there
        arguments = arguments_of(run_dir, shards)
        events = disturb(arguments, run_dir, where, options.minutes, options.every, options.seed)
        kept = newest(run_dir)
        step = int(kept.name.removeprefix("step_"))
        other = whole_dir / "checkpoints" / kept.name
        while not other.exists() and whole.process.poll() is None:
            time.sleep(1)
        rows = {}
        for name in ("trace.jsonl", "metrics.jsonl"):
            rows[name] = [[r for r in records(path / name) if r["step"] <= step] for path in (run_dir, whole_dir)]
        traces, metrics = rows["trace.jsonl"], rows["metrics.jsonl"]
        same = {
            "checkpoint": hashes(kept) == hashes(other),
            "trace": traces[0] == traces[1],
            "rows": [r["step"] for r in metrics[0]] == [r["step"] for r in metrics[1]],
        }
    finally:
        whole.kill()
        if mounted:
            subprocess.run(["umount", "-l", str(disk)])
    print(json.dumps({"minutes": options.minutes, "step": step, "events": dict(events), "same": same}))
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
