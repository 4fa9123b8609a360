"""One training step, top to bottom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm.config import Config
from ebm.data import Batch
from ebm.inference import images
from ebm.losses import LossOutput
from ebm.losses.factory import LossInputs
from ebm.runtime.distributed import World
from ebm.runtime.process import one_thread, to_device
from ebm.samplers.base import mean, mean_info, saturated
from ebm.streams import StreamGenerators
from ebm.training.negatives import Draw, initial_states
from ebm.training.state import TrainState, clip_grad_norm, set_learning_rate, step_if, update_average


class StepResult(NamedTuple):
    """What one step did on this rank. Tensors stay on the device."""

    draw: Draw | None  # None without persistent chains
    e_pos: Tensor | None  # (n,) float32; None where the objective computes none
    e_neg: Tensor | None  # (n,)
    scalars: dict[str, Tensor]  # by metric
    has_chains: bool  # whether `e_neg` are energies of chains


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """One optimizer step on this rank's part of the global batch. The host reads no device memory."""
    config, world, random, step = state.config, state.world, state.random, state.step + 1

    # Data in [-1, 1], dequantised, augmented, noised; and the states that chains start from, where the loss needs any.
    state.fold()
    with one_thread():
        x_pos, y_pos = positives(config, world, random, batch, step)
        start = initial_states(config, random, state.buffer, x_pos, y_pos, step, state.mixture, state.folded)

    # Part by part: chains on the frozen copy, then loss and gradient of both phases by one forward of what is wrapped.
    sampler, settings = state.chain()
    noise, loss_noise = random("chain", step), random("loss", step)
    parts = Parts(config.train.accumulate, len(random.streams))
    chains, infos, outputs = [], [], []
    for part in range(parts.number):
        take = partial(parts.take, part)
        data, x_neg, y_neg, ran = take(x_pos), None, None, settings
        if start is not None:
            own = start.part(take)
            x, info = state.engine(sampler, own.x, *own.extra_inputs, generator=noise, **settings)
            x_neg, y_neg = own.negatives(config, x), own.labels
            data, ran = data if own.data is None else own.data, settings | own.for_initialiser(config)
            chains.append(x)
            infos.append(info)
        with world.accumulating(state.model, last=part == parts.number - 1):
            inputs = LossInputs(data, x_neg, optional(take, y_pos), y_neg, step, ran)
            outputs.append(state.loss(inputs, loss_noise, parts.number))
    e_pos, e_neg = parts.join_if_any([o.e_pos for o in outputs]), parts.join_if_any([o.e_neg for o in outputs])

    # Update, or none where the gradient is not finite: averaged over the ranks, its norm tells all of them alike.
    with one_thread():
        grad_norm = clip_grad_norm(state.optimizer, config.optim.grad_clip, world.scaler)
        finite = grad_norm < torch.inf  # and no NaN, in one launch
        set_learning_rate(state.optimizer, config, step, state.divergence.lr_scale)
        step_if(state.optimizer, finite, world.scaler)
        state.optimizer.zero_grad()
        update_average(state.ema, state.energy, config.loss.ema_decay_at(step, config.optim.average_decay(step)))
        if start is not None and start.draw is not None:
            state.write_chains(start.draw, parts.join(chains), e_neg, finite)

    scalars = scalars_of(outputs, infos) | energy_means(e_pos, e_neg)
    scalars |= {"optim/grad_norm": grad_norm, "data/saturated": saturated(x_pos, config.sampler.bounds)}
    state.end_step(finite, scalars)
    return StepResult(None if start is None else start.draw, e_pos, e_neg, scalars, has_chains=bool(chains))


def positives(
    config: Config, world: World, random: StreamGenerators, batch: Batch, step: int
) -> tuple[Tensor, Tensor | None]:
    """The batch as the loss takes it: float32 images (B, C, H, W) in [-1, 1] or vectors (B, D), inside the sampler's
    bounds, on the device; and the labels (B,) for a class-conditional energy."""
    data, x = config.data, to_device(batch.images, world.device)
    if x.dtype == torch.uint8:
        x = images.dequantize(x, random("dequantize", step) if data.dequantize else None)
    if data.augment_flip or data.augment_crop:
        x = images.augment(x, random("augment", step), flip=data.augment_flip, crop=data.augment_crop)
    if data.noise_std:
        x = images.add_noise(x, data.noise_std, random("data_noise", step))
    if config.sampler.bounds is not None:  # chains never leave the bounds: data outside would be told by that alone
        x = x.clamp(*config.sampler.bounds)
    return x, to_device(batch.labels, world.device) if config.energy.num_classes else None


@dataclass(frozen=True)
class Parts:
    """A batch in a `number` of parts, each with an equal share of every one of the `streams`, which lie one after the
    other in it."""

    number: int
    streams: int

    def take(self, part: int, x: Tensor) -> Tensor:
        """Part number `part` of a batch (B, ...)."""
        if self.number == 1:
            return x
        return x.view(self.streams, self.number, -1, *x.shape[1:])[:, part].flatten(0, 1)

    def join(self, xs: Sequence[Tensor]) -> Tensor:
        """The batch (B, ...) of all its parts."""
        return torch.cat([x.reshape(self.streams, -1, *x.shape[1:]) for x in xs], dim=1).flatten(0, 1)

    def join_if_any(self, xs: Sequence[Tensor | None]) -> Tensor | None:
        found = [x for x in xs if x is not None]
        return self.join(found) if found else None


def optional(function: Callable[[Tensor], Tensor], x: Tensor | None) -> Tensor | None:
    return None if x is None else function(x)


def scalars_of(outputs: Sequence[LossOutput], infos: Sequence[Any]) -> dict[str, Tensor]:
    """The loss, its terms and what the chains report, by metric; means over the parts of the batch."""
    values = {"train/loss": mean([output.loss for output in outputs])}
    if infos:
        values |= {f"sampler/{name}": value for name, value in mean_info(infos)._asdict().items()}
    for name in outputs[0].terms:
        values[f"loss/{name}"] = mean([output.terms[name] for output in outputs])
    return values


def energy_means(e_pos: Tensor | None, e_neg: Tensor | None) -> dict[str, Tensor]:
    means = {"energy/pos_mean": e_pos, "energy/neg_mean": e_neg}
    return {name: e.mean() for name, e in means.items() if e is not None}
