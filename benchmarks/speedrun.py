"""Seconds of training to a given distance: Fashion-MNIST on one GPU (or any config on anything).

python benchmarks/speedrun.py [--config configs/fashion_mnist.yaml] [--distance 3] [--every 250] [--limit 600]
                              [--num 2000] [--out FILE] [key=value ...]

Trains by the command that users type, with a checkpoint every --every steps, and measures each checkpoint by
`ebm evaluate`: the Frechet distance of the persistent chains to held-out data, in the features of a classifier that is
trained on the data set once. The result is the first checkpoint at or below --distance, its step, and the training
seconds up to it: what its steps took by metrics.jsonl, without start, checkpoints and evaluation; a compilation is
part of the first step. No later checkpoint is measured. --limit: seconds of training after which the run is stopped;
what it has reached until then is measured. --out is written after each checkpoint.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import machine, publish, table, write

ROOT = Path(__file__).parent.parent
CHAINS = "frechet/persistent"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/fashion_mnist.yaml")
    parser.add_argument("--distance", type=float, default=3.0)
    parser.add_argument("--every", type=int, default=250, help="steps between two checkpoints that are measured")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of training at most")
    parser.add_argument("--num", type=int, default=2000, help="images and chains of each set")
    parser.add_argument("--run", type=Path, help="directory of the run; default: a temporary one")
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or Path(folder) / "run"
        train(run, options)
        points, reached = [], None
        for path in sorted((run / "checkpoints").glob("step_????????"))[1:]:
            points.append(measured(path, run, options))
            reached = points[-1] if points[-1]["distance"] <= options.distance else None
            result = {"machine": machine(), "config": " ".join([str(options.config), *options.overrides]),
                      "distance": options.distance, "reached": reached, "points": points}  # fmt: skip
            if options.out:
                write(result, options.out)
            if reached:
                break
    if not points:
        raise SystemExit("training has written no checkpoint to measure; give it more seconds by --limit")
    print(table(["step", "seconds", "distance"], [[str(p["step"]), p["seconds"], p["distance"]] for p in points]))
    publish(result, options.out)


def train(run: Path, options: argparse.Namespace) -> None:
    settings = {
        "run.dir": run,
        "checkpoint.every": options.every,
        "checkpoint.keep": 10**6,
        "tracking.wandb": "disabled",
        "tracking.samples_every": 10**6,
        "train.log_every": 1,
        "train.time_limit": options.limit,
    }
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(options.config)]
    command += [*(f"{key}={value}" for key, value in settings.items()), *options.overrides]
    code = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
    if code not in (0, 75):
        raise SystemExit(f"training ended with {code}")


def measured(checkpoint: Path, run: Path, options: argparse.Namespace) -> dict[str, float]:
    step = int(checkpoint.name.removeprefix("step_"))
    file = run / f"{checkpoint.name}.json"
    command = [sys.executable, "-m", "ebm", "evaluate", str(checkpoint), "--metrics", "frechet", "--json", str(file)]
    command += ["--num", "64", "--steps", "1", "--max-samples", str(options.num)]  # fresh chains are not measured here
    subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
    values = json.loads(file.read_text())
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    seconds = sum(line["perf/step_s"] for line in lines if line["step"] <= step)
    return {"step": step, "seconds": round(seconds, 2), "distance": values[CHAINS], "floor": values["frechet/floor"]}


if __name__ == "__main__":
    main()
