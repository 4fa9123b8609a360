"""Step time of the default network without W&B, offline, with a server out of reach, and with its service killed.

python benchmarks/wandb_loss.py [--runs DIR] [--rounds N] [--steps N] [--out FILE]

Chains have 20 steps. Each round runs the four one after the other, each round from another of them on. A run counts by
the median of perf/step_s after its first half, by its ratio to the round's run without W&B, and by its ratio to its own
first half, since runs a minute apart meet another machine. W&B's service is killed after the first half. Prints a table
(median and quartiles of the rounds) and one JSON object.
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # for their helpers

from runs import Run, final_hashes, free_port, records
from timing import machine, publish, ratios, spread, table
from wandb_server import KEY, service

ROOT = Path(__file__).parent.parent

CASES = ("disabled", "offline", "closed port", "killed")
LOG_EVERY = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/wandb_loss"))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    options = parser.parse_args()
    root = options.runs.resolve()
    shutil.rmtree(root / "runs", ignore_errors=True)
    rounds, hashes = [], []
    for number in range(options.rounds):
        halves = {}
        for case in (CASES[(number + i) % len(CASES)] for i in range(len(CASES))):
            folder = root / "runs" / f"{case.replace(' ', '_')}_{number}"
            halves[case] = measure(case, folder, root / "shards", options.steps)
            hashes.append(final_hashes(folder / "run"))
        rounds.append(halves)
    result = {"machine": machine(), "rounds": options.rounds, "steps": options.steps,
              "identical": all(h == hashes[0] for h in hashes), "cases": {}}  # fmt: skip
    for case in CASES:
        first, second = zip(*(halves[case] for halves in rounds), strict=True)
        without = [halves["disabled"][1] for halves in rounds]
        result["cases"][case] = {"step_s": spread(second), "to_disabled": spread(ratios(second, without), 3),
                                 "to_first_half": spread(ratios(second, first), 3)}  # fmt: skip
    rows = [[case, *(shown(v) for v in found.values())] for case, found in result["cases"].items()]
    print(table(["case", "s a step", "to disabled", "to its first half"], rows))
    publish(result, options.out)
    return 0


def measure(case: str, folder: Path, shards: Path, steps: int) -> tuple[float, float]:
    """Median seconds a step of one run's first half and of its second."""
    folder.mkdir(parents=True)
    settings = {
        "run.dir": folder / "run", "data.shards": shards, "data.workers": 0, "sampler.num_steps": 20,
        "train.steps": steps, "train.log_every": LOG_EVERY, "tracking.samples_every": 100000,
        "tracking.sample_steps": 5,
        "tracking.wandb": {"closed port": "online", "killed": "offline"}.get(case, case),
    }  # fmt: skip
    server = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY}
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py")]
    run = Run([*launch, *(f"{key}={value}" for key, value in settings.items())], folder / "log", **server)
    half = steps // 2 + LOG_EVERY
    if case == "killed":
        run.until_step(folder / "run", half)
        os.kill(service(run), signal.SIGKILL)
    if run.wait(600) != 0:
        raise SystemExit((folder / "log").read_text())
    found = records(folder / "run/metrics.jsonl")

    def between(low: int, high: int) -> float:
        return median(r["perf/step_s"] for r in found if low < r["step"] <= high)

    return between(4 * LOG_EVERY, half), between(half + LOG_EVERY, steps)  # the beginning is warm-up


def shown(spread: dict[str, float]) -> str:
    return "{median:.4f} ({low:.4f} to {high:.4f})".format(**spread)


if __name__ == "__main__":
    sys.exit(main())
