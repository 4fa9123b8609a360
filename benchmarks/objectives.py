"""Every objective's samples of the digits or of Fashion-MNIST: fresh chains by its own sampler, short and long.

python benchmarks/objectives.py [--data digits] [--out DIR] [--json FILE] [--num 600] [--lengths 200,5000] [METHOD ...]
python benchmarks/objectives.py --data fashion_mnist --shards DIR [--outliers mnist=MNIST.npy] ...

Each method is a run of a config with the overrides of `METHODS`, on one thread, and `ebm evaluate --lengths`: the
Frechet distance of fresh chains to held-out images in floors of as many training images, with 95 % intervals; how much
of a tenth the rarest class has among the run's usual fresh chains; and what else there is of `FOUND`. A run that is
done already is only evaluated, unless it has been, with the same numbers. Prints a table and one JSON object. DIR has
the shards train/ and test/ (`ebm shard`, see configs/fashion_mnist.yaml).
"""

import argparse
import json
from pathlib import Path

from four_peaks import command, directory
from timing import machine, table, training_seconds, write

ROOT = Path(__file__).parent.parent
EVALUATED = "evaluation.json"  # of a run: what `ebm evaluate` found last
FOUND = ("length/", "density/", "likelihood/", "energy/", "ood/mnist_auroc", "ood/flipped_auroc")
MATCHING = ["data.noise_std=0", "optim.lr=2e-3", "optim.betas=[0.9,0.99]", "optim.warmup_steps=50",
            "optim.decay_start=0.4", "optim.grad_clip=1", "optim.ema_decay=0.995", "energy.kind=unet",
            "energy.features=[16,32]", "energy.blocks=1"]  # fmt: skip
FLOW = ["sampler.start=normal", "sampler.schedule=flow", "sampler.num_steps=100", "sampler.step_size=0.01",
        "sampler.temperature=0.01", "sampler.grad_clamp=null", "sampler.boundary=end"]  # fmt: skip
SMALL = ["energy.noise_conditional.sigma_min=0.1", "sampler.step_size=0.002", "train.batch_size=128",
         "buffer.size=128", "optim.ema_decay=0.9988"]  # fmt: skip
RECOVERY = [*SMALL, "loss.kind=recovery", "loss.levels=6", "sampler.kind=mala", "sampler.bounds=null",
            "sampler.target_acceptance=0.8", "sampler.num_steps=12", "train.steps=3000"]  # fmt: skip
DIGITS = {  # a config, and overrides
    "contrastive": ("digits", []),
    "jem": ("digits_jem", []),
    "jem, bounded": ("digits_jem", ["loss.bounded=true"]),
    "contrastive_latent": ("digits", ["loss.kind=contrastive_latent", "energy.latent.dim=64"]),
    "energy_matching": ("digits", ["loss.kind=energy_matching", "loss.warmup_steps=100000", *MATCHING, *FLOW,
                                   "energy.head=dot", "train.steps=2500"]),
    "equilibrium": ("digits_equilibrium", ["train.steps=2500"]),
    "multilevel_denoising": ("digits", ["loss.kind=multilevel_denoising", *MATCHING, "energy.head=norm",
                                        "train.steps=2500"]),
    "dual_score_matching": ("digits_density", [*SMALL, "loss.contrastive_weight=0", "train.steps=2000"]),
    "dual_score_matching, chains": ("digits_density", []),
    "recovery, levels": ("digits_density", RECOVERY),
}  # fmt: skip
CORE = ["train.batch_size=64", "train.mixed_precision=no", "train.log_every=20", "energy.features=[16,32,32]",
        "buffer.size=4096", "train.steps=1000"]  # fmt: skip
FASHION = {
    "contrastive": ("fashion_mnist", CORE),
    "energy_matching": ("fashion_mnist_energy_matching", []),
    "multilevel_denoising": ("fashion_mnist_denoising", []),
    "dual_score_matching": ("fashion_mnist_dual", []),
    "dual_score_matching, chains": ("fashion_mnist_density", []),
}
METHODS = {"digits": DIGITS, "fashion_mnist": FASHION}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=METHODS, default="digits")
    parser.add_argument("--shards", type=Path, help="of --data fashion_mnist (default: data/fashion_mnist)")
    parser.add_argument("--outliers", metavar="NAME=SOURCE", help="further outliers, as for `ebm evaluate --ood`")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--num", type=int, default=600, help="fresh chains")
    parser.add_argument("--lengths", default="200,5000")
    methods = ", ".join(dict.fromkeys(name for of_data in METHODS.values() for name in of_data))
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {methods} (default: all of the data)")
    options = parser.parse_args()
    result = {"machine": machine(), "data": options.data, "num": options.num, "methods": {}}
    for name in options.methods or METHODS[options.data]:
        result["methods"][name] = measure(name, options)
        if options.json:
            write(result, options.json)
    lengths = options.lengths.split(",")
    rows = [[name, row["seconds"], *(row[length][0] for length in lengths), row["rarest_class"]]
            for name, row in result["methods"].items()]  # fmt: skip
    print(table(["method", "seconds of training", *lengths, "rarest class"], rows))
    print(json.dumps(result, indent=1))


def measure(name: str, options: argparse.Namespace) -> dict:
    config, overrides = METHODS[options.data][name]
    run = directory(name, options.out)
    settings = [f"run.dir={run}", "tracking.wandb=disabled", "tracking.samples_every=1000000", *overrides]
    if options.shards:
        settings += [f"data.shards={options.shards / 'train'}", f"evaluate.shards={options.shards / 'test'}"]
    command(["train.py", "--config", config, *settings])
    asked, file = (
        {"num": options.num, "lengths": [int(length) for length in options.lengths.split(",")]},
        run / EVALUATED,
    )
    before = json.loads(file.read_text()) if file.exists() else {}
    if asked != {name: before.get(name) for name in asked}:
        outliers = ["--ood", options.outliers] if options.outliers else []
        command(["-m", "ebm", "evaluate", str(run), "--num", str(options.num), "--lengths", options.lengths, *outliers])
    values = json.loads(file.read_text())["values"]
    shares = {
        length: [values[f"length/{length}{end}"] for end in ("", "_low", "_high")]
        for length in options.lengths.split(",")
    }
    return {
        "seconds": training_seconds(run),
        **shares,
        "rarest_class": 10 * min(values[f"classes/fresh_share_{number}"] for number in range(10)),
        "config": config,
        "overrides": overrides,
        "found": {name: value for name, value in values.items() if name.startswith(FOUND)},
    }


if __name__ == "__main__":
    main()
