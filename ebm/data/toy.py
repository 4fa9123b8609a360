"""Samples of densities on the plane that are known exactly: float32 (N, 2), a function of the seed alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ebm.streams import generator

SAMPLES = 20_000  # of each split
# The four peaks' energy is .1 |x|^2 - sum_i w_i exp(-a_i |x - m_i|^2).
WEIGHTS = (2.0, 3.0, 1.0, 4.0)
SHARPNESS = (0.2, 0.2, 0.3, 0.2)
CENTRES = ((2.0, 2.0), (-2.0, 2.0), (2.0, -2.0), (-2.0, -2.0))


def four_peaks_depth(x: Tensor) -> Tensor:
    """S(x) = sum_i w_i exp(-a_i |x - m_i|^2), (N,): how far the peaks lower the energy .1 |x|^2 at x (N, 2)."""
    squares = (x[:, None] - x.new_tensor(CENTRES)).square().sum(2)
    return (x.new_tensor(WEIGHTS) * torch.exp(-x.new_tensor(SHARPNESS) * squares)).sum(1)


def four_peaks_energy(x: Tensor) -> Tensor:
    """E(x) = .1 |x|^2 - S(x), (N,), of which `four_peaks` draws exp(-E) / Z on all of the plane."""
    return 0.1 * x.square().sum(1) - four_peaks_depth(x)


def depth_bound() -> float:
    """An upper bound of S. A point's quadrant holds one centre, where S is at most its weight; the centres of the two
    quadrants beside it are at least 2 away, a squared distance of 4, and that of the one across at least 8."""
    bounds = []
    for own, (x, y) in enumerate(CENTRES):
        others = [WEIGHTS[own]]
        for weight, sharpness, (u, v) in zip(WEIGHTS, SHARPNESS, CENTRES, strict=True):
            axes_between = (u != x) + (v != y)
            others += [weight * math.exp(-sharpness * 4 * axes_between)] if axes_between else []
        bounds.append(sum(others))
    return max(bounds)


def four_peaks(n: int, gen: torch.Generator) -> tuple[Tensor, None]:
    """By rejection: exp(-E) = exp(-.1 |x|^2) exp(S), so a draw of N(0, 5 I) is kept with probability exp(S - bound)."""
    bound, kept, missing = depth_bound(), [], n
    while missing > 0:
        x = math.sqrt(5) * torch.randn(1 << 16, 2, generator=gen, dtype=torch.float64)
        u = torch.rand(len(x), generator=gen, dtype=torch.float64)
        kept.append(x[u < torch.exp(four_peaks_depth(x) - bound)])
        missing -= len(kept[-1])
    return torch.cat(kept)[:n], None


def eight_gaussians(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight N(m_k, .2^2 I) of equal weight, m_k = 2 (cos, sin)(pi k / 4); the label is k."""
    label = torch.randint(8, (n,), generator=gen)
    return 2 * _circle(label.double() * math.pi / 4) + 0.2 * _normal(n, gen), label


def rings(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three rings of equal weight: the angle uniform, the radius N(1 + k, .1^2); the label is k."""
    label = torch.randint(3, (n,), generator=gen)
    radius = 1 + label + 0.1 * torch.randn(n, generator=gen, dtype=torch.float64)
    return radius[:, None] * _circle(_angle(n, gen, 2)), label


def two_moons(n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half circles of radius 1 that interlock, as scikit-learn's, centred, plus N(0, .1^2 I); the label says which."""
    label = torch.randint(2, (n,), generator=gen)
    upper = _circle(_angle(n, gen, 1))
    lower = upper.new_tensor([1.0, 0.5]) - upper
    x = torch.where(label[:, None] == 0, upper, lower) - upper.new_tensor([0.5, 0.25])
    return x + 0.1 * _normal(n, gen), label


def _normal(n: int, gen: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=gen, dtype=torch.float64)


def _angle(n: int, gen: torch.Generator, half_turns: int) -> Tensor:
    return half_turns * math.pi * torch.rand(n, generator=gen, dtype=torch.float64)


def _circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=1)


TOYS: dict[str, Callable] = {
    "four_peaks": four_peaks,
    "eight_gaussians": eight_gaussians,
    "rings": rings,
    "two_moons": two_moons,
}


def sample_toy(name: str, split: str, n: int = SAMPLES) -> tuple[Tensor, Tensor | None]:
    """(float32 (n, 2), int64 labels (n,) or None) of a toy density; each split has a seed of its own."""
    x, labels = TOYS[name](n, generator(0, f"toy/{name}/{split}"))
    return x.float(), labels
