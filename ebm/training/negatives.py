"""The negative phase: where chains start, and on which energy they move."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.config import Config
from ebm.data.augment import augment
from ebm.energies import FoldedEnergy
from ebm.losses import marginal, noisy, tilted
from ebm.streams import StreamGenerators, start_
from ebm.training.buffer import Draw, ReplayBuffer


class Start(NamedTuple):
    """Initial states of a step's chains, and what their energy takes beside a state."""

    x: Tensor  # (B, *shape); (B, levels, *shape) of tempered chains
    labels: Tensor | None = None  # (B,) of a conditional energy
    centres: Tensor | None = None  # (B, *shape), what recovery chains are tied to
    draw: Draw | None = None

    @property
    def given(self) -> list[Tensor]:
        """The further arguments of `chain_energy`."""
        return [value for value in (self.centres, self.labels) if value is not None]


def initial_states(
    config: Config,
    random: StreamGenerators,
    buffer: ReplayBuffer | None,
    x_pos: Tensor,
    y_pos: Tensor | None,
    step: int,
) -> Start | None:
    """Where the chains of a step start; None for an objective that needs none at this step."""
    negatives = config.loss.negatives_at(step)
    if negatives is None:
        return None
    y_pos = y_pos if config.loss.conditional_chains else None
    if negatives == "recovery":
        centres = noisy(x_pos, config.loss.sigma, random("start", step))
        bounds = config.sampler.bounds
        return Start(centres if bounds is None else centres.clamp(*bounds), y_pos, centres)
    if negatives == "persistent":
        per_stream = len(x_pos) // len(random.streams)
        draw = buffer.draw(per_stream, step, config.buffer.reinit_prob, config.buffer.reinit_spread)
        labels = None if y_pos is None else draw.rows % buffer.slots % config.energy.num_classes
        flip, crop = config.buffer.augment_flip, config.buffer.augment_crop
        x = augment(draw.x, random("augment_chains", step), flip, crop) if flip or crop else draw.x
        return Start(x, labels, draw=draw)
    x = _replicated(x_pos, config.sampler.levels)
    if negatives == "data":
        return Start(x, y_pos)
    return Start(start_(torch.empty_like(x), random("start", step), config.sampler.start_range), y_pos)


def coldest(x: Tensor, levels: int) -> Tensor:
    """The states (B, *shape) that sample the energy itself, of chains with `levels` replicas each."""
    return x if levels == 1 else x[:, 0]


def _replicated(x: Tensor, levels: int) -> Tensor:
    """Every state once for each temperature of a ladder."""
    return x if levels == 1 else x.unsqueeze(1).expand(-1, levels, *x.shape[1:]).contiguous()


def chain_energy(config: Config, folded: FoldedEnergy) -> Callable[..., Tensor]:
    """What the chains of training move on: called with states and what `Start.given` lists."""
    if config.loss.negatives == "recovery":
        return tilted(folded, config.loss.sigma)
    unlabelled = config.energy.num_classes and not config.loss.conditional_chains
    return marginal(folded) if unlabelled else folded
