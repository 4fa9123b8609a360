"""Every objective and sampler on the four peaks: the divergence of what is learned from the truth, by quadrature.

python benchmarks/four_peaks.py [--out DIR] [--json FILE] [--chain-steps 100000] [METHOD ...]

Each method is a run of configs/four_peaks.yaml with the overrides of `METHODS`, on one thread, scored by `python -m ebm
evaluate --metrics likelihood`: KL(true || learned) in nats, and the largest error of the weight of a mode. With
`--chain-steps` 200 chains of MALA go on from exact samples for as many steps in the learned energy: `drift` is the
largest difference, in points, between the share of chains nearest to a mode and its true weight, over the second half
of the way (a state every 500 steps). A run that is done already is only scored. Prints a table and one JSON object.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from timing import training_seconds

import ebm
from ebm.config import load_config
from ebm.data.sources import known_density
from ebm.evaluation.metrics import density, mode_weights
from ebm.samplers import mala
from ebm.streams import generator

ROOT = Path(__file__).parent.parent
WITHOUT_CHAINS = ["train.steps=5000"]
MALA = ["sampler.kind=mala", "sampler.bounds=null", "sampler.start=[-4,4]"]
HMC = ["sampler.kind=hmc", "sampler.bounds=null", "sampler.start=[-4,4]", "sampler.num_steps=4"]
LEVELS = ["energy.noise_conditional={sigma_min: 0.2, sigma_max: 10, data_std: 2}", "sampler.kind=noise_levels",
          "sampler.bounds=null", "sampler.step_size=0.008", "buffer.reinit_prob=0"]  # fmt: skip
RECOVERY = ["loss.kind=recovery", "loss.levels=3", LEVELS[0], "sampler.kind=mala", "sampler.bounds=null",
            "sampler.step_size=0.03", "sampler.target_acceptance=0.7", "sampler.num_steps=20",
            "optim.grad_clip=1", "train.steps=2000"]  # fmt: skip
TEMPERING = ["sampler.kind=tempering", "sampler.bounds=null", "sampler.start=[-4,4]", "sampler.num_steps=5"]
FLOW = ["sampler.start=normal", "sampler.schedule=flow", "sampler.num_steps=80", "sampler.step_size=0.1"]
METHODS = {
    "contrastive, persistent": [],
    "contrastive, from data": ["loss.negatives=data"],
    "contrastive, MALA": [*MALA, "sampler.num_steps=10", "sampler.step_size=0.5", "train.steps=6000", "optim.lr=2e-3"],
    "contrastive, HMC": [*HMC, "sampler.step_size=0.7"],
    "contrastive, tempering": [*TEMPERING, "sampler.step_size=0.5", "sampler.temperatures=[1,2,4]", "train.steps=8000"],
    "improved_contrastive": ["loss.kind=improved_contrastive", "loss.kl_weight=0.1", "loss.entropy_weight=0.2"],
    "score_matching, exact": ["loss.kind=score_matching", "loss.method=exact", "data.noise_std=0.1", *WITHOUT_CHAINS],
    "score_matching, hutchinson": ["loss.kind=score_matching", "loss.method=hutchinson", "train.steps=8000",
                                   "optim.lr=2e-3"],
    "score_matching, sliced": ["loss.kind=score_matching", "loss.method=sliced", *WITHOUT_CHAINS],
    "denoising": ["loss.kind=denoising", "loss.sigma=0.1", *WITHOUT_CHAINS],
    "multilevel_denoising": ["loss.kind=multilevel_denoising", "loss.sigma_min=0.08", "loss.sigma_max=0.125",
                             *WITHOUT_CHAINS],
    "dual_score_matching": ["loss.kind=dual_score_matching", *LEVELS],
    "dual_score_matching, chains": ["loss.kind=dual_score_matching", "loss.contrastive_weight=0.05",
                                    "loss.warmup_steps=2000", *LEVELS, "sampler.num_steps=10", "buffer.size=1024"],
    "dual_score_matching, annealed chains": ["loss.kind=dual_score_matching", "loss.contrastive_weight=0.05",
                                             "loss.warmup_steps=2000", *LEVELS, "sampler.level_moves=annealed",
                                             "sampler.num_steps=10", "buffer.size=1024", "buffer.reinit_prob=0.05",
                                             "buffer.reinit_spread=20"],
    "noise_contrastive": ["loss.kind=noise_contrastive", "loss.noise_std=2.5", "loss.ratio=2", *WITHOUT_CHAINS],
    "energy_discrepancy": ["loss.kind=energy_discrepancy", "loss.time=1", *WITHOUT_CHAINS],
    "recovery, MALA": ["loss.kind=recovery", "loss.sigma=1.5", *MALA, "sampler.step_size=0.5", "sampler.num_steps=15",
                       "train.steps=8000"],
    "recovery, levels": RECOVERY,
    "recovery, levels and initialiser": [*RECOVERY, "energy.noise_conditional.initialiser={}", "sampler.num_steps=10"],
    "energy_matching": ["loss.kind=energy_matching", "loss.warmup_steps=500", "loss.contrastive_weight=1",
                        "loss.flow_weight=0.001", "loss.trim=0", "loss.floor=null", "loss.from_data=false",
                        "loss.separate_batch=false", "loss.second_ema_decay=null", *FLOW],
}  # fmt: skip
CHAINS, BETWEEN = 200, 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/four_peaks_methods"))
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--chain-steps", type=int, default=0, help="of long chains (default: none)")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)} (default: all)")
    options = parser.parse_args()
    rows = {}
    print(f"{'method':<37}{'KL':>9}{'worst mode':>12}{'forwards a step':>17}{'seconds':>9}", flush=True)
    for name in options.methods or METHODS:
        rows[name] = row = measure(name, options.out)
        print(f"{name:<37}{row['kl']:>9.4f}{row['worst_mode']:>11.1%}{row['forwards_a_step']:>17.0f}"
              f"{row['seconds']:>9.0f}", flush=True)  # fmt: skip
    for alike in groups(list(rows)) if options.chain_steps else ():
        runs = [directory(name, options.out) for name in alike]
        for name, drift in zip(alike, drifts(runs, options.chain_steps), strict=True):
            rows[name] |= {"drift_points": drift, "chain_steps": options.chain_steps}
            print(f"{name:<37}{drift:>9.2f} points from the true shares after {options.chain_steps} steps", flush=True)
    result = {"methods": rows, "torch": torch.__version__, "threads": 1}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def directory(name: str, out: Path) -> Path:
    return out / name.replace(", ", "_").replace(" ", "_")


def measure(name: str, out: Path) -> dict:
    run = directory(name, out)
    settings = [f"run.dir={run}", "tracking.wandb=disabled", "tracking.samples_every=1000000", *METHODS[name]]
    config_file = ROOT / "configs/four_peaks.yaml"
    command(["train.py", "--config", str(config_file), *settings])
    values = run / "likelihood.json"
    command(["-m", "ebm", "evaluate", str(run), "--metrics", "likelihood", "--json", str(values)])
    found = json.loads(values.read_text())
    return {
        "kl": found["likelihood/kl"],
        "worst_mode": max(abs(value - 1) for key, value in found.items() if key.endswith("_ratio")),
        "forwards_a_step": forwards(load_config(config_file, settings)),
        "seconds": training_seconds(run),
        "overrides": METHODS[name],
    }


def groups(names: list[str]) -> list[list[str]]:
    """The methods whose energies have one architecture."""
    kinds: dict[tuple[bool, ...], list[str]] = {}
    for name in names:
        has = tuple(any(key in setting for setting in METHODS[name]) for key in ("noise_conditional", "initialiser"))
        kinds.setdefault(has, []).append(name)
    return list(kinds.values())


def drifts(runs: list[Path], steps: int) -> list[float]:
    """How far the shares of long chains in each run's energy are from the true ones, in points. Runs of one
    architecture go together, as one energy of all their chains."""
    torch.set_num_threads(1)
    true_energy, modes = known_density("four_peaks")
    true = mode_weights(density(true_energy), modes)
    networks = [ebm.load(run).network.module for run in runs]
    stacked = torch.func.stack_module_state(networks)
    one = copy.deepcopy(networks[0])

    def of_one(parameters: dict, buffers: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(one, (parameters, buffers), (x,))

    def energy(x: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(of_one)(*stacked, x.view(len(runs), CHAINS, 2)).flatten()

    x, noise = true_energy.sample(len(runs) * CHAINS, generator(0, "exact")), generator(0, "chains")
    counts = torch.zeros(len(runs), len(modes))
    for done in range(0, steps, BETWEEN):
        x, _ = mala(energy, x, num_steps=BETWEEN, step_size=0.2, generator=noise)
        if done >= steps // 2:
            nearest = torch.cdist(x, modes).argmin(1).view(len(runs), CHAINS)
            counts += torch.stack([torch.bincount(own, minlength=len(modes)) for own in nearest])
    return (100 * (counts / (counts.sum(1, keepdim=True)) - true).abs().amax(1)).tolist()


def command(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def forwards(config) -> float:
    """Forwards of a datum a step. A backward to the input or to the weights counts as one more, so that the loss costs
    three of each state it looks at, and six where it differentiates a gradient."""
    loss, of_states, of_gradients = config.loss, 2, 0  # states whose energy, or gradient, is differentiated
    match loss.kind:
        case "improved_contrastive":
            of_states, of_gradients = 3, loss.kl_steps
        case "energy_matching":
            of_gradients = 1
        case "score_matching":
            products = math.prod(config.data.shape) if loss.method == "exact" else loss.num_projections
            of_states, of_gradients = 0, 1 + products
        case "denoising" | "multilevel_denoising" | "equilibrium":
            of_states, of_gradients = 0, 1
        case "dual_score_matching":
            of_states, of_gradients = 2 * bool(loss.contrastive_weight), 1
        case "noise_contrastive":
            of_states = 1 + loss.ratio
        case "energy_discrepancy":
            of_states = 1 + loss.num_samples
    chain = 0 if loss.negatives is None else 2 * config.sampler.evaluations
    return chain + 3 * of_states + 6 * of_gradients


if __name__ == "__main__":
    sys.exit(main())
