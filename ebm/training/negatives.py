"""The negative phase: where chains start, and the energy that they sample."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.config import Config, NoiseLevelsConfig
from ebm.config.losses import RecoveryConfig
from ebm.data.augment import augment
from ebm.energies import FoldedEnergy
from ebm.losses import at_noise_levels, marginal, noisy, tilted
from ebm.samplers.factory import with_replicas
from ebm.streams import StreamGenerators, start_
from ebm.training.buffer import Draw, ReplayBuffer


class Start(NamedTuple):
    """Initial states of a step's chains, and what else their energy takes."""

    x: Tensor  # (B, *chain_shape)
    labels: Tensor | None = None  # (B,) of a class-conditional energy
    centres: Tensor | None = None  # (B, *shape): the noisy data that recovery chains are tied to
    draw: Draw | None = None  # of persistent chains: the slots they go back to

    @property
    def extra_inputs(self) -> list[Tensor]:
        """The arguments of `chain_energy` after the state."""
        return [value for value in (self.centres, self.labels) if value is not None]


def initial_states(
    config: Config,
    random: StreamGenerators,
    buffer: ReplayBuffer | None,
    x_pos: Tensor,
    y_pos: Tensor | None,
    step: int,
) -> Start | None:
    """Where the chains of a step start; None for an objective that needs no chains at this step.

    Chains of a class-conditional energy have the classes of the data, one chain a datum: the gradient then vanishes
    where the energy is right, whatever the shares of the classes. Chains over noise levels start at noisy data of all
    levels, which is where they are to stay.
    """
    loss, negatives = config.loss, config.loss.negatives_at(step)
    if negatives is None:
        return None
    y_pos = y_pos if loss.conditional_chains else None
    if isinstance(loss, RecoveryConfig):
        centres = noisy(x_pos, loss.sigma, random("start", step))
        bounds = config.sampler.bounds
        return Start(centres if bounds is None else centres.clamp(*bounds), y_pos, centres)
    if negatives == "persistent":
        assert buffer is not None
        per_stream = len(x_pos) // len(random.streams)
        draw = buffer.draw(per_stream, step, config.buffer.reinit_prob, config.buffer.reinit_spread, y_pos)
        flip, crop = config.buffer.augment_flip, config.buffer.augment_crop
        x = augment(draw.x, random("augment_chains", step), flip, crop) if flip or crop else draw.x
        if isinstance(config.sampler, NoiseLevelsConfig):
            born = draw.fresh | (buffer.age[draw.rows] == 0)
            noisy_data = at_noise_levels(
                x_pos, config.sampler.log_variances, config.sampler.lowest_share, random("start", step)
            )
            x = torch.where(born.view(-1, *[1] * (x.ndim - 1)), noisy_data, x)
        return Start(x, draw.labels, draw=draw)
    x = with_replicas(config.sampler, x_pos)
    if negatives == "data":
        return Start(x, y_pos)
    return Start(start_(torch.empty_like(x), random("start", step), config.sampler.start_range), y_pos)


def chain_energy(config: Config, folded: FoldedEnergy) -> Callable[..., Tensor]:
    """The energy that training's chains sample: a function of states and `Start.extra_inputs`."""
    if isinstance(config.loss, RecoveryConfig):
        return tilted(folded, config.loss.sigma)
    unlabelled = config.energy.num_classes and not config.loss.conditional_chains
    return marginal(folded) if unlabelled else folded
