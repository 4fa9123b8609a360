"""One training step."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.config import Config
from ebm.data import Batch, augment
from ebm.runtime.process import one_thread
from ebm.samplers import adapted, sampler_of
from ebm.samplers.base import saturated
from ebm.streams import StreamGenerators
from ebm.training import optimizer as optimisation
from ebm.training.buffer import Draw
from ebm.training.negatives import coldest, initial_states
from ebm.training.state import TrainState


class StepResult(NamedTuple):
    """What one step did on this rank; tensors stay on the device."""

    draw: Draw | None
    e_pos: Tensor | None  # (n,) float32; None where the objective computes none
    e_neg: Tensor | None  # (n,)
    scalars: dict[str, Tensor]  # by metric

    @property
    def has_chains(self) -> bool:
        """Whether `e_neg` are energies of chains."""
        return "sampler/grad_norm" in self.scalars


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """One optimizer step on this rank's part of the global batch. Reads no device memory on the host."""
    config, world, random, step = state.config, state.world, state.random, state.step + 1
    parts, streams = config.train.accumulate, len(random.streams)

    # Data: to [-1, 1], dequantised, augmented, noised; and where the chains start, for objectives that need any.
    with one_thread():
        x_pos = positives(config, batch.images.to(world.device, non_blocking=True), random, step)
        y_pos = batch.labels.to(world.device, non_blocking=True) if config.energy.num_classes else None
        start = initial_states(config, random, state.buffer, x_pos, y_pos, step)

    # Part by part (one, unless train.accumulate says more): chain, then loss and gradient of both phases together.
    state.folded.refresh()
    noise, random_of_loss = random("chain", step), random("loss", step)
    chains, outputs, scalars = [], [], []
    for part in range(parts):
        take = partial(_part, part=part, parts=parts, streams=streams)
        x_neg, happened, settings = None, {}, None
        if start is not None:
            sampler, settings = sampler_of(state.sampler, step_size=state.step_size)
            settings["grad_scale"] = 1024.0 if state.folded.dtype == torch.float16 else 1.0
            x, info = state.engine(sampler, take(start.x), *map(take, start.given), generator=noise, **settings)
            happened = {f"sampler/{name}": value for name, value in info._asdict().items()}
            chains.append(x)
            x_neg = coldest(x, config.sampler.levels)
        with world.accumulating(state.model, last=part == parts - 1):
            labels = {"y_pos": take(y_pos), "y_neg": None if start is None else take(start.labels)}
            output = state.model(take(x_pos), x_neg, **labels, generator=random_of_loss, step=step, chain=settings)
            world.backward(output.loss / parts)
        outputs.append(output)
        scalars.append({"train/loss": output.loss.detach()} | happened)

    # Update. The gradient is averaged over the ranks, so its norm tells every rank alike whether any had a NaN;
    # torch's fused Adam leaves weights and state alone where found_inf is 1, without the host having to look.
    with one_thread():
        grad_norm = optimisation.clip_grad_norm(state.optimizer, config.optim.grad_clip, world.scaler)
        finite = torch.isfinite(grad_norm)
        optimisation.set_learning_rate(state.optimizer, config, step, state.ladder.lr_scale)
        optimisation.step_if(state.optimizer, finite, world.scaler)
        state.optimizer.zero_grad()
        optimisation.update_average(state.ema, state.energy, config.optim.ema_decay)

        # Chains go back to their slots; those that are not finite start again.
        e_pos, e_neg = (_join(list(es), streams) for es in zip(*((o.e_pos, o.e_neg) for o in outputs), strict=True))
        if start is not None and start.draw is not None:
            x = _join(chains, streams)
            sick = ~torch.isfinite(x).flatten(1).all(1) | ~torch.isfinite(e_neg)
            state.buffer.write(start.draw, x, config.sampler.num_steps, finite, sick)
            state.quarantined = state.quarantined + sick.sum()

    # Meters, on the device.
    state.step = step
    state.skipped_steps = state.skipped_steps + ~finite
    state.skipped_in_row = torch.where(finite, 0, state.skipped_in_row + 1)
    scalars = [own | {f"loss/{name}": term for name, term in output.terms.items()}
               for own, output in zip(scalars, outputs, strict=True)]  # fmt: skip
    values = {name: torch.stack([own[name] for own in scalars]).mean() for name in scalars[0]}
    values |= {f"energy/{name}_mean": e.mean() for name, e in (("pos", e_pos), ("neg", e_neg)) if e is not None}
    values |= {"optim/grad_norm": grad_norm, "data/saturated": saturated(x_pos, config.sampler.bounds)}
    state.meters.add(values)
    if state.step_size is not None and start is not None:
        target, rate = config.sampler.target_acceptance, config.sampler.adapt_rate
        state.step_size.copy_(adapted(state.step_size, world.mean(values["sampler/acceptance"]), target, rate))
    return StepResult(None if start is None else start.draw, e_pos, e_neg, values)


def positives(config: Config, samples: Tensor, random: StreamGenerators, step: int) -> Tensor:
    """uint8 images (B, C, H, W), or float32 vectors (B, D) -> the data of the loss, float32; images in [-1, 1], and all
    in the sampler's bounds."""
    data, x = config.data, samples
    if x.dtype == torch.uint8:
        x = augment.dequantize(x, random("dequantize", step) if data.dequantize else None)
    if data.augment_flip or data.augment_crop:
        x = augment.augment(x, random("augment", step), flip=data.augment_flip, crop=data.augment_crop)
    if data.noise_std:
        x = augment.add_noise(x, data.noise_std, random("data_noise", step))
    # Chains never leave the bounds; data outside would be told apart by that alone.
    return x if config.sampler.bounds is None else x.clamp(*config.sampler.bounds)


def _part(x: Tensor | None, part: int, parts: int, streams: int) -> Tensor | None:
    """Part `part` of every stream's share of a stream-major batch."""
    if x is None or parts == 1:
        return x
    return x.unflatten(0, (streams, parts, -1))[:, part].flatten(0, 1)


def _join(xs: list[Tensor | None], streams: int) -> Tensor | None:
    """The inverse of `_part` over all parts."""
    if xs[0] is None:
        return None
    return torch.cat([x.unflatten(0, (streams, -1)) for x in xs], dim=1).flatten(0, 1)
