"""The negative phase: the replay buffer of persistent chains, sliced by stream (Tieleman 2008; Du & Mordatch 2019,
section 3.2), where chains start, and the energy that they sample."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm.config import Config, NoiseLevelsConfig
from ebm.config.losses import RecoveryConfig
from ebm.energies import FoldedEnergy, with_noise_level
from ebm.errors import DataError
from ebm.evaluation.measures import principal_components
from ebm.evaluation.metrics import clusters
from ebm.inference.images import augment, strongly_augmented
from ebm.losses import at_noise_levels, marginal, noisy, noisy_pairs, tilted
from ebm.runtime.process import to_device
from ebm.samplers.base import MixtureStart, Start, initial_
from ebm.samplers.factory import at_highest_level, cold_states, negative_states, start_of, with_replicas
from ebm.samplers.levels import Proposal, tied, tied_start, untied
from ebm.streams import Generators, StreamGenerators, generator

NO_CLASS = -1  # of a chain that has not been drawn yet
FEWEST = 8  # data of a Gaussian: fewer tell nothing of a covariance


class Draw(NamedTuple):
    """The chains of one step, stream by stream: S streams times n chains. The host knows `slots` and `reinit`."""

    x: Tensor  # (S * n, *shape) float32, on the device
    labels: Tensor | None  # (S * n,) int64, on the device; None for chains without a class
    noise: Tensor  # (S * n, *shape): the state that each restarted from, or would restart from
    rows: Tensor  # (S * n,) rows of the storage, on the device
    fresh: Tensor  # (S * n,) bool, on the device: restarted from noise at this draw
    slots: Tensor  # (S, n) slot numbers inside each stream's slice, on the host
    reinit: Tensor  # (S, n) bool, on the host


@cache
def reinit_probabilities(mean: float, spread: float, slots: int) -> Tensor:
    """Each slot's probability to restart when it is drawn, (slots,) float32: it falls geometrically from the first slot
    to the last, whose is `spread` times smaller, and has the given `mean`.

    One probability for all makes all chains about num_steps / mean old, and the energy is trained for no other age; a
    spread of 100 trains it for chains of 10 times fewer and 10 times more steps in the same run.
    """
    shape = torch.logspace(0, -math.log10(spread), slots, dtype=torch.float64)
    return (mean * shape / shape.mean()).float()


@contextmanager
def rows_differ() -> Iterator[None]:
    """Inside, `x[rows] = values` is one scatter, for `rows` of which no two are equal. Under deterministic algorithms a
    GPU sorts them first, as equal ones would be written in any order."""
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if not was:
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


class ReplayBuffer:
    """The persistent chains of this rank's streams: `slots` chains a stream, each a state (*shape) and an age in steps.

    A slot belongs to its stream for the whole run. States are kept in `dtype` and drawn in float32; `start` is where
    new chains begin. With `labelled`, a chain also has a class for life: a chain that starts takes that of the datum it
    is drawn beside, so that the classes of the chains are distributed as the data's.
    """

    def __init__(
        self,
        shape: Sequence[int],
        slots: int,
        streams: Sequence[int],
        seed: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        start: Start = (-1.0, 1.0),
        labelled: bool = False,
    ):
        self.streams, self.slots, self.seed, self.start = list(streams), slots, seed, start
        self.device = torch.device(device)
        self._noise = StreamGenerators(seed, self.streams, device)
        x = torch.empty(len(self.streams) * slots, *shape, device=device)
        self.x = initial_(x, self._noise("fill", 0), start).to(dtype)
        self.age = torch.zeros(len(self.x), dtype=torch.int32, device=device)
        self.labels = torch.full((len(self.x),), NO_CLASS, device=device) if labelled else None

    def draw(
        self, n: int, step: int, reinit_prob: float, reinit_spread: float = 1.0, labels: Tensor | None = None
    ) -> Draw:
        """`n` different chains of each stream; each restarts from noise with the probability of its slot, as
        `reinit_probabilities` has them.

        `labels` (S * n,): the classes of the data that the chains are drawn beside, for a buffer of labelled chains.
        """
        probabilities = reinit_probabilities(reinit_prob, reinit_spread, self.slots)
        assert n <= self.slots, (n, self.slots)
        assert (labels is None) == (self.labels is None), "labelled chains are drawn beside labelled data"
        chosen, restarted = [], []
        for stream in self.streams:
            rng = generator(self.seed, "draw", stream, step)
            chosen.append(torch.randperm(self.slots, generator=rng)[:n])
            restarted.append(torch.rand(n, generator=rng) < probabilities[chosen[-1]])
        slots, reinit = torch.stack(chosen), torch.stack(restarted)
        first = self.slots * torch.arange(len(self.streams)).unsqueeze(1)
        rows, fresh = to_device((slots + first).flatten(), self.device), to_device(reinit.flatten(), self.device)
        x = self.x[rows].float()
        begins = fresh
        if labels is not None and self.labels is not None:
            own = self.labels[rows]
            without = own == NO_CLASS
            labels = torch.where(fresh | without, labels, own)
            if isinstance(self.start, MixtureStart):  # a chain starts in a component of its class
                begins = fresh | without
        noise = initial_(torch.empty_like(x), self._noise("reinit", step), self.start, labels)
        x = torch.where(begins.view(-1, *[1] * (x.ndim - 1)), noise, x)
        return Draw(x, labels, noise, rows, fresh, slots, reinit)

    def write(self, draw: Draw, x: Tensor, num_steps: int, ok: Tensor, broken: Tensor) -> None:
        """Put the chains of a draw back into their slots, `num_steps` older, unless `ok` (bool scalar) is false.

        A chain that is `broken` (bool, (S * n,)) restarts from noise in either case.
        """
        was = self.age[draw.rows]
        age = torch.where(draw.fresh, 0, was) + num_steps
        x = torch.where(ok, x, self.x[draw.rows].float())
        with rows_differ():
            self.x[draw.rows] = torch.where(broken.view(-1, *[1] * (x.ndim - 1)), draw.noise, x).to(self.x.dtype)
            self.age[draw.rows] = torch.where(broken, 0, torch.where(ok, age, was)).to(torch.int32)
            if self.labels is not None and draw.labels is not None:
                self.labels[draw.rows] = torch.where(ok | broken, draw.labels, self.labels[draw.rows])

    def reseed(self, seed: int) -> None:
        """Draw and restart chains by another seed from the next step on."""
        self.seed = self._noise.seed = seed

    def stream_state(self, index: int) -> dict[str, Tensor]:
        """The tensors of the `index`-th owned stream, as views of the storage."""
        part = slice(index * self.slots, (index + 1) * self.slots)
        own = {"x": self.x[part], "age": self.age[part]}
        return own if self.labels is None else own | {"labels": self.labels[part]}

    def load_stream(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, own in self.stream_state(index).items():
            own.copy_(tensors[name])


class ChainStart(NamedTuple):
    """Initial states of a step's chains, and what else their energy takes."""

    x: Tensor  # (B, *chain_shape)
    labels: Tensor | None = None  # (B,) of a class-conditional energy
    centres: Tensor | None = None  # (B, *shape): the noisy data that recovery chains are tied to
    draw: Draw | None = None  # of persistent chains: the slots they go back to
    levels: Tensor | None = None  # (B,) log variances of recovery over levels of noise, whose x are `tied`
    data: Tensor | None = None  # (B, C + 1, H, W) or (B, D + 1): what those chains are compared with, and its levels

    @property
    def extra_inputs(self) -> list[Tensor]:
        """The arguments of `chain_energy` after the state."""
        return [value for value in (self.centres, self.levels, self.labels) if value is not None]

    def part(self, take: Callable[[Tensor], Tensor]) -> "ChainStart":
        """The start of a part of the batch; what goes back to the buffer is of the whole."""
        taken = {name: take(value) for name, value in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**taken, draw=None)

    def negatives(self, config: Config, x: Tensor) -> Tensor:
        """The states of the negative phase, of chains `x` (B, *chain_shape) that started here."""
        if self.levels is None or self.centres is None:
            return negative_states(config.sampler, x)
        return with_noise_level(untied(x, self.centres, self.levels, config.recovery_levels), self.levels)

    def for_initialiser(self, config: Config) -> dict[str, Any]:
        """What the loss of `NoiseConditionalEnergy.propose` takes; nothing where there is no initialiser."""
        if config.noise_range is None or config.noise_range.initialiser is None:
            return {}
        levels = config.recovery_levels
        return {"centres": self.centres, "spacing": levels[1] - levels[0]}


