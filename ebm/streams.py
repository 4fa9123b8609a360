"""Streams: the parts that data order, replay buffer and randomness are split into (docs/design.md).

A run has V streams for its whole life. Rank r of W owns the streams v with v mod W == r: on another number of ranks the
streams are dealt anew, and nothing else changes. Every draw is seeded by (seed, purpose, stream, step), so no generator
state has to outlive a step or be saved.

On a CPU torch's generators draw. On a GPU theirs give other numbers on another number of multiprocessors; a counter-
based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no state: number i of a draw is
a hash of a key and of i, so who computes it does not matter.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WORD = 0xFFFFFFFF  # Philox computes in 32-bit words; here each is the low half of an int64
LARGEST_PART = 2**34  # elements: four for each value of a 32-bit word of the counter


class Philox:
    """The random numbers of several streams, on one device. A batch is their equal parts, one after the other.

    The four 32-bit words of elements 4i ... 4i + 3 of a stream's part of draw number d are Philox4x32-10 of the key
    `seeds[stream]` (63 bits) and the counter (i, d, 0, 0). So a stream's numbers depend on its seed, the number of the
    draw and the element's place alone: not on the GPU model, the world size or the streams drawn beside it. The words
    are the same everywhere; normals may differ in the last bits with the device's log, sin and cos.

    `draws`: number of draws since the last reseeding, known to the host.
    `first`: a scalar on the device that is added to `draws`, 0 outside CUDA graphs. A graph has its draws' numbers
    built in; with it, a replay goes on from where the caller is.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.seeds = torch.empty(len(seeds), dtype=torch.int64, device=device)
        self.first = torch.zeros((), dtype=torch.int64, device=device)
        self.reseed(seeds)

    def __len__(self) -> int:
        return len(self.seeds)

    def reseed(self, seeds: Sequence[int]) -> None:
        """Begins anew with other seeds, one a stream, in [0, 2**63). The host does not wait for the device."""
        self.seeds.copy_(torch.tensor(seeds, dtype=torch.int64, pin_memory=self.seeds.is_cuda), non_blocking=True)
        self.draws = 0

    def fill_(self, x: Tensor, kind: str) -> None:
        """Fills the dense one-dimensional `x` with the next draw, "normal" (N(0, 1)) or "uniform" (U[0, 1))."""
        self.check(x.numel())
        values = x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)
        _filler(x.device.type)(values, self.seeds, self.first, self.draws, kind)
        self.draws += 1
        if values is not x:
            x.copy_(values)

    def check(self, size: int) -> None:
        """ValueError where `size` elements have no equal parts, one a stream."""
        if size % len(self):
            raise ValueError(f"{size} elements can't be cut into {len(self)} equal parts, one a stream")
        assert size // len(self) <= LARGEST_PART, size


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 10) -> tuple[Tensor, ...]:
    """Philox4x32 of four counter words and two key words: int64 tensors with values in [0, 2**32) that broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        # The 64 bits of a product are right although int64 wraps around, and so is each half after the mask.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (odd >> 32) & WORD ^ c1 ^ k0, odd & WORD, (even >> 32) & WORD ^ c3 ^ k1, even & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def words(seeds: Tensor, first: Tensor, draw: int, size: int) -> Tensor:
    """The words of draw number `first + draw`, (streams, blocks, 4) int64 with enough blocks for parts of `size`."""
    block = torch.arange(-(-size // 4), device=seeds.device)
    zero = torch.zeros_like(block)
    key = (seeds & WORD).unsqueeze(1), (seeds >> 32 & WORD).unsqueeze(1)
    return torch.stack(philox4x32((block, zero + (first + draw & WORD), zero, zero), key), dim=2)


def uniforms(bits: Tensor) -> Tensor:
    """Words as float32 in [0, 1), from their highest 24 bits."""
    return (bits >> 8).float() * 2.0**-24


def normals(bits: Tensor) -> Tensor:
    """Words (..., 4) as two pairs of normals (..., 4), float32 (Box & Muller 1958)."""
    u = bits.view(*bits.shape[:-1], 2, 2).float() * 2.0**-32
    radius, angle = (-2 * (u[..., 0] + 2.0**-33).log()).sqrt(), 2 * math.pi * u[..., 1]  # never the log of 0
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)


def plain_fill(x: Tensor, seeds: Tensor, first: Tensor, draw: int, kind: str) -> None:
    """Fills `x` (streams * size,) with tensor operations alone."""
    parts = x.view(len(seeds), -1)
    values = {"normal": normals, "uniform": uniforms}[kind](words(seeds, first, draw, parts.shape[1]))
    parts.copy_(values.flatten(1)[:, : parts.shape[1]])


@cache
def _filler(device: str) -> Callable[..., None]:
    """How a type of device fills a tensor: on CUDA by one kernel where triton is installed and can build it."""

    def load() -> Callable[..., None]:
        from ebm.kernels import fill

        return fill

    return fused_or(plain_fill, load, "the kernel of random numbers") if device == "cuda" else plain_fill


def fused_or(plain: Callable[..., None], load: Callable[[], Callable[..., None]], what: str) -> Callable[..., None]:
    """The kernel `load()` until it fails to build, and `plain` from then on. Triton needs a C compiler at run time,
    which slim containers lack, and builds at the first call for each combination of settings."""
    builds = find_spec("triton") is not None

    def run(x: Tensor, *rest: Any) -> None:
        nonlocal builds
        if builds:
            try:
                load()(x, *rest)
                return
            except torch.OutOfMemoryError:
                raise
            # Whatever a compiler, its absence or a broken installation raises. Nothing has been launched then.
            except Exception as error:
                if x.is_cuda and torch.cuda.is_current_stream_capturing():
                    raise  # the capture failed, not the kernel: it was built in the chain before
                builds = False
                reason = str(error).partition("\n")[0]
                log.warning("%s can't be built, several kernels do its work: %s", what, reason)
        plain(x, *rest)

    return run


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


def num_parts(generator: Generators) -> int:
    """The number of equal parts of a batch, one for each generator. What compares states compares them within a part,
    so that a run's losses don't depend on how many parts a process owns."""
    return 1 if generator is None or isinstance(generator, torch.Generator) else len(generator)
