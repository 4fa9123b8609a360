"""Colour patches of scikit-learn's two photographs through the whole pipeline, in bf16 with spectral norm.

python benchmarks/photos.py [--out DIR] [key=value ...]

Writes 32x32 patches to a folder, shards it with `python -m ebm shard`, trains 300 steps with `accelerate launch`, and
prints one JSON object: skipped steps, AUC and saturated pixels after step 100, and the largest singular value (exact
SVD) of every normalised layer at the end. Exits 1 where a bound of the table below is broken.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).parent.parent
SETTINGS = [
    "energy.kind=resnet", "energy.features=[16,32,32]", "energy.blocks=1", "energy.spectral_norm=true",
    "data.shape=[3,32,32]", "data.source=null", "data.streams=4", "sampler.num_steps=20", "sampler.step_size=10",
    "sampler.noise_scale=0.005", "sampler.grad_clamp=0.03", "buffer.size=2000", "buffer.reinit_prob=0.1",
    "optim.lr=5e-4", "optim.grad_clip=1", "optim.warmup_steps=50", "loss.l2=0.25", "train.batch_size=64",
    "train.steps=300", "train.log_every=10", "train.mixed_precision=bf16", "tracking.samples_every=100",
    "tracking.sample_steps=60", "evaluate.source=null", "evaluate.shards=null",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/photos"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    folder, shards, run = (options.out / name for name in ("patches", "shards", "run"))
    if not (shards / "manifest.json").exists():
        write_patches(folder)
        call("-m", "ebm", "shard", "--source", f"folder:{folder}", "--out", str(shards))
    call("-m", "accelerate.commands.launch", "train.py", f"run.dir={run}", f"data.shards={shards}", *SETTINGS,
         *options.overrides)  # fmt: skip
    result = measure(run)
    print(json.dumps(result, indent=1))
    return 0 if result["passed"] else 1


def write_patches(folder: Path, size: int = 32, stride: int = 12) -> None:
    """Overlapping patches of both photographs, a PNG each."""
    folder.mkdir(parents=True)
    for number, photo in enumerate(load_sample_images().images):
        for top in range(0, photo.shape[0] - size + 1, stride):
            for left in range(0, photo.shape[1] - size + 1, stride):
                patch = Image.fromarray(photo[top : top + size, left : left + size])
                patch.save(folder / f"{number}_{top:03d}_{left:03d}.png")


def call(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


def measure(run: Path) -> dict:
    from ebm.runtime import checkpoint

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    late = [r for r in records if r["step"] > 100]
    weights = checkpoint.read_tensors(checkpoint.checkpoints(run / "checkpoints")[-1], "model")
    sigmas = dict(singular_values(weights))
    result = {
        "steps": records[-1]["step"],
        "seconds": round(sum(r["perf/step_s"] * 10 for r in records), 1),
        "skipped_steps": records[-1]["health/skipped_steps"],
        "auc_range": [round(f(r["energy/auc"] for r in late), 3) for f in (min, max)],
        "saturated_max": round(max(r["sampler/saturated"] for r in late), 4),
        "sigma_range": [round(f(sigmas.values()), 4) for f in (min, max)],
        "layers": len(sigmas),
    }
    result["passed"] = (
        result["skipped_steps"] == 0
        and result["auc_range"][0] >= 0.4
        and result["auc_range"][1] <= 0.9
        and result["saturated_max"] < 0.2
        and result["sigma_range"][0] >= 0.95
        and result["sigma_range"][1] <= 1.05
    )
    return result


def singular_values(weights: dict[str, torch.Tensor]):
    """(layer, largest singular value of its normalised weight as a matrix (out, rest)), by exact SVD."""
    suffix = ".parametrizations.weight.original"
    for name, original in weights.items():
        if name.endswith(suffix):
            layer = name.removesuffix(suffix)
            u, v = (weights[f"{layer}.parametrizations.weight.0.{vector}"] for vector in ("_u", "_v"))
            matrix = original.flatten(1)
            yield layer, (torch.linalg.matrix_norm(matrix, 2) / torch.dot(u, matrix @ v)).item()


if __name__ == "__main__":
    sys.exit(main())