def initial_states(
    config: Config,
    random: StreamGenerators,
    buffer: ReplayBuffer | None,
    x_pos: Tensor,
    y_pos: Tensor | None,
    step: int,
    mixture: MixtureStart | None = None,
    folded: FoldedEnergy | None = None,
) -> ChainStart | None:
    """Where the chains of a step start; None for an objective that needs no chains at this step.

    Chains of a class-conditional energy have the classes of the data, one chain a datum: the gradient then vanishes
    where the energy is right, whatever the shares of the classes. `folded`: proposes where recovery chains start, if it
    has an initialiser.
    """
    loss, negatives = config.loss, config.loss.negatives_at(step)
    if negatives is None:
        return None
    y_pos = y_pos if loss.conditional_chains else None
    if isinstance(loss, RecoveryConfig) and config.recovery_levels:
        return recovery_over_levels(
            config.recovery_levels, x_pos, y_pos, random("start", step), None if folded is None else folded.proposal
        )
    if isinstance(loss, RecoveryConfig):
        centres = noisy(x_pos, loss.sigma, random("start", step))
        bounds = config.sampler.bounds
        return ChainStart(centres if bounds is None else centres.clamp(*bounds), y_pos, centres)
    if negatives == "persistent":
        assert buffer is not None
        per_stream = len(x_pos) // len(random.streams)
        draw = buffer.draw(per_stream, step, config.buffer.reinit_prob, config.buffer.reinit_spread, y_pos)
        if config.buffer.restart == "augmented":
            draw = draw._replace(x=restarted(draw, buffer, random("restart", step), config.sampler.bounds))
        flip, crop = config.buffer.augment_flip, config.buffer.augment_crop
        x = augment(draw.x, random("augment_chains", step), flip, crop) if flip or crop else draw.x
        if isinstance(config.sampler, NoiseLevelsConfig):
            born = draw.fresh | (buffer.age[draw.rows] == 0)
            first = first_at_levels(config.sampler, x_pos, draw.noise, random("start", step))
            x = torch.where(born.view(-1, *[1] * (x.ndim - 1)), first, x)
        return ChainStart(x, draw.labels, draw=draw)
    x = with_replicas(config.sampler, x_pos)
    if negatives == "data":
        return ChainStart(x, y_pos)
    noise = initial_(torch.empty_like(x), random("start", step), start_of(config.sampler, mixture), y_pos)
    if loss.starts_at_data:  # the first half of what is computed at a time
        parts = len(random.streams) * config.train.accumulate
        data, other = (y.reshape(parts, 2, -1, *y.shape[1:]) for y in (x, noise))
        noise = torch.stack([data[:, 0], other[:, 1]], 1).flatten(0, 2)
    return ChainStart(noise, y_pos)


