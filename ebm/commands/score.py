"""python -m ebm score RUN --data FILE.npy|SHARDS --out FILE.npy"""

from pathlib import Path

import numpy as np
import torch

from ebm.data import Access
from ebm.data.reader import read_all
from ebm.errors import ConfigError
from ebm.inference.images import from_array, load_array, to_states
from ebm.inference.run import open_run


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE.npy|SHARDS",
        help="uint8 images (N, H, W, C) or float32 vectors (N, D), or shards",
    )
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="float32 energies (N,), in the data's order")


def run(arguments) -> int:
    out = Path(arguments.out)
    if out.suffix != ".npy":
        raise ConfigError(f"--out {out}: must end in .npy")
    trained = open_run(arguments.run)
    shape = trained.config.data.shape
    if arguments.data.endswith(".npy"):
        energies = trained.energies(from_array(load_array(arguments.data, shape)))
    else:
        blocks = (images for images, _, _ in read_all(arguments.data, shape, access=Access.of(trained.config.data)))
        energies = torch.cat([trained.energies(to_states(images)) for images in blocks])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, energies.numpy())
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from error
    print(f"{len(energies)} energies, mean {energies.mean():.4f}, from {trained.checkpoint} -> {out}")
    return 0
