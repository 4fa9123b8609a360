"""The replay buffer: persistent chains, sliced by stream (Tieleman 2008; Du & Mordatch 2019, section 3.2)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.streams import StreamGenerators, generator, start_


class Draw(NamedTuple):
    """The chains of one step, stream-major: S streams times n chains. `slots` and `reinit` are known to the host."""

    x: Tensor  # (S * n, *shape) float32, on the device
    noise: Tensor  # (S * n, *shape): where each would start, or did
    rows: Tensor  # (S * n,) rows of the storage, on the device
    fresh: Tensor  # (S * n,) bool, on the device: started again from noise at this draw
    slots: Tensor  # (S, n) slot numbers inside each stream's slice, on the host
    reinit: Tensor  # (S, n) bool, on the host


def reinit_probabilities(mean: float, spread: float, slots: int) -> Tensor:
    """Each slot's probability to start again when it is drawn, (slots,) float32: geometric from the first slot to the
    last, `spread` times smaller, with the given `mean`.

    One probability for all makes all chains about num_steps / mean old, and the energy is trained for no other age; a
    spread of 100 trains it for chains of 10 times fewer and 10 times more steps in the same run.
    """
    shape = torch.logspace(0, -math.log10(spread), slots, dtype=torch.float64)
    return (mean * shape / shape.mean()).float()


class ReplayBuffer:
    """The chains of this rank's streams: `slots` a stream, states (slots, *shape) in `dtype` and their ages. Draws are
    float32 whatever the chains are kept in.

    A slot belongs to its stream for the run's life, and to class `slot % num_classes` in a conditional run. New
    chains start as `ebm.streams.start_` says of `start`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        slots: int,
        streams: Sequence[int],
        seed: int,
        *,
        device="cpu",
        dtype: torch.dtype = torch.float32,
        start: tuple[float, float] | None = (-1.0, 1.0),
    ):
        self.streams, self.slots, self.seed, self.start = list(streams), slots, seed, start
        self.device = torch.device(device)
        self._noise = StreamGenerators(seed, self.streams, device)
        x = torch.empty(len(self.streams) * slots, *shape, device=device)
        self.x = start_(x, self._noise("fill", 0), start).to(dtype)
        self.age = torch.zeros(len(self.x), dtype=torch.int32, device=device)

    def draw(self, n: int, step: int, reinit_prob: float, reinit_spread: float = 1.0) -> Draw:
        """`n` different chains of each stream, a share `reinit_prob` of them replaced by fresh noise: see
        `reinit_probabilities`."""
        probabilities = reinit_probabilities(reinit_prob, reinit_spread, self.slots)
        assert n <= self.slots, (n, self.slots)
        slots, reinit = [], []
        for stream in self.streams:
            rng = generator(self.seed, "draw", stream, step)
            slots.append(torch.randperm(self.slots, generator=rng)[:n])
            reinit.append(torch.rand(n, generator=rng) < probabilities[slots[-1]])
        slots, reinit = torch.stack(slots), torch.stack(reinit)
        rows = slots + self.slots * torch.arange(len(self.streams)).unsqueeze(1)
        rows = rows.flatten().to(self.device, non_blocking=True)
        fresh = reinit.flatten().to(self.device, non_blocking=True)
        x = self.x[rows].float()
        noise = start_(torch.empty_like(x), self._noise("reinit", step), self.start)
        x = torch.where(fresh.view(-1, *[1] * (x.ndim - 1)), noise, x)
        return Draw(x, noise, rows, fresh, slots, reinit)

    def write(self, draw: Draw, x: Tensor, num_steps: int, ok: Tensor, sick: Tensor) -> None:
        """Put the advanced chains back where they came from, `num_steps` older, unless `ok` (bool scalar) is false.
        Those that are `sick` (S * n,) start again from noise in any case."""
        age = torch.where(draw.fresh, 0, self.age[draw.rows]) + num_steps
        x = torch.where(ok, x, self.x[draw.rows].float())
        self.x[draw.rows] = torch.where(sick.view(-1, *[1] * (x.ndim - 1)), draw.noise, x).to(self.x.dtype)
        self.age[draw.rows] = torch.where(sick, 0, torch.where(ok, age, self.age[draw.rows])).to(torch.int32)

    def reseed(self, seed: int) -> None:
        """Draw and restart by another seed from now on."""
        self.seed = self._noise.seed = seed

    def stream_state(self, index: int) -> dict[str, Tensor]:
        """The tensors of the `index`-th owned stream, views of the storage."""
        part = slice(index * self.slots, (index + 1) * self.slots)
        return {"x": self.x[part], "age": self.age[part]}

    def load_stream(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, own in self.stream_state(index).items():
            own.copy_(tensors[name])
