"""Streams: the unit in which data order, replay buffer and randomness are owned (docs/design.md).

A run has V streams for its whole life. Rank r of W owns the streams v with v mod W == r, so that on another
world size they are dealt anew and nothing else changes. Every draw is seeded by (seed, purpose, stream, step):
no generator state outlives a step, and none is ever saved.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def derive_seed(seed: int, purpose: str, stream: int = 0, step: int = 0) -> int:
    """A 63-bit seed that depends on all of its arguments (blake2b). torch's CPU generator uses the low 32 bits."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def owned_streams(num_streams: int, rank: int, world_size: int) -> list[int]:
    """The streams of one rank, ascending. `num_streams` must be divisible by `world_size`."""
    assert num_streams % world_size == 0, (num_streams, world_size)
    return list(range(rank, num_streams, world_size))


def generator(seed: int, purpose: str, stream: int = 0, step: int = 0, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, stream, step))


class StreamGenerators:
    """One generator a (purpose, owned stream), made once and reseeded at every use."""

    def __init__(self, seed: int, streams: Sequence[int], device="cpu"):
        self.seed, self.streams, self.device = seed, list(streams), torch.device(device)
        self._generators: dict[str, list[torch.Generator]] = {}

    def __call__(self, purpose: str, step: int) -> list[torch.Generator]:
        """The generators of `purpose`, a stream each, seeded for `step`; the next call for `purpose` reseeds them."""
        if purpose not in self._generators:
            self._generators[purpose] = [torch.Generator(self.device) for _ in self.streams]
        for stream, gen in zip(self.streams, self._generators[purpose], strict=True):
            gen.manual_seed(derive_seed(self.seed, purpose, stream, step))
        return self._generators[purpose]


def _parts(x: Tensor, generators: Generators):
    """Pairs (flat memory of a part, its generator): the batch cut into equal parts, one a generator.

    Writing through the dense memory makes the numbers a function of the generator alone and lets torch take its
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
    """Fill a dense `x` (B, ...) in place with N(0, 1); with a list of generators, each fills its part of the batch."""
    for part, gen in _parts(x, generators):
        part.normal_(generator=gen)
    return x


def uniform_(x: Tensor, generators: Generators = None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Fill a dense `x` (B, ...) in place with U[low, high), as `normal_`."""
    for part, gen in _parts(x, generators):
        part.uniform_(low, high, generator=gen)
    return x


def start_(x: Tensor, generators: Generators, interval: tuple[float, float] | None) -> Tensor:
    """Fill a dense `x` (B, ...) in place with states that chains start at: uniform in `interval`; None: N(0, 1)."""
    return normal_(x, generators) if interval is None else uniform_(x, generators, *interval)
