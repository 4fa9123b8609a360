"""python -m ebm sample RUN --num N --steps K [--seed S] [--label N] --out FILE.npy|FILE.png"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm.commands import add_device, add_weights
from ebm.data import Access, load_manifest
from ebm.errors import ConfigError, DataError
from ebm.evaluation.metrics import WARM
from ebm.inference.images import pictures, to_array, to_png, to_states
from ebm.inference.inputs import read_states
from ebm.inference.run import TrainedRun, open_run
from ebm.streams import generator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it")
    parser.add_argument("--num", type=int, default=64, help="images (default 64)")
    parser.add_argument("--steps", type=int, default=200, help="chain steps (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of starts and noise (default 0)")
    parser.add_argument(
        "--init",
        default="noise",
        help="noise (default); buffer: the persistent chains as they are; or what chains start from: an image file, a "
        "folder of them, shards, or FILE.npy, uint8 (N, H, W, C), or vectors, float32 (N, D); one is used for all",
    )
    parser.add_argument(
        "--label",
        metavar="N|NAME",
        help="class of all chains of a class-conditional run, by number or by its name in the shards' manifest "
        "(default: the classes in turn)",
    )
    parser.add_argument("--grid-by-class", action="store_true", help="in FILE.png, a row for each class")
    parser.add_argument(
        "--denoise",
        action="store_true",
        help="show x - sigma^2 dE/dx / T, the mean of the clean data given the sample x, where the energy is the "
        "density of data with the noise sigma=data.noise_std (runs at T = 1)",
    )
    add_device(parser)
    add_weights(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.npy|FILE.png",
        help="array, uint8 (N, H, W, C), for vectors float32 (N, D); or a picture. The labels of a class-conditional "
        "run's chains are written beside it, FILE.labels.npy, int64 (N,)",
    )


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.suffix not in (".npy", ".png"):
        raise ConfigError(f"--out {out}: must end in .npy or .png")
    if arguments.num < 1 or arguments.steps < 0:
        raise ConfigError(f"--num {arguments.num} must be at least 1 and --steps {arguments.steps} at least 0")
    trained = open_run(arguments.run, arguments.device, arguments.weights)
    label = None if arguments.label is None else class_of(trained, arguments.label)
    x, labels = states(trained, arguments.init, arguments.num, arguments.steps, arguments.seed, label)
    if arguments.denoise:
        x = denoised(trained, x)
    columns = None
    if arguments.grid_by_class:
        x, labels, columns = by_class(trained, x, labels)
    beside = out.with_suffix(".labels.npy")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npy":
            np.save(out, to_array(x))
        else:
            out.write_bytes(to_png(pictures({"": x}, columns)[""]))
        if labels is not None:
            np.save(beside, labels.numpy())
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from error
    print(f"{len(x)} samples from {trained.checkpoint} -> {out}" + ("" if labels is None else f", labels -> {beside}"))
    return 0


def states(
    trained: TrainedRun, init: str, num: int, steps: int, seed: int, label: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Final states (num, *shape), float32, and the classes of chains that have one, on the host."""
    if init == "buffer":
        chains = trained.persistent
        if chains is None:
            raise DataError(
                f"{trained.checkpoint} holds no persistent chains (loss.negatives={trained.config.loss.negatives}); "
                "use fresh ones"
            )
        if label is not None:
            raise ConfigError("--label: is of fresh chains; leave it out with --init buffer")
        numbers = chains.samples()
        if num > len(numbers):
            raise ConfigError(f"--num {num}: the buffer holds {len(numbers)} chains that sample the run's density")
        order = torch.randperm(len(numbers), generator=generator(seed, "pick"))[:num]
        ascending, back = numbers[order].sort()
        labels = chains.labels(ascending)
        return chains.take(ascending)[back.argsort()], None if labels is None else labels[back.argsort()]
    if init == "noise":
        found, labels = trained.chains(num, [steps], seed=seed, labels=label)
        return found[steps], labels
    x = to_states(read_states(init, trained.config, most=num)[0])
    if len(x) == 1:
        x = x.expand(num, *trained.shape).clone()
    if not trained.num_classes:
        return trained.continued(x, steps, seed=seed), None
    labels = torch.arange(len(x)) % trained.num_classes if label is None else torch.full((len(x),), label)
    return trained.continued(x, steps, seed=seed, labels=labels), labels


def denoised(trained: TrainedRun, x: Tensor) -> Tensor:
    """`x` without the noise of the data that its energy was trained on. Raises ConfigError for a run whose chains keep
    none."""
    if trained.temperature < WARM or not trained.chain_noise:
        raise ConfigError(
            f"--denoise: chains at temperature {trained.temperature:g} and data.noise_std={trained.data_noise:g} by "
            f"sampler {trained.config.fresh_sampler.kind} keep no noise of the data; leave it out"
        )
    return trained.denoised(x)


def class_of(trained: TrainedRun, name: str) -> int:
    """A class by its number, or its name in the manifest of the training data. Raises ConfigError."""
    if not trained.num_classes:
        raise ConfigError(f"--label {name}: the run has no classes (energy.num_classes=null); leave it out")
    if name.isdigit() and int(name) < trained.num_classes:
        return int(name)
    names: tuple[str, ...] = ()
    if not name.isdigit():
        manifest = load_manifest(trained.config.data.shards, Access.of(trained.config.data))
        names = manifest.classes or ()
        if name in names:
            return names.index(name)
    known = f" or one of {', '.join(names)}" if names else ""
    raise ConfigError(f"--label {name}: must be a number from 0 to {trained.num_classes - 1}{known}")


def by_class(trained: TrainedRun, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Chains sorted by class, as many of each, and how many that is. Raises ConfigError."""
    if labels is None or not trained.num_classes:
        raise ConfigError("--grid-by-class: needs fresh chains of a class-conditional run (energy.num_classes)")
    each = int(torch.bincount(labels.clamp(min=0), minlength=trained.num_classes).min())
    if each == 0:
        raise ConfigError(
            f"--grid-by-class: --num {len(x)} must be at least the {trained.num_classes} classes, without --label"
        )
    rows = torch.cat([(labels == y).nonzero().flatten()[:each] for y in range(trained.num_classes)])
    return x[rows], labels[rows], each
