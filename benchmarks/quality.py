"""Seconds of training to a given Fréchet distance on digits: this project against TorchEBM on the same network.

python benchmarks/quality.py [--seconds 150] [--out DIR] [--json FILE]

This project: the default config, `accelerate launch train.py`, its time from metrics.jsonl. TorchEBM 0.8.9: its
ContrastiveDivergence(persistent=True) with its LangevinDynamics on the same network, batch and images, and Adam with
the same betas and clipping, by each of RECIPES: values that suit it, those of the default run when its chains had 20
steps, and those that it has now. What counts is the smallest distance that any of them comes to within `--seconds`. It
has no gradient clamp. Each trains alone on the machine; evaluation is not counted. The distance is that of `python -m
ebm evaluate`, as a ratio to the floor (training to held-out digits), of the persistent chains and of fresh chains of
200 steps. Set OMP_NUM_THREADS: the launcher gives a process one thread where it is not set.
Needs: pip install --no-deps torchebm==0.8.9
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import machine, publish, table, training_seconds

from ebm import evaluation
from ebm.config import load_config
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards
from ebm.energies import build_energy
from ebm.inference.run import open_run

ROOT = Path(__file__).parent.parent

FRESH = 500  # chains
RECIPES = {
    "torchebm, 20 steps, lr 5e-4, L2 .1": {"steps": 20, "lr": 5e-4, "l2": 0.1},
    "torchebm, 20 steps, lr 1.5e-3, L2 .01": {"steps": 20, "lr": 1.5e-3, "l2": 0.01},
    "torchebm, 10 steps, lr 3e-3, L2 .01": {"steps": 10, "lr": 3e-3, "l2": 0.01},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--json", type=Path, help="write the JSON object here too")
    options = parser.parse_args()
    judge = Judge(options.out)
    curves = {"this project": ours(options.out, options.seconds, judge)}
    for name, recipe in RECIPES.items():
        curves[name] = theirs(recipe, options.seconds, judge)
    rows = [[name, *point.values()] for name, curve in curves.items() for point in curve]
    print(table(["side", "seconds", "steps", "fresh / floor", "persistent / floor"], rows))
    points = [point for name in RECIPES for point in curves[name]]
    best = {kind: min(p[kind] for p in points if p[kind] is not None) for kind in ("persistent", "fresh")}
    reached = {kind: first_at_most(curves["this project"], kind, value) for kind, value in best.items()}
    result = {"machine": machine(), "floor": judge.floor, "torchebm_reaches": best, "seconds_to_reach_it": reached,
              "curves": curves}  # fmt: skip
    publish(result, options.json)


def first_at_most(curve: list[dict], kind: str, value: float) -> float | None:
    """The seconds after which a curve is at `value` or below."""
    return next((p["seconds"] for p in curve if p[kind] is not None and p[kind] <= value), None)


class Judge:
    """Fréchet distances to held-out digits, as ratios to the floor."""

    def __init__(self, out: Path):
        self.sets = {}
        for split in ("train", "test"):
            ensure_shards(str(out / split), "digits", split)
            images, labels = list(zip(*read_all(str(out / split), (1, 8, 8)), strict=True))[:2]
            self.sets[split] = torch.cat(images), torch.cat(labels)
        self.classifier = evaluation.train_classifier(*self.sets["train"])
        self.target = self.classifier.features(self.sets["test"][0])
        self.floor = self._distance(self.sets["train"][0])

    def _distance(self, images) -> float:
        return evaluation.frechet_distance(self.classifier.features(images), self.target)

    def ratio(self, x) -> float | None:
        """Of states in [-1, 1]; None where they are not finite."""
        if not x.isfinite().all():
            return None
        return round(self._distance(evaluation.to_levels(x, "chains")) / self.floor, 3)


def ours(out: Path, budget: float, judge: Judge) -> list[dict]:
    run = out / "run"
    settings = [f"run.dir={run}", f"data.shards={out}/train", "train.log_every=5", "checkpoint.every=50",
                "checkpoint.keep=1000", "tracking.wandb=disabled", "tracking.samples_every=100000",
                "evaluate.source=null", "evaluate.shards=null"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "train.py", *settings], cwd=ROOT, check=True)
    points = []
    for path in sorted((run / "checkpoints").glob("step_????????")):
        step = int(path.name[5:])
        seconds = training_seconds(run, step)
        if step and seconds <= budget:
            trained = open_run(path)
            x = trained.sample(FRESH, steps=200, seed=0)
            points.append({"seconds": round(seconds, 1), "steps": step, "fresh": judge.ratio(x),
                           "persistent": judge.ratio(trained.persistent.spread(1 << 30))})  # fmt: skip
    return points


def theirs(recipe: dict, budget: float, judge: Judge) -> list[dict]:
    """As TorchEBM's guides train: its loss draws, advances and stores the chains, the loop is the user's."""
    from torchebm.core import BaseModel
    from torchebm.losses import ContrastiveDivergence
    from torchebm.samplers import LangevinDynamics

    config = load_config()

    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.network = build_energy(config.energy, config.data.shape, 0)

        def forward(self, x):
            return self.network(x)

    torch.manual_seed(0)
    model, sampler = Model(), config.sampler
    langevin = LangevinDynamics(model, step_size=sampler.step_size, noise_scale=sampler.noise_scale, clamp=(-1.0, 1.0))
    loss = ContrastiveDivergence(model, langevin, k_steps=recipe["steps"], persistent=True,
                                 buffer_size=config.buffer_size, new_sample_ratio=0.05, init_steps=0,
                                 energy_reg_weight=recipe["l2"])  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe["lr"], betas=config.optim.betas)
    images = judge.sets["train"][0].float() / 127.5 - 1
    elapsed, step, points = 0.0, 0, []
    while elapsed < budget:
        start = time.perf_counter()
        for _ in range(20):
            x = images[torch.randint(len(images), (config.train.batch_size,))]
            value, _ = loss((x + config.data.noise_std * torch.randn_like(x)).clamp(-1, 1))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            optimizer.step()
        elapsed, step = elapsed + time.perf_counter() - start, step + 20
        if len(points) < 8 * elapsed / budget:
            fresh = langevin.sample(x=torch.rand(FRESH, 1, 8, 8) * 2 - 1, n_steps=200)
            points.append({"seconds": round(elapsed, 1), "steps": step, "fresh": judge.ratio(fresh),
                           "persistent": judge.ratio(loss.replay_buffer)})  # fmt: skip
    return points


if __name__ == "__main__":
    main()
