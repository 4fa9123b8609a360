"""python -m ebm report RUN [--energies N] [--out FILE.html]"""

from pathlib import Path

import numpy as np
import torch

from ebm import evaluation, report
from ebm.data.reader import read_all
from ebm.errors import ConfigError, DataError, UserError
from ebm.inference.run import TrainedRun, open_run
from ebm.runtime import checkpoint
from ebm.runtime.files import replace


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it (its energies)")
    parser.add_argument(
        "--energies", type=int, default=1000, metavar="N", help="images of each set (default 1000; 0: none)"
    )
    parser.add_argument("--out", metavar="FILE.html", help="where to (default RUN/report.html)")


def run(arguments) -> int:
    path = Path(arguments.run)
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path
    out = Path(arguments.out) if arguments.out else run_dir / "report.html"
    if arguments.energies < 0:
        raise ConfigError(f"--energies {arguments.energies}: must be 0 or more")
    records = report.read(run_dir)
    energies, note = energies_of(path, arguments.energies)
    text = report.page(records, energies, note)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace(out, text.encode())
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}; choose a file that can be written") from error
    print(f"{run_dir}: step {records.step}, {len(records.rows)} lines of metrics -> {out}")
    return 0


def energies_of(path: Path, num: int) -> tuple[dict[str, np.ndarray], str]:
    """Energies of training images, held-out images and persistent chains under the averaged weights, as far as they
    are there, and a sentence about them. A report of what there is needs none of them."""
    if num == 0:
        return {}, "Left out (--energies 0)."
    try:
        trained = open_run(path)
        sets = {"training": trained.config.data.shards, "held out": trained.config.evaluate.shards}
        images = {name: first_images(shards, trained, num) for name, shards in sets.items() if shards is not None}
        absent = [f"{name} ({sets[name]})" for name, x in images.items() if x is None]
        images = {name: x for name, x in images.items() if x is not None}
        if any(trained.checkpoint.glob("stream_*.safetensors")):
            chains = trained.persistent_chains()
            images["chains"] = chains[:: max(1, len(chains) // num)][:num]
        energies = {name: trained.energies(x).numpy() for name, x in images.items()}
    except UserError as error:
        return {}, f"None: {error}"
    broken = [name for name, values in energies.items() if not np.isfinite(values).all()]
    if broken:
        return {}, f"None: {trained.checkpoint.name} gives energies that are not finite ({', '.join(broken)})"
    note = f"Averaged weights of step {checkpoint.step_of(trained.checkpoint)}"
    return energies, note + "".join(f"; can't be read: {name}" for name in absent)


def first_images(shards: str, trained: TrainedRun, num: int) -> torch.Tensor | None:
    """Up to `num` images (n, C, H, W) in [-1, 1], the first of their shards; None where the shards are not there."""
    blocks, found = [], 0
    try:
        for images, _, _ in read_all(shards, trained.config.data.shape, batch=min(num, 1024)):
            blocks.append(images)
            found += len(images)
            if found >= num:
                break
    except DataError:
        return None
    return evaluation.from_levels(torch.cat(blocks)[:num]) if blocks else None
