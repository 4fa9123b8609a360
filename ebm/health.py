"""What a run's energies and chains say about its health."""

from collections import Counter

import torch
from torch import Tensor


def auc(e_pos: Tensor, e_neg: Tensor) -> Tensor:
    """P(E(x_neg) > E(x_pos)), ties half, from energies (P,) and (N,): .5 where chains and data can't be told apart,
    1 where every chain lies above all data. A scalar on the energies' device (Mann & Whitney 1947)."""
    ranks = torch.searchsorted(e_pos.sort().values, e_neg.contiguous())
    through = torch.searchsorted(e_pos.sort().values, e_neg.contiguous(), right=True)
    return (ranks + through).double().mean() / (2 * len(e_pos))


def saturated(x: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """The share of components of `x` at a bound or beyond."""
    if bounds is None:
        return x.new_zeros(())
    return ((x <= bounds[0]) | (x >= bounds[1])).float().mean()


class Meters:
    """Means of scalars between two reads. They add up on the device; only `read` waits for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """One step's detached scalars; the same names on every rank."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts.update(values.keys())

    def read(self, world) -> dict[str, float]:
        """Each mean over the steps that gave it and over all ranks; starts over."""
        sums = torch.stack([value.float() / self._counts[name] for name, value in self._sums.items()])
        means = dict(zip(self._sums, world.mean(sums).tolist(), strict=True))
        self._sums, self._counts = {}, Counter()
        return means
