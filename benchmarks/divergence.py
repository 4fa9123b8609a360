"""Recipes that blow up, with the divergence ladder and without it, against the healthy recipe.

python benchmarks/divergence.py [--seeds 5] [--steps 400] [--out DIR] [--jobs 1] [RECIPE ...]

`step_x30`: a residual network with the step size times 30. `high_lr`: no energy regulariser and the learning rate
times 67. `nan`: a NaN in a weight of one of two ranks, at step 150. Each is run with the ladder to its end and scored
by the Fréchet distance of its persistent chains to held-out digits; without it, it must end with exit 3 and say why.
Prints a table and one JSON object; exits 1 where a bound is broken.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # for their helpers

import torch
from runs import free_port

from ebm import evaluation
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards
from ebm.inference.run import open_run

ROOT = Path(__file__).parent.parent

RESNET = ["energy.kind=resnet", "energy.features=[16,32]", "energy.blocks=1", "sampler.grad_clamp=null"]
NAN = {"kind": "nan_weight", "rank": 1, "step": 150}
RECIPES = {  # name: (overrides of the digits with COMMON, the healthy recipe's, what is injected)
    "step_x30": ([*RESNET, "sampler.step_size=300"], RESNET, None),
    "high_lr": (["optim.lr=0.1", "loss.l2=0"], [], None),
    "nan": ([], [], NAN),
}
COMMON = [
    "sampler.num_steps=20", "buffer.reinit_prob=0.1", "optim.lr=1.5e-3",  # a recipe that stays where the default moves
    "tracking.wandb=disabled", "tracking.samples_every=100000", "checkpoint.every=50", "data.workers=0",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/divergence"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    data = options.out / "digits"
    for split in ("train", "test"):
        ensure_shards(str(data / split), "digits", split)

    def job(name: str, overrides: list[str], seed: int, fault=None) -> tuple[int, str]:
        settings = [*COMMON, f"run.seed={seed}", f"run.dir={options.out}/{name}_{seed}", f"train.steps={options.steps}",
                    f"data.shards={data}/train", *overrides]  # fmt: skip
        return run(settings, options.out / f"{name}_{seed}.log", fault)

    jobs = {}
    for name in options.recipes:
        sick, healthy, fault = RECIPES[name]
        for seed in range(options.seeds):
            jobs["resnet" if healthy else "conv", seed] = (healthy, None)
            jobs[name, seed] = (sick, fault)
            jobs[f"{name}_bare", seed] = ([*sick, "health.ladder=false"], fault)
    with ThreadPoolExecutor(options.jobs) as pool:
        ended = dict(
            zip(jobs, pool.map(lambda key: job(key[0], jobs[key][0], key[1], jobs[key][1]), jobs), strict=True)
        )
    result = {name: score(name, options, ended, data) for name in options.recipes}
    result |= {"steps": options.steps, "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(result, indent=1))
    return 0 if all(result[name]["passed"] for name in options.recipes) else 1


def run(settings: list[str], log: Path, fault: dict | None) -> tuple[int, str]:
    """(exit code of the training process, what it said). Done already: as it was."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(free_port())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if fault:
        launch += ["--config_file", str(ROOT / "launch/accelerate/cpu_2.yaml")]
        environment["EBM_FAULT"] = json.dumps(fault)
    script = "tests/faulty.py" if fault else "train.py"
    with log.open("w") as file:
        code = subprocess.run([*launch, script, *settings], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env=environment).returncode  # fmt: skip
    return code, log.read_text()


def score(name: str, options, ended: dict, data: Path) -> dict:
    base = "resnet" if RECIPES[name][1] else "conv"
    seeds = range(options.seeds)
    healthy = [frechet(options.out / f"{base}_{seed}", data) for seed in seeds]
    with_ladder = [
        frechet(options.out / f"{name}_{seed}", data) if ended[name, seed][0] == 0 else None for seed in seeds
    ]
    bare = [ended[f"{name}_bare", seed][1] for seed in seeds]
    codes = ("exitcode  : 3", "exit status 3")  # as the launchers of one process and of several put it
    stopped = ["error: training diverged at" in said and any(code in said for code in codes) for said in bare]
    reasons = sorted({line.split(": ")[2].split(" (")[0] for said in bare for line in said.splitlines()
                      if line.startswith("error: training diverged")})  # fmt: skip
    rollbacks = [ended[name, seed][1].count("diverged at") for seed in seeds]
    bound = 2 * median(healthy)
    print(f"{name}: healthy {show(healthy)}, with the ladder {show(with_ladder)} ({rollbacks} rollbacks), "
          f"without it exit 3 in {sum(stopped)} of {len(stopped)} {reasons}", flush=True)  # fmt: skip
    return {
        "healthy": healthy,
        "ladder": with_ladder,
        "rollbacks": rollbacks,
        "worst_ratio": None if None in with_ladder else max(with_ladder) / median(healthy),
        "exit_3_without": sum(stopped),
        "reasons_without": reasons,
        "passed": all(stopped) and None not in with_ladder and max(with_ladder) <= bound,
    }


def show(values: list) -> str:
    return " ".join("none" if value is None else f"{value:.1f}" for value in values)


@cache
def digits(data: Path):
    """(a classifier trained on the training digits, its features of the held-out ones)."""
    sets = [[torch.cat(part) for part in list(zip(*read_all(str(data / split), (1, 8, 8)), strict=True))[:2]]
            for split in ("train", "test")]  # fmt: skip
    classifier = evaluation.train_classifier(*sets[0])
    return classifier, classifier.features(sets[1][0])


def frechet(run: Path, data: Path) -> float:
    """The Fréchet distance of a run's persistent chains to the held-out digits."""
    classifier, target = digits(data)
    chains = evaluation.to_levels(open_run(run).persistent.spread(1 << 30), "persistent chains")
    return evaluation.frechet_distance(classifier.features(chains), target)


if __name__ == "__main__":
    sys.exit(main())