def first_at_levels(config: NoiseLevelsConfig, x_pos: Tensor, noise: Tensor, generators: Generators) -> Tensor:
    """Where chains over noise levels are born, (B, *chain_shape): in noise of the highest level if they are annealed,
    else at data with noise of the levels that they are to visit."""
    if config.level_moves == "annealed":
        return at_highest_level(config, cold_states(config, noise))
    return at_noise_levels(x_pos, config.log_variances, config.lowest_share, generators)


def recovery_over_levels(
    log_variances: Sequence[float],
    x_pos: Tensor,
    y_pos: Tensor | None,
    generators: Generators,
    proposal: Proposal | None = None,
) -> ChainStart:
    """Chains that are tied to data with noise, and the states of lower noise that these came from."""
    x, centres, levels = noisy_pairs(x_pos, log_variances, generators)
    labels = () if y_pos is None else (y_pos,)
    start = tied_start(centres, levels, log_variances, proposal, labels, generators)
    return ChainStart(start, y_pos, centres, levels=levels, data=with_noise_level(x, levels))


def restarted(draw: Draw, buffer: ReplayBuffer, generators: Generators, bounds: tuple[float, float] | None) -> Tensor:
    """The chains of a draw, of which those that restart begin in their own states, strongly augmented (Lee et al. 2023,
    CLEL): more different than a step makes them, and nearer to data than noise. The first start is in noise."""
    own = buffer.x[draw.rows].float()
    changed = strongly_augmented(own, generators)
    again = draw.fresh & (buffer.age[draw.rows] > 0)
    changed = changed if bounds is None else changed.clamp(*bounds)
    return torch.where(again.view(-1, *[1] * (own.ndim - 1)), changed, draw.x)


def fitted_mixture(config: Config, x: Tensor, labels: Tensor) -> MixtureStart:
    """Where the chains of sampler.start=mixture begin: Gaussians of the states `x` (N, *shape) with the run's noise,
    one a class for chains with a class, else one a cluster. A class of few data gets none; its chains start in all."""
    x, noise = x.flatten(1).double(), config.data.noise_std**2
    mixture = MixtureStart.empty(x.shape[1], config.classes_of_chains, config.sampler.bounds)
    count = len(mixture.shares)
    if not config.classes_of_chains:
        labels = clusters(x, config.run.seed, count)(x) if len(x) >= FEWEST * count else torch.zeros_like(labels)
    for k in range(count):
        own = x[labels == k]
        if len(own) < FEWEST:
            continue
        mean, values, vectors, rest = principal_components(own, min(mixture.factors.shape[2], len(own) // 4))
        mixture.shares[k], mixture.means[k], mixture.rest[k] = len(own), mean, math.sqrt(rest + noise)
        mixture.factors[k, :, : len(values)] = vectors * (values - rest).clamp(min=0).sqrt()
    if not mixture.shares.any():
        raise DataError(f"sampler.start=mixture: {len(x)} data are too few to fit it to; use another sampler.start")
    mixture.shares.div_(mixture.shares.sum())
    return mixture


def chain_energy(config: Config, folded: FoldedEnergy) -> Callable[..., Tensor]:
    """The energy that training's chains sample: a function of states and `ChainStart.extra_inputs`."""
    if config.recovery_levels:
        return tied(folded, config.recovery_levels)
    if isinstance(config.loss, RecoveryConfig):
        return tilted(folded, config.loss.sigma)
    unlabelled = config.energy.num_classes and not config.classes_of_chains
    return marginal(folded) if unlabelled else folded
