"""Every kind of objective, sampler and energy under `accelerate launch`: trains on digits, resumes exactly.

EBM_KINDS=all runs all of them for 100 steps (the acceptance figure); else a few, for 20.
"""

import os
import random

import pytest
from runs import Run, command, final_hashes, finish, records
from test_step import VARIANTS

ALL = os.environ.get("EBM_KINDS") == "all"
STEPS = 100 if ALL else 20
STEEP = ("gaussian", "hybrid", "transformer", "graph", "unet")  # the digits' chain step of 10 spans their domain
# Weights without a gradient; a warm-up without chains; ladders of replicas and a step size that adapts; no labels.
FEW = ("score_matching", "energy_matching", "tempering", "jem", "noise_levels")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", VARIANTS if ALL else FEW)
def test_trains_and_resumes_exactly(digits, tmp_path, kind, ranks):
    settings = dict(item.split("=", 1) for item in VARIANTS[kind])
    base = {"train.steps": STEPS, "checkpoint.every": 10, "data.workers": 0, "health.min_auc": 0} | settings
    if settings.get("energy.kind") in STEEP:
        base.setdefault("sampler.step_size", 1)

    def arguments(run_dir):
        line = command(ranks, run_dir, digits)
        own = "energy.kind" in settings  # the tiny network's keys are of another kind
        line = [item for item in line if not (own and item.startswith("energy."))]
        return [*line, *(f"{key}={value}" for key, value in base.items())]

    finish(arguments(tmp_path / "whole"), tmp_path / "log")
    run = Run(arguments(tmp_path / "run"), tmp_path / "log")
    if run.until_step(tmp_path / "run", random.Random(kind).randint(1, STEPS - 8)):
        run.kill()
    finish(arguments(tmp_path / "run"), tmp_path / "log")
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "whole")
    rows = records(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["health/skipped_steps"] == 0 and rows[-1]["health/rollbacks"] == 0
