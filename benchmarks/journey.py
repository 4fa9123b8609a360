"""The way of a new user, typed from an empty folder: pictures, `ebm init`, then every command that a command prints.

python benchmarks/journey.py --out DIR [--images 2000] [--side 32] [--minutes 6] [--num 512] [--no-defaults] [--tiny]

Writes patches of photographs, a class folder for each photograph (scikit-image's if it is installed, else the two of
scikit-learn), types `python -m ebm init --data pictures --shards --minutes M`, and follows the commands that are
printed, word for word; `evaluate` gets `--num`, since its 2,000 chains would take as long as the training. Then the
same images are trained for as many steps, and at most as many seconds, by a config that says nothing but where the data
are: the defaults of --help. Prints one JSON object: the seconds of every command and in all, the Fréchet ratio of fresh
chains, their spread over that of the data, and the step at which the run of the defaults was called sick. Exits 1 where
the spread is below half of the data's or the commands took more than 15 minutes. `--tiny` trains four steps, to see
that the script works.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import machine

ROOT = Path(__file__).absolute().parent.parent
NEXT = re.compile(r"^(?:next:)?\s*(python -m ebm .*)$", re.MULTILINE)
PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
LIMIT, LEAST_SPREAD = 900.0, 0.5
TINY = {"train": ["train.steps=4", "tracking.num_samples=4", "tracking.sample_steps=2"], "sample": ["--steps", "2"],
        "evaluate": ["--num", "64", "--steps", "2"]}  # fmt: skip
DEFAULTS = """\
run: {{dir: runs/defaults}}
data: {{shards: {shards}, shape: [3, {side}, {side}]}}
evaluate: {{shards: {heldout}}}
train: {{steps: {steps}, time_limit: {seconds}}}
tracking: {{samples_every: {every}, num_samples: 32}}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is empty or not there")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, as `ebm init` takes it")
    parser.add_argument("--num", type=int, default=512, help="fresh chains that `evaluate` draws")
    parser.add_argument("--no-defaults", action="store_true", help="leave out the run of the defaults")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if any(options.out.iterdir()):
        parser.error(f"--out {options.out}: is not empty")
    photos = write_patches(options.out / "pictures", options.images, options.side)
    more = TINY if options.tiny else {"evaluate": ["--num", str(options.num)]}
    began, cpu = time.monotonic(), cpu_seconds()
    first = f"python -m ebm init --data pictures --shards --minutes {0.05 if options.tiny else options.minutes:g}"
    typed = follow(first, options.out, more)
    total, cpu = time.monotonic() - began, cpu_seconds() - cpu
    found = reading(options.out / "runs/pictures")
    result = {
        "machine": machine() | {"load": os.getloadavg()[0]},
        "images": {"number": options.images, "side": options.side, "photographs": photos},
        "commands": typed,
        "total_seconds": round(total, 1),
        "cpu_seconds": round(cpu, 1),
        "journey": found,
    }
    if not options.no_defaults:
        result["defaults"] = by_defaults(options, more, found["steps"], typed)
    result["passed"] = found["spread"] >= LEAST_SPREAD and total <= LIMIT
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] or options.tiny else 1


def write_patches(folder: Path, number: int, side: int) -> list[str]:
    """Random patches, a folder for each photograph. Returns the photographs' names."""
    photos, draws = load_photos(), np.random.default_rng(0)
    for name, photo in photos.items():
        (folder / name).mkdir(parents=True)
        for i in range(number // len(photos)):
            top, left = (draws.integers(0, size - side + 1) for size in photo.shape[:2])
            Image.fromarray(photo[top : top + side, left : left + side]).save(folder / name / f"{i:04d}.png")
    return list(photos)


def load_photos() -> dict[str, np.ndarray]:
    """Photographs (H, W, 3) of half their size, so that a patch shows more than a surface."""
    found = importlib.util.find_spec("skimage")
    if found is not None and found.origin is not None:  # its pictures alone: its readers need more packages
        files = [Path(found.origin).parent / "data" / name for name in PHOTOS]
        photos = {file.stem: np.asarray(Image.open(file).convert("RGB")) for file in files}
    else:
        photos = dict(zip(("temple", "flower"), load_sample_images().images, strict=True))
    halves = {name: Image.fromarray(photo) for name, photo in photos.items()}
    return {name: np.asarray(i.resize((i.width // 2, i.height // 2))) for name, i in halves.items()}


def follow(first: str, folder: Path, more: dict[str, list[str]]) -> list[dict]:
    """Runs a command, and then each that a command printed, once. `more`: arguments by the command's name."""
    waiting, done = [first], []
    while waiting:
        command = waiting.pop(0)
        began = time.monotonic()
        said = call([*shlex.split(command), *more.get(shlex.split(command)[3], [])], folder)
        done.append({"command": command, "seconds": round(time.monotonic() - began, 1)})
        print(f"{done[-1]['seconds']:7.1f} s  {command}", file=sys.stderr, flush=True)
        known = {*waiting, *(each["command"] for each in done)}
        waiting += [each for each in dict.fromkeys(NEXT.findall(said)) if each not in known]
    return done


def call(words: list[str], folder: Path, codes: tuple[int, ...] = (0,)) -> str:
    """What a command printed. `python` is this interpreter."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "WANDB_MODE": os.environ.get("WANDB_MODE", "offline")}
    run = subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    if run.returncode not in codes:
        raise SystemExit(f"{shlex.join(words)} ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.stdout


def cpu_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def reading(run: Path) -> dict:
    """What a run came to, by its own records."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    fresh = [row for row in rows if "fresh/spread" in row]
    values = json.loads((run / "evaluation.json").read_text())["values"]
    sick = [row["step"] for row in rows if row.get("health/warning", 0.0) >= 1]
    return {
        "steps": rows[-1]["step"],
        "spread": round(fresh[-1]["fresh/spread"], 3) if fresh else None,  # it may end before its first panel
        "saturated": round(fresh[-1]["fresh/saturated"], 3) if fresh else None,
        "frechet_ratio": round(values["frechet/fresh_ratio"], 2),
        "frechet_ratio_persistent": round(values.get("frechet/persistent_ratio", float("nan")), 2),
        "first_warning": sick[0] if sick else None,
        "warnings": len(sick),
    }


def by_defaults(options: argparse.Namespace, more: dict[str, list[str]], steps: int, typed: list[dict]) -> dict:
    """The same images and steps by the defaults, within the seconds that the journey's training took."""
    seconds = next(each["seconds"] for each in typed if " train " in each["command"])
    shards = {"shards": "pictures-shards/train", "heldout": "pictures-shards/test"}
    config = DEFAULTS.format(**shards, side=options.side, steps=steps, seconds=seconds, every=max(1, steps // 10))
    (options.out / "defaults.yaml").write_text(config)
    train, evaluate = "python -m ebm train --config defaults.yaml", "python -m ebm evaluate runs/defaults"
    call([*train.split(), *more.get("train", [])], options.out, codes=(0, 3, 75))
    call([*evaluate.split(), *more["evaluate"]], options.out)
    return reading(options.out / "runs/defaults")


if __name__ == "__main__":
    sys.exit(main())
