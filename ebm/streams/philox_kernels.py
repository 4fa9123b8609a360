"""Philox in Triton: the numbers of `ebm.streams.philox`, drawn inside a kernel."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def drawn_words(seeds_ptr, first_ptr, draw, stream, block):  # type: ignore[no-untyped-def]  # triton's own types
    """The four words of each of the blocks `block` (uint32) of a stream's draw, as `streams.philox.words` has them."""
    zero = block * 0
    number = (tl.load(first_ptr) + draw).to(tl.uint32)
    return tl.philox(tl.load(seeds_ptr + stream), block, zero + number, zero, zero)


@triton.jit
def box_muller(word, other):  # type: ignore[no-untyped-def]
    """Two independent normals of two words."""
    radius = tl.sqrt(-2.0 * tl.log(word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    angle = 6.283185307179586 * (other.to(tl.float32) * 2.3283064365386963e-10)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit  # type: ignore[untyped-decorator]
def drawn_normals(seeds_ptr, first_ptr, draw, stream, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements start ... start + BLOCK - 1 of a stream's part of a draw from N(0, 1); `start` is divisible by 4."""
    block = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    a, b, c, d = drawn_words(seeds_ptr, first_ptr, draw, stream, block)
    a, b = box_muller(a, b)
    c, d = box_muller(c, d)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit  # type: ignore[untyped-decorator]
def drawn_uniforms(seeds_ptr, first_ptr, draw, stream, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same elements of a draw from U[0, 1)."""
    block = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    a, b, c, d = drawn_words(seeds_ptr, first_ptr, draw, stream, block)
    return (tl.interleave(tl.interleave(a, c), tl.interleave(b, d)) >> 8).to(tl.float32) * 5.960464477539063e-08


@triton.jit(do_not_specialize=["draw"])  # type: ignore[untyped-decorator]  # one kernel for all draws
def _fill(  # type: ignore[no-untyped-def]
    x_ptr, seeds_ptr, first_ptr, draw, size, NORMAL: tl.constexpr, BLOCK: tl.constexpr
):
    start, stream = tl.program_id(0).to(tl.int64) * BLOCK, tl.program_id(1).to(tl.int64)
    if NORMAL:
        values = drawn_normals(seeds_ptr, first_ptr, draw, stream, start, BLOCK)
    else:
        values = drawn_uniforms(seeds_ptr, first_ptr, draw, stream, start, BLOCK)
    at = start + tl.arange(0, BLOCK)
    tl.store(x_ptr + stream * size + at, values, at < size)


def fill(x: Tensor, seeds: Tensor, first: Tensor, draw: int, kind: str) -> None:
    """`ebm.streams.philox.plain_fill` in one pass over memory."""
    size = x.numel() // len(seeds)
    _fill[(triton.cdiv(size, BLOCK), len(seeds))](x, seeds, first, draw, size, NORMAL=kind == "normal", BLOCK=BLOCK)
