"""Random numbers by a counter (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), for draws on a GPU.

torch's generators on a GPU give other numbers on a GPU with another number of multiprocessors. A counter-based
generator has no state: number i of a draw is a hash of a key and of i, so who computes it does not matter.
"""

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
        from ebm.streams.philox_kernels import fill

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
