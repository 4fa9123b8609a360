"""python -m ebm sample RUN --num N --steps K [--seed S] --out FILE.npy|FILE.png"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ebm.errors import ConfigError
from ebm.inference.images import from_array, load_array, to_array
from ebm.inference.pictures import pictures
from ebm.inference.run import TrainedRun, open_run
from ebm.samplers import Engine, advance, fresh_chains
from ebm.streams import generator


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it")
    parser.add_argument("--num", type=int, default=64, help="images (default 64)")
    parser.add_argument("--steps", type=int, default=200, help="chain steps (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of starts and noise (default 0)")
    parser.add_argument(
        "--init",
        default="noise",
        help="noise (default); buffer: the persistent chains as they are; or "
        "FILE.npy: start from these images, uint8 (N, H, W, C), or vectors, float32 (N, D)",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.npy|FILE.png",
        help="array, uint8 (N, H, W, C), for vectors float32 (N, D); or a picture",
    )


def run(arguments) -> int:
    out = Path(arguments.out)
    if out.suffix not in (".npy", ".png"):
        raise ConfigError(f"--out {out}: must end in .npy or .png")
    if arguments.num < 1 or arguments.steps < 0:
        raise ConfigError(f"--num {arguments.num} must be at least 1 and --steps {arguments.steps} at least 0")
    trained = open_run(arguments.run)
    x = states(trained, arguments.init, arguments.num, arguments.steps, arguments.seed).cpu()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".npy":
            np.save(out, to_array(x))
        else:
            Image.fromarray(pictures({"": x})[""]).save(out)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error}") from error
    print(f"{len(x)} samples from {trained.checkpoint} -> {out}")
    return 0


def states(trained: TrainedRun, init: str, num: int, steps: int, seed: int) -> Tensor:
    """Final states (num, *shape), float32."""
    config, device = trained.config, trained.device
    if init == "buffer":
        chains = trained.persistent_chains()
        if num > len(chains):
            raise ConfigError(f"--num {num}: the buffer holds {len(chains)} chains")
        return chains[torch.randperm(len(chains), generator=generator(seed, "pick"))[:num].to(device)]
    if init == "noise":
        return fresh_chains(
            trained.energy,
            config.sampler,
            config.data.shape,
            num,
            steps,
            seed=seed,
            device=device,
            num_classes=config.energy.num_classes,
        )[0]
    x = from_array(load_array(init, config.data.shape)[:num]).to(device)
    labels = ()
    if config.energy.num_classes:
        labels = (torch.arange(len(x), device=device) % config.energy.num_classes,)
    engine, noise = Engine(trained.energy, capture=False), [generator(seed, "chain", device=device)]
    return advance(engine, config.sampler, x, *labels, num_steps=steps, generator=noise) if steps else x
