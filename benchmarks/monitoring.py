"""The pictures of docs/monitoring.md: a healthy run and a sick one, each trained for real (some minutes on two cores).

python benchmarks/monitoring.py [--out DIR]

A run that is there already is not trained again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from ebm import report
from ebm.report.page import FIGURE_STYLE, draw_curves, healthy_range

ROOT = Path(__file__).parent.parent

BOTH = ("train.log_every=5", "tracking.wandb=disabled", "tracking.samples_every=100", "tracking.sample_steps=100")
RUNS = {
    "healthy": ("train.steps=600",),
    "sick": (
        "train.steps=300", "energy.kind=resnet", "energy.features=[16,32]", "energy.blocks=1",
        "sampler.grad_clamp=null", "sampler.step_size=300", "sampler.num_steps=20", "buffer.reinit_prob=0.1",
        "optim.lr=1.5e-3", "optim.decay_start=1",
        "health.ladder=false", "health.patience=1000",  # what would step in otherwise
    ),
}  # fmt: skip
CHARTS = (
    ("energy/pos_mean", "energy/neg_mean"),
    ("energy/auc",),
    ("health/warning",),
    ("sampler/saturated", "data/saturated"),
    ("sampler/displacement",),
    ("optim/grad_norm",),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "monitoring", help="where the runs go")
    out = parser.parse_args().out.resolve()
    for name, settings in RUNS.items():
        place = [f"run.dir={out / name}", "data.source=digits", f"data.shards={out / 'shards' / 'train'}"]
        arguments = [*place, *BOTH, *settings]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=True)
        draw(report.read(out / name), ROOT / "docs" / f"{name}_run.png")
    return 0


def draw(records: report.Records, file: Path) -> None:
    """Six charts, with their healthy ranges shaded, over the newest sample panel."""
    with rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(9, 7.4), layout="constrained")
        rows = figure.subfigures(2, 1, height_ratios=[1.45, 1])
        for ax, keys in zip(rows[0].subplots(2, 3).flat, CHARTS, strict=True):
            bounds = healthy_range(records, report.metric_of(keys[0]))
            draw_curves(ax, {key: records.series(key) for key in keys}, bounds, [])
            ax.set_title(keys[0] if len(keys) == 1 else "", fontsize=9.5)
        ax = rows[1].subplots()
        ax.imshow(np.asarray(Image.open(records.panels[-1])))
        ax.set_axis_off()
        figure.savefig(file, dpi=110, facecolor="white")
    print(file)


if __name__ == "__main__":
    sys.exit(main())
