"""python -m ebm report RUN [--energies N] [--out FILE.html]"""

import argparse
import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ebm import report
from ebm.commands import add_device
from ebm.errors import ConfigError, DataError, UserError
from ebm.evaluation.sets import read_evaluation_data
from ebm.inference.images import to_states
from ebm.inference.run import TrainedRun, open_run
from ebm.runtime.files import replace

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it (its energies)")
    parser.add_argument(
        "--energies", type=int, default=1000, metavar="N", help="samples of each set (default 1000; 0: none)"
    )
    add_device(parser)
    parser.add_argument("--out", metavar="FILE.html", help="where to (default RUN/report.html)")


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.run)
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path
    out = Path(arguments.out) if arguments.out else run_dir / "report.html"
    if arguments.energies < 0:
        raise ConfigError(f"--energies {arguments.energies}: must be 0 or more")
    records = report.read(run_dir)
    energies, note = energies_of(path, arguments.energies, arguments.device)
    text = report.page(records, energies, note)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, text.encode())
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}; choose a file that can be written") from error
    print(f"{run_dir}: step {records.step}, {len(records.rows)} lines of metrics -> {out}")
    return 0


def energies_of(path: Path, num: int, device: str | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Energies of training data, held-out data and persistent chains under the averaged weights, as far as they are
    there, and a sentence about them. A report of what there is needs none of them. Raises ConfigError for a device
    that can't be used."""
    if num == 0:
        return {}, "Left out (--energies 0)."
    try:
        trained = open_run(path, device)
        config = trained.config
        found = {"training": states_of(trained, "train", num)}
        if config.evaluate.shards is not None:
            found["held out"] = states_of(trained, "test", num)
        places = {"training": config.data.shards, "held out": config.evaluate.shards}
        absent = [f"{name} ({places[name]})" for name, x in found.items() if x is None]
        states = {name: x for name, x in found.items() if x is not None}
        if trained.persistent is not None:
            states["chains"] = trained.persistent.spread(num)
        energies = {name: trained.energy(x).numpy() for name, x in states.items()}
    except UserError as error:
        if "--device" in str(error):
            raise
        return {}, f"None: {error}"
    broken = [name for name, values in energies.items() if not np.isfinite(values).all()]
    if broken:
        return {}, f"None: {trained.checkpoint.name} gives energies that are not finite ({', '.join(broken)})"
    note = f"Averaged weights of step {trained.step}"
    return energies, note + "".join(f"; can't be read: {name}" for name in absent)


def states_of(trained: TrainedRun, split: Literal["train", "test"], num: int) -> torch.Tensor | None:
    """Up to `num` states (n, *shape) of training or held-out data; None, and logged, where it can't be read."""
    try:
        return to_states(read_evaluation_data(trained.config, split, num)[0])
    except DataError as error:
        log.warning("%s", str(error))
        return None
