"""The update of a Langevin step as one CUDA kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebm.samplers.base import Bounds
from ebm.streams.philox import Philox
from ebm.streams.philox_kernels import BLOCK, drawn_normals


# One kernel for all draws of a chain, and for a chain's every step: triton would build others for other divisors.
@triton.jit(do_not_specialize=["draw"])  # type: ignore[untyped-decorator]  # triton does not annotate it
def _kernel(  # type: ignore[no-untyped-def]  # triton takes annotations for types of its own language
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
    z: Tensor | Philox | None,
    step: float,
    noise: float,
    grad_clamp: float | None,
    bounds: Bounds,
    boundary: str,
) -> None:
    """`ebm.samplers.langevin.move_` in one pass over memory; `x` is dense, and a tensor `z` has its strides."""
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    given, source = (z, None) if isinstance(z, Tensor) else (None, z)
    parts = 1 if source is None else len(source)
    if source is not None:
        source.check(x.numel())
    size = x.numel() // parts
    low, high = bounds or (0.0, 0.0)
    _kernel[(triton.cdiv(size, BLOCK), parts)](
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
