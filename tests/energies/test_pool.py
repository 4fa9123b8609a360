"""The pool of the residual networks is avg_pool2d with ceil_mode: at all sizes, differentiated twice, and compiled. By
slices, as a GPU and compiled code have it, and as a CPU has it."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from ebm.energies import FoldedEnergy, ResNetEnergyFunction
from ebm.energies.resnet import _Halve, halve
from ebm.samplers.base import evaluate

POOLS = pytest.mark.parametrize("pool", [halve, _Halve.apply], ids=["halve", "slices"])
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def expected(h):
    return F.avg_pool2d(h, 2, ceil_mode=True)


@POOLS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (4, 9), (5, 2), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_avg_pool2d(pool, size, layout, dtype):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 5, *size, generator=generator).to(dtype, memory_format=layout).requires_grad_()
    ours, theirs = pool(h), expected(h)
    weights = torch.randn(theirs.shape, generator=generator).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    assert ours.dtype == dtype
    (grad,), (other,) = (torch.autograd.grad(out, h, weights) for out in (ours, theirs))
    torch.testing.assert_close(grad, other, rtol=0, atol=tolerance)


@POOLS
def test_layout_is_kept(pool):
    h = torch.randn(2, 16, 7, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = pool(h)
    (grad,) = torch.autograd.grad(out.sum(), h)
    for x in (out, grad):
        assert x.is_contiguous(memory_format=torch.channels_last)


@POOLS
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (3, 4)])
def test_derivatives_of_any_order(pool, size):
    h = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: pool(h).sin(), h)
    assert torch.autograd.gradgradcheck(lambda h: pool(h).sin(), h)


# avg_pool2d's compiled gradient is 40 % off at these sizes.
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize("what", ["pool", pytest.param("network", marks=pytest.mark.slow)])
def test_compiled_gradients_are_the_eager_ones(what):
    torch.manual_seed(0)
    if what == "pool":
        x, function = torch.randn(2, 3, 7, 7), lambda h: halve(h.sin()).square().flatten(1).sum(1)
    else:
        x, function = torch.rand(4, 1, 13, 13), FoldedEnergy(ResNetEnergyFunction(1, 13, 13, (8, 16)).eval()).refresh()
    torch._dynamo.reset()
    for ours, theirs in zip(evaluate(torch.compile(function), x), evaluate(function, x), strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_the_network_pools_after_each_stage():
    energy = ResNetEnergyFunction(1, 9, 12, (4, 8, 8), spectral_norm=False).eval()
    x = torch.randn(2, 1, 9, 12)
    h = energy.stem(x)
    for stage in energy.stages:
        h = expected(stage(h))
    torch.testing.assert_close(energy.features(x), energy.activation(h).sum((2, 3)))
