"""Streams: the parts that data order, replay buffer and randomness are split into (docs/design.md).

A run has V streams for its whole life. Rank r of W owns the streams v with v mod W == r: on another number of ranks the
streams are dealt anew, and nothing else changes. Every draw is seeded by (seed, purpose, stream, step), so no generator
state has to outlive a step or be saved.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ebm.streams.philox import Philox

# What draws the equal parts of a batch, one a stream: torch's generators, or a counter on a GPU.
StreamSources = Sequence[torch.Generator] | Philox
# The same, or one generator for a whole batch, or torch's global one (None).
Generators = torch.Generator | StreamSources | None
Device = torch.device | str


def derive_seed(seed: int, purpose: str, stream: int = 0, step: int = 0) -> int:
    """A 63-bit seed, the blake2b hash of all arguments. torch's CPU generator uses its low 32 bits."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def owned_streams(num_streams: int, rank: int, world_size: int) -> list[int]:
    """The streams of one rank in ascending order. `num_streams` must be divisible by `world_size`."""
    assert num_streams % world_size == 0, (num_streams, world_size)
    return list(range(rank, num_streams, world_size))


def generator(seed: int, purpose: str, stream: int = 0, step: int = 0) -> torch.Generator:
    """A new generator on the CPU that is seeded by all arguments."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, stream, step))


def stream_sources(
    seed: int, purpose: str, streams: Sequence[int] = (0,), step: int = 0, device: Device = "cpu"
) -> StreamSources:
    """New sources on `device`, one for the part of each stream, seeded by all arguments but the device."""
    return StreamGenerators(seed, streams, device)(purpose, step)


class StreamGenerators:
    """A source of random numbers for each pair of purpose and owned stream, made once and reseeded at every use.

    On a CPU it is a torch generator a stream. On a GPU it is one `Philox` for all streams: torch's generators give
    other numbers on another GPU model, and take a launch a stream.
    """

    def __init__(self, seed: int, streams: Sequence[int], device: Device = "cpu"):
        self.seed, self.streams, self.device = seed, list(streams), torch.device(device)
        self._sources: dict[str, list[torch.Generator] | Philox] = {}

    def __call__(self, purpose: str, step: int) -> StreamSources:
        """The sources of `purpose`, seeded for `step`. The next call for `purpose` reseeds them."""
        seeds = [derive_seed(self.seed, purpose, stream, step) for stream in self.streams]
        sources = self._sources.get(purpose)
        if sources is None:
            on_gpu = self.device.type == "cuda"
            sources = Philox(seeds, self.device) if on_gpu else [torch.Generator(self.device) for _ in seeds]
            self._sources[purpose] = sources
        if isinstance(sources, Philox):
            sources.reseed(seeds)
        else:
            for one, value in zip(sources, seeds, strict=True):
                one.manual_seed(value)
        return sources


def _flat(x: Tensor) -> Tensor:
    """The memory of a batch in its own order.

    Writing to the memory in its own order makes the numbers a function of the generator alone, and lets torch take its
    fast contiguous path for channels-last tensors too.
    """
    assert torch.ops.aten.is_non_overlapping_and_dense(x) and x.stride(0) == max(x.stride()), x.stride()
    return x.as_strided((x.numel(),), (1,))


def _parts(x: Tensor, generators: Generators) -> list[tuple[Tensor, torch.Generator | None]]:
    """Cuts the batch into equal parts, one for each generator; returns (flat memory of the part, generator) pairs."""
    assert not isinstance(generators, Philox)
    if generators is None or isinstance(generators, torch.Generator):
        return [(_flat(x), generators)]
    _check_parts(x, len(generators))
    return list(zip(_flat(x).chunk(len(generators)), generators, strict=True))


def _check_parts(x: Tensor, number: int) -> None:
    if len(x) % number:
        raise ValueError(f"a batch of {len(x)} can't be cut into {number} equal parts, one a generator")


def normal_(x: Tensor, generators: Generators = None) -> Tensor:
    """Fills a dense `x` (B, ...) in place with draws from N(0, 1). With several generators, each fills its own part of
    the batch; ValueError if the batch has no such equal parts."""
    if isinstance(generators, Philox):
        _check_parts(x, len(generators))
        generators.fill_(_flat(x), "normal")
        return x
    for part, gen in _parts(x, generators):
        part.normal_(generator=gen)
    return x


def uniform_(x: Tensor, generators: Generators = None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Fills a dense `x` (B, ...) in place with draws from U[low, high), as `normal_` does."""
    if isinstance(generators, Philox):
        _check_parts(x, len(generators))
        generators.fill_(_flat(x), "uniform")
        if (low, high) == (0, 1):
            return x
        below = torch.nextafter(torch.tensor(high, dtype=x.dtype), torch.tensor(low, dtype=x.dtype)).item()
        return x.mul_(high - low).add_(low).clamp_(max=below)  # the sum may round up to `high`
    for part, gen in _parts(x, generators):
        part.uniform_(low, high, generator=gen)
    return x


def start_(x: Tensor, generators: Generators, interval: tuple[float, float] | None) -> Tensor:
    """Fills a dense `x` (B, ...) in place with initial states of chains: uniform in `interval`, or N(0, 1) for None."""
    return normal_(x, generators) if interval is None else uniform_(x, generators, *interval)
