"""Step time of the default network without W&B, offline, with a server out of reach, and with its service killed.

python benchmarks/wandb_loss.py [--out DIR] [--rounds N] [--steps N]

Each round runs the four one after the other, so that a slow spell of the machine meets them all. A run counts by the
median of perf/step_s, and by its ratio to the round's run without W&B; the killed run counts from the kill on. Prints
a table (median, smallest and largest of the rounds) and one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runs import Run, final_hashes, free_port, records  # noqa: E402
from wandb_server import KEY, service  # noqa: E402

CASES = ("disabled", "offline", "closed port", "killed")
LOG_EVERY = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/wandb_loss"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    out = options.out.resolve()
    shutil.rmtree(out / "runs", ignore_errors=True)
    seconds, hashes = {case: [] for case in CASES}, []
    for number in range(options.rounds):
        for case in CASES:
            folder = out / "runs" / f"{case.replace(' ', '_')}_{number}"
            seconds[case].append(measure(case, folder, out / "shards", options.steps))
            hashes.append(final_hashes(folder / "run"))
    result = {"steps": options.steps, "identical": all(h == hashes[0] for h in hashes), "cases": {}}
    print(f"{'':12}  {'ms a step':>22}  {'ratio to disabled':>22}")
    for case, values in seconds.items():
        ratios = [ours / without for ours, without in zip(values, seconds["disabled"], strict=True)]
        result["cases"][case] = {"step_s": spread(values), "ratio": spread(ratios)}
        print(f"{case:12}  {row([1000 * v for v in values], 1):>22}  {row(ratios, 3):>22}")
    print(json.dumps(result))
    return 0


def measure(case: str, folder: Path, shards: Path, steps: int) -> float:
    """Median seconds a step of one run."""
    folder.mkdir(parents=True)
    settings = {
        "run.dir": folder / "run", "data.shards": shards, "data.workers": 0, "train.steps": steps,
        "train.log_every": LOG_EVERY, "tracking.samples_every": 100000, "tracking.sample_steps": 5,
        "tracking.wandb": {"closed port": "online", "killed": "offline"}.get(case, case),
    }  # fmt: skip
    server = {"WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_API_KEY": KEY}
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "train.py")]
    run = Run([*launch, *(f"{key}={value}" for key, value in settings.items())], folder / "log", **server)
    first = 4 * LOG_EVERY  # warm-up
    if case == "killed":
        first = max(first, steps // 3)
        run.until_step(folder / "run", first)
        os.kill(service(run), signal.SIGKILL)
    if run.wait(600) != 0:
        raise SystemExit((folder / "log").read_text())
    return median(r["perf/step_s"] for r in records(folder / "run/metrics.jsonl") if r["step"] > first + LOG_EVERY)


def spread(values: list[float]) -> dict[str, float]:
    return {name: round(f(values), 5) for name, f in (("median", median), ("min", min), ("max", max))}


def row(values: list[float], digits: int) -> str:
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(median(values), min(values), max(values), d=digits)


if __name__ == "__main__":
    sys.exit(main())
