"""What a checkpoint costs the training: steps that begin or end one, against the other steps of the same run.

python benchmarks/checkpoint.py [--out DIR] [--steps 200] [key=value ...]

Trains the digits with a buffer of 65,536 chains (a checkpoint of 18 MB), saving every 20 steps, and prints one JSON
object: the median step, the longest step that had a save in it, and the time saves took away altogether.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
EVERY = 20
SETTINGS = [
    "tracking.wandb=disabled", "tracking.samples_every=100000", "train.log_every=1", "buffer.size=65536",
    f"checkpoint.every={EVERY}", "health.every=100000",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/checkpoint"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "train.py", f"run.dir={options.out}",
                    f"train.steps={options.steps}", *SETTINGS, *options.overrides], check=True, cwd=ROOT)  # fmt: skip
    steps = {}
    for line in (options.out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps[record["step"]] = record["perf/step_s"]
    # A save begins after a step's metrics are written, so its cost falls on the steps after it.
    apart = {step: s for step, s in steps.items() if step > 10 and step % EVERY > 5}
    during = {step: s for step, s in steps.items() if step > 10 and 1 <= step % EVERY <= 5}
    typical = median(apart.values())
    newest = max((options.out / "checkpoints").glob("step_????????"))
    print(json.dumps({
        "checkpoint_mb": round(sum(f.stat().st_size for f in newest.iterdir()) / 1e6, 1),
        "median_step_s": round(typical, 4),
        "longest_step_apart_s": round(max(apart.values()), 4),
        "median_step_after_a_save_s": round(median(s for step, s in during.items() if step % EVERY == 1), 4),
        "longest_step_during_a_save_s": round(max(during.values()), 4),
        "median_stall_in_steps": round(median(sum(during[first + i] - typical for i in range(5)) / typical
                                             for first in during if first % EVERY == 1 and first + 4 in during), 3),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
