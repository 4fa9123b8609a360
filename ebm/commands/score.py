"""python -m ebm score RUN --data FOLDER|FILE.png|FILE.npy|SHARDS --out FILE.npy|FILE.csv"""

import argparse
import csv
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm.commands import add_device, add_weights
from ebm.config import Config
from ebm.errors import ConfigError, DataError
from ebm.evaluation.measures import rates
from ebm.evaluation.sets import MOST, read_evaluation_data
from ebm.inference.images import to_states
from ebm.inference.inputs import read_inputs
from ebm.inference.run import TrainedRun, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FOLDER|FILE.png|FILE.npy|SHARDS",
        help="images: a folder, a file, shards, uint8 (N, H, W, C); or float32 vectors (N, D)",
    )
    parser.add_argument(
        "--against",
        metavar="FOLDER|FILE.npy|SHARDS",
        help="other data, such as what is known to be normal: prints the AUROC of --data above it",
    )
    add_device(parser)
    add_weights(parser)
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.npy|FILE.csv",
        help="float32 energies (N,), in the data's order; or a table: file, energy, and percentile among the energies "
        "of held-out data (of training data, where the run has none)",
    )


def run(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.suffix not in (".npy", ".csv"):
        raise ConfigError(f"--out {out}: must end in .npy or .csv")
    trained = open_run(arguments.run, arguments.device, arguments.weights)
    names, energies = scored(trained, arguments.data)
    against = scored(trained, arguments.against)[1] if arguments.against else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npy":
            np.save(out, energies.numpy())
        else:
            out.write_text(table(names, energies, percentiles(energies, reference(trained))), newline="")
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from error
    print(f"{len(energies)} energies, mean {energies.mean():.4f}, from {trained.checkpoint} -> {out}")
    if against is not None:
        found = rates(against, energies)
        print(f"above {arguments.against}: AUROC {found.auroc:.4f}, AUPR {found.aupr:.4f}, FPR95 {found.fpr95:.4f}")
    return 0


def scored(trained: TrainedRun, place: str) -> tuple[list[str], Tensor]:
    """Names and energies (N,) of the samples of `place`. Raises DataError where there are none, or not all finite."""
    names: list[str] = []
    energies = []
    for block in read_inputs(place, trained.config):
        names += block.names
        energies.append(trained.energy(to_states(block.data)))
    if not energies:
        raise DataError(f"{place}: holds no samples; give data that does")
    joined = torch.cat(energies)
    if not joined.isfinite().all():
        raise DataError(f"{trained.checkpoint}: gives non-finite energies; use an earlier checkpoint of the run")
    return names, joined


def reference(trained: TrainedRun) -> Tensor:
    """Energies of the data that a sample's percentile is among."""
    config: Config = trained.config
    data = read_evaluation_data(config, "test" if config.evaluate.shards is not None else "train", MOST)
    return torch.cat([trained.energy(to_states(block)) for block in torch.split(data[0], 4096)])


def percentiles(energies: Tensor, among: Tensor) -> Tensor:
    """Share, in per cent, of `among` (M,) that lies below each of `energies` (N,): near 100 for an outlier."""
    return 100 * torch.searchsorted(among.sort().values, energies).double() / len(among)


def table(names: list[str], energies: Tensor, percentile: Tensor) -> str:
    """The rows as CSV (RFC 4180), with a line of titles."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["file", "energy", "percentile"])
    for name, energy, share in zip(names, energies.tolist(), percentile.tolist(), strict=True):
        writer.writerow([name, f"{energy:.9g}", f"{share:.2f}"])
    return file.getvalue()
