"""Whether what a run keeps fits the machine, before anything is allocated: an error that names the key."""

import math
import os
from typing import NamedTuple

import torch

from ebm.config import Config
from ebm.errors import ConfigError
from ebm.runtime.distributed import World
from ebm.samplers.factory import chain_shape

STREAM_BYTES = 2000  # of the generators and positions of a stream


class Demand(NamedTuple):
    """What grows with a key, in bytes of one rank."""

    key: str
    value: int
    size: int


def check_memory(config: Config, world: World) -> None:
    """Raises ConfigError where one key alone asks for more memory than there is."""
    available = memory_of(world.device)
    for key, value, size in demands(config, world.size):
        if size > available:
            fits = f"; at most {int(value * available / size)} fits" if value > 1 else ""
            raise ConfigError(
                f"{key}={value} takes {size / 1e9:.3g} GB on each rank, and there are {available / 1e9:.3g} GB{fits}: "
                f"lower {key}, or use more ranks"
            )


def demands(config: Config, ranks: int) -> list[Demand]:
    """The least that a rank needs for each key that bounds what it keeps."""
    datum = math.prod(config.data.shape)
    per_stream = Demand("data.streams", config.data.streams, STREAM_BYTES * config.data.streams // ranks)
    batch = config.train.batch_size // ranks // config.train.accumulate
    found = [per_stream, Demand("train.batch_size", config.train.batch_size, 4 * datum * batch)]
    found.append(Demand("tracking.num_samples", config.tracking.num_samples, 4 * datum * config.tracking.num_samples))
    if config.loss.negatives == "persistent":
        itemsize = getattr(torch, config.buffer.dtype).itemsize
        chain = math.prod(chain_shape(config.sampler, config.data.shape)) * itemsize + 4  # and its age
        found.append(Demand("buffer.size", config.buffer.size, config.buffer.size // ranks * chain))
    return found


def memory_of(device: torch.device) -> int:
    """Bytes that one rank may use: those of its GPU, or its share of the machine's. Ranks that share a GPU are not
    counted."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
