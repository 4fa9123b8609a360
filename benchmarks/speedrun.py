"""Seconds of training until samples are good: Fashion-MNIST on one GPU (or any config on anything).

python benchmarks/speedrun.py [--config configs/fashion_mnist_density_gpu.yaml] [--floors 4] [--steps 1000]
                              [--num 600] [--every 500] [--limit 600] [--out FILE] [key=value ...]

Trains by the command that users type, with a checkpoint every --every steps, and measures each checkpoint by
`ebm evaluate`: the Frechet distance of --num fresh chains of --steps steps to held-out data, in floors: distances of as
many training images. The classifier in whose features it is taken is trained on the data set once. The result is the
first checkpoint at or below --floors, its step, and the training seconds up to it: what its steps took by
metrics.jsonl, without start, checkpoints and evaluation; a compilation is part of the first step. No later checkpoint
is measured. --limit: seconds of training after which the run is stopped; what it has reached until then is measured.
--out is written after each checkpoint.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import machine, publish, table, training_seconds, write

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/fashion_mnist_density_gpu.yaml")
    parser.add_argument("--floors", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=1000, help="of each chain")
    parser.add_argument("--num", type=int, default=600, help="chains")
    parser.add_argument("--every", type=int, default=500, help="training steps between two checkpoints")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of training at most")
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
            reached = points[-1] if points[-1]["floors"] <= options.floors else None
            result = {"machine": machine(), "config": " ".join([str(options.config), *options.overrides]),
                      "floors": options.floors, "chain_steps": options.steps, "num": options.num,
                      "reached": reached, "points": points}  # fmt: skip
            if options.out:
                write(result, options.out)
            if reached:
                break
    if not points:
        raise SystemExit("training has written no checkpoint to measure; give it more seconds by --limit")
    print(table(["step", "seconds", "floors"], [[str(p["step"]), p["seconds"], p["floors"]] for p in points]))
    publish(result, options.out)


def train(run: Path, options: argparse.Namespace) -> None:
    settings = {
        "run.dir": run,
        "checkpoint.every": options.every,
        "checkpoint.keep": 10**6,
        "tracking.wandb": "disabled",
        "tracking.samples_every": 10**6,
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
    command += ["--num", str(options.num), "--steps", str(options.steps)]
    subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=True)
    values = json.loads(file.read_text())
    seconds = training_seconds(run, step)
    distances = {key: values[f"frechet/{key}"] for key in ("fresh", "fresh_low", "fresh_high", "floor")}
    return {"step": step, "seconds": round(seconds, 2), "floors": values["frechet/fresh_ratio"]} | distances


if __name__ == "__main__":
    main()
