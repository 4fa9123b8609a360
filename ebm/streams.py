"""Streams: the parts that data order, replay buffer and randomness are split into (docs/design.md).

A run has V streams for its whole life. Rank r of W owns the streams v with v mod W == r: on another number of ranks the
streams are dealt anew, and nothing else changes. Every draw is seeded by (seed, purpose, stream, step), so no generator
state has to outlive a step or be saved.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# One generator for a whole batch, one for each of its equal parts, or torch's global one (None).
Generators = torch.Generator | Sequence[torch.Generator] | None
Device = torch.device | str


def derive_seed(seed: int, purpose: str, stream: int = 0, step: int = 0) -> int:
    """A 63-bit seed, the blake2b hash of all arguments. torch's CPU generator uses its low 32 bits."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def owned_streams(num_streams: int, rank: int, world_size: int) -> list[int]:
    """The streams of one rank in ascending order. `num_streams` must be divisible by `world_size`."""
    assert num_streams % world_size == 0, (num_streams, world_size)
    return list(range(rank, num_streams, world_size))


def generator(seed: int, purpose: str, stream: int = 0, step: int = 0, device: Device = "cpu") -> torch.Generator:
    """A new generator that is seeded by all arguments but the device."""
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, stream, step))


class StreamGenerators:
    """A generator for each pair of purpose and owned stream, made once and reseeded at every use."""

    def __init__(self, seed: int, streams: Sequence[int], device: Device = "cpu"):
        self.seed, self.streams, self.device = seed, list(streams), torch.device(device)
        self._generators: dict[str, list[torch.Generator]] = {}

    def __call__(self, purpose: str, step: int) -> list[torch.Generator]:
        """The generators of `purpose`, one for each stream, seeded for `step`. The next call for `purpose` reseeds
        them."""
        if purpose not in self._generators:
            self._generators[purpose] = [torch.Generator(self.device) for _ in self.streams]
        for stream, gen in zip(self.streams, self._generators[purpose], strict=True):
            gen.manual_seed(derive_seed(self.seed, purpose, stream, step))
        return self._generators[purpose]


def _parts(x: Tensor, generators: Generators) -> list[tuple[Tensor, torch.Generator | None]]:
    """Cuts the batch into equal parts, one for each generator; returns (flat memory of the part, generator) pairs.

    Writing to the memory in its own order makes the numbers a function of the generator alone, and lets torch take its
    fast contiguous path for channels-last tensors too.
    """
    assert torch.ops.aten.is_non_overlapping_and_dense(x) and x.stride(0) == max(x.stride()), x.stride()
    flat = x.as_strided((x.numel(),), (1,))
    if generators is None or isinstance(generators, torch.Generator):
        return [(flat, generators)]
    if len(x) % len(generators):
        raise ValueError(f"a batch of {len(x)} can't be cut into {len(generators)} equal parts, one a generator")
    return list(zip(flat.chunk(len(generators)), generators, strict=True))


def normal_(x: Tensor, generators: Generators = None) -> Tensor:
    """Fills a dense `x` (B, ...) in place with draws from N(0, 1). With a list of generators, each fills its own part
    of the batch; ValueError if the batch has no such equal parts."""
    for part, gen in _parts(x, generators):
        part.normal_(generator=gen)
    return x


def uniform_(x: Tensor, generators: Generators = None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Fills a dense `x` (B, ...) in place with draws from U[low, high), as `normal_` does."""
    for part, gen in _parts(x, generators):
        part.uniform_(low, high, generator=gen)
    return x


def start_(x: Tensor, generators: Generators, interval: tuple[float, float] | None) -> Tensor:
    """Fills a dense `x` (B, ...) in place with initial states of chains: uniform in `interval`, or N(0, 1) for None."""
    return normal_(x, generators) if interval is None else uniform_(x, generators, *interval)
