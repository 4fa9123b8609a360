"""All that is written in Triton: the numbers of `ebm.streams.Philox`, drawn inside a kernel, and the update of a
Langevin step as one kernel."""

from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor, empty_like

BLOCK = 1024


class Source(Protocol):
    """What `ebm.streams.Philox` gives a kernel."""

    seeds: Tensor
    first: Tensor
    draws: int

    def __len__(self) -> int: ...
    def check(self, size: int) -> None: ...


@triton.jit
def drawn_words(seeds_ptr, first_ptr, draw, stream, block):  # type: ignore[no-untyped-def]  # triton's own types
    """The four words of each of the blocks `block` (uint32) of a stream's draw, as `ebm.streams.words` has them."""
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
    """`ebm.streams.plain_fill` in one pass over memory."""
    size = x.numel() // len(seeds)
    _fill[(triton.cdiv(size, BLOCK), len(seeds))](x, seeds, first, draw, size, NORMAL=kind == "normal", BLOCK=BLOCK)


# One kernel for all draws of a chain, and for a chain's every step: triton would build others for other divisors.
@triton.jit(do_not_specialize=["draw"])  # type: ignore[untyped-decorator]  # triton does not annotate it
def _move(  # type: ignore[no-untyped-def]  # triton takes annotations for types of its own language
    x_ptr,
    grad_ptr,
    z_ptr,
    seeds_ptr,
    first_ptr,
    draw,
    size,
    step,
    noise,
    clamp,
    low,
    high,
    NOISE: tl.constexpr,
    CLAMP: tl.constexpr,
    BOUNDARY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start, stream = tl.program_id(0).to(tl.int64) * BLOCK, tl.program_id(1).to(tl.int64)
    place = start + tl.arange(0, BLOCK)  # in the stream's part of the batch
    inside = place < size
    at = stream * size + place
    grad = tl.load(grad_ptr + at, inside)
    if CLAMP:
        grad = tl.clamp(grad, -clamp, clamp, propagate_nan=tl.PropagateNan.ALL)
    x = tl.load(x_ptr + at, inside) - step * grad
    if NOISE == "given":
        x += noise * tl.load(z_ptr + at, inside)
    if NOISE == "drawn":
        x += noise * drawn_normals(seeds_ptr, first_ptr, draw, stream, start, BLOCK)
    if BOUNDARY == "reflect":  # `ebm.samplers.base.reflected` again, which a kernel can't call
        width = high - low
        x -= low
        x -= 2 * width * tl.floor(x / (2 * width))
        x = width + low - tl.abs(x - width)
    if BOUNDARY != "":  # NaN stays NaN, so that the trainer notices the chain and resets it
        x = tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(x_ptr + at, x, inside)


def move_(
    x: Tensor,
    grad: Tensor,
    z: Tensor | Source | None,
    step: float,
    noise: float,
    grad_clamp: float | None,
    bounds: tuple[float, float] | None,
    boundary: str,
) -> None:
    """`ebm.samplers.langevin.move_` in one pass over memory; `x` is dense, and a tensor `z` has its strides."""
    if grad.stride() != x.stride():
        grad = empty_like(x).copy_(grad)
    given, source = (z, None) if isinstance(z, Tensor) else (None, z)
    parts = 1 if source is None else len(source)
    if source is not None:
        source.check(x.numel())
    size = x.numel() // parts
    low, high = bounds or (0.0, 0.0)
    _move[(triton.cdiv(size, BLOCK), parts)](
        x,
        grad,
        x if given is None else given,  # a pointer that is not read stands for each that is missing
        x if source is None else source.seeds,
        x if source is None else source.first,
        0 if source is None else source.draws,
        size,
        float(step),
        float(noise),
        float(grad_clamp or 0.0),
        float(low),
        float(high),
        NOISE="" if z is None else "drawn" if given is None else "given",
        CLAMP=grad_clamp is not None,
        BOUNDARY="" if bounds is None else boundary,
        BLOCK=BLOCK,
    )
    if source is not None:
        source.draws += 1  # once it is launched: where it can't be, the same draw is made without it
