"""The update of a Langevin step as one CUDA kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebm.samplers.base import Bounds

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]  # triton does not annotate it
def _kernel(  # type: ignore[no-untyped-def]  # triton takes annotations for types of its own language
    x_ptr,
    grad_ptr,
    z_ptr,
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
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_ptr + at, inside)
    if CLAMP:
        grad = tl.clamp(grad, -clamp, clamp, propagate_nan=tl.PropagateNan.ALL)
    x = tl.load(x_ptr + at, inside) - step * grad
    if NOISE:
        x += noise * tl.load(z_ptr + at, inside)
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
    z: Tensor | None,
    step: float,
    noise: float,
    grad_clamp: float | None,
    bounds: Bounds,
    boundary: str,
) -> None:
    """`ebm.samplers.langevin.move_` in one pass over memory; `x` is dense, and `z` has its strides."""
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    low, high = bounds or (0.0, 0.0)
    _kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x,
        grad,
        x if z is None else z,
        x.numel(),
        float(step),
        float(noise),
        float(grad_clamp or 0.0),
        float(low),
        float(high),
        NOISE=z is not None,
        CLAMP=grad_clamp is not None,
        BOUNDARY="" if bounds is None else boundary,
        BLOCK=BLOCK,
    )
