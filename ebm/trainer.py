"""The trainer: one step, and the loop."""

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ebm import optimisation
from ebm.checkpoint import Saver
from ebm.config import Config
from ebm.data import Batch, augment
from ebm.distributed import World
from ebm.energies import FoldedEnergy
from ebm.errors import EXIT_STOPPED, DataError, DivergenceError, LostPeerError, UserError
from ebm.health import auc, saturated
from ebm.ladder import Reading
from ebm.losses import contrastive_divergence
from ebm.replay_buffer import Draw
from ebm.run_directory import RunDirectory
from ebm.samplers import fresh_chains, langevin, settings_of
from ebm.state import TrainState, build_state, load, snapshot
from ebm.stopping import StopRequest
from ebm.streams import StreamGenerators, uniform_
from ebm.tracking import Tracker
from ebm.watchdog import Watchdog


class StepResult(NamedTuple):
    """What one step did on this rank; tensors stay on the device."""

    draw: Draw | None
    e_pos: Tensor  # (n,) float32
    e_neg: Tensor  # (n,)
    scalars: dict[str, Tensor]  # by metric


def train_step(state: TrainState, batch: Batch) -> StepResult:
    """One optimizer step on this rank's part of the global batch. Reads no device memory on the host."""
    config, world, random, step = state.config, state.world, state.random, state.step + 1
    parts = config.train.accumulate

    # Data: uint8 -> [-1, 1], dequantised, augmented, noised.
    x_pos = positives(config, batch.images.to(world.device, non_blocking=True), random, step)
    y_pos = batch.labels.to(world.device, non_blocking=True) if config.energy.num_classes else None

    # Where the chains start.
    draw, x_init, y_neg = initial_states(state, x_pos, y_pos, step)

    # Part by part (one, unless train.accumulate says more): chain, then loss and gradient of both phases together.
    state.folded.refresh()
    noise = random("chain", step)
    settings = settings_of(state.sampler) | {"grad_scale": 1024.0 if state.folded.dtype == torch.float16 else 1.0}
    x_neg, scalars, energies = [], [], []
    for part in range(parts):
        take = partial(_part, part=part, parts=parts, streams=len(random.streams))
        labels = () if y_pos is None else (take(y_neg),)
        x, info = state.engine(langevin, take(x_init), *labels, generator=noise, **settings)
        with world.accumulating(state.model, last=part == parts - 1):
            loss, terms = contrastive_divergence(
                state.model, take(x_pos), x, l2=config.loss.l2, y_pos=take(y_pos), y_neg=take(y_neg)
            )
            world.backward(loss / parts)
        x_neg.append(x)
        energies.append(terms)
        scalars.append(torch.stack([loss.detach(), *info]))

    # Update. The gradient is averaged over the ranks, so its norm tells every rank alike whether any had a NaN;
    # torch's fused Adam leaves weights and state alone where found_inf is 1, without the host having to look.
    grad_norm = world.clip_grad_norm(state.model, config.optim.grad_clip)
    finite = torch.isfinite(grad_norm)
    optimisation.set_learning_rate(state.optimizer, config, step, state.ladder.lr_scale)
    optimisation.step_if(state.optimizer, finite)
    state.optimizer.zero_grad()
    state.ema.update_parameters(state.energy)

    # Chains go back to their slots; those that are not finite start again.
    joined = partial(_join, streams=len(random.streams))
    x_neg, e_neg = joined(x_neg), joined([terms["e_neg"] for terms in energies])
    if draw is not None:
        sick = ~(torch.isfinite(x_neg).flatten(1).all(1) & torch.isfinite(e_neg))
        state.buffer.write(draw, x_neg, config.sampler.num_steps, finite, sick)
        state.quarantined = state.quarantined + sick.sum()

    # Meters, on the device.
    state.step = step
    state.skipped_steps = state.skipped_steps + ~finite
    state.skipped_in_row = torch.where(finite, 0, state.skipped_in_row + 1)
    e_pos = torch.cat([terms["e_pos"] for terms in energies])
    names = ("train/loss", "sampler/grad_norm", "sampler/displacement", "sampler/saturated")
    values = dict(zip(names, torch.stack(scalars).mean(0), strict=True))
    values |= {"energy/pos_mean": e_pos.mean(), "energy/neg_mean": e_neg.mean(), "optim/grad_norm": grad_norm}
    values["data/saturated"] = saturated(x_pos, config.sampler.bounds)
    state.meters.add(values)
    return StepResult(draw, e_pos, e_neg, values)


def positives(config: Config, images: Tensor, random: StreamGenerators, step: int) -> Tensor:
    """uint8 images (B, C, H, W) -> the data of the loss, float32 in [-1, 1] (in the sampler's bounds)."""
    data = config.data
    x = augment.dequantize(images, random("dequantize", step) if data.dequantize else None)
    if data.augment_flip or data.augment_crop:
        x = augment.augment(x, random("augment", step), flip=data.augment_flip, crop=data.augment_crop)
    if data.noise_std:
        x = augment.add_noise(x, data.noise_std, random("data_noise", step))
    # Chains never leave the bounds; data outside would be told apart by that alone.
    return x if config.sampler.bounds is None else x.clamp(*config.sampler.bounds)


def initial_states(state: TrainState, x_pos: Tensor, y_pos: Tensor | None, step: int):
    """(the draw or None, initial states of the chains, their labels or None)."""
    if state.config.loss.negatives == "data":
        return None, x_pos, y_pos
    if state.config.loss.negatives == "noise":
        low, high = state.config.sampler.bounds or (-1.0, 1.0)
        return None, uniform_(torch.empty_like(x_pos), state.random("start", step), low, high), y_pos
    per_stream = len(x_pos) // len(state.random.streams)
    draw = state.buffer.draw(per_stream, step, state.config.buffer.reinit_prob)
    if y_pos is None:
        return draw, draw.x, None
    return draw, draw.x, draw.rows % state.buffer.slots % state.config.energy.num_classes


def _part(x: Tensor | None, part: int, parts: int, streams: int) -> Tensor | None:
    """Part `part` of every stream's share of a stream-major batch."""
    if x is None or parts == 1:
        return x
    return x.unflatten(0, (streams, parts, -1))[:, part].flatten(0, 1)


def _join(xs: list[Tensor], streams: int) -> Tensor:
    """The inverse of `_part` over all parts."""
    return torch.cat([x.unflatten(0, (streams, -1)) for x in xs], dim=1).flatten(0, 1)


def train(config: Config, world: World, started: float) -> int:
    """Run, or go on with, the training of `config`. Returns the exit code: 0 done, 75 stopped and resumable."""
    run = RunDirectory(config, world)
    if run.done:
        run.say(f"{run.path} is done already; another run.dir begins a new run")
        return 0
    state = build_state(config, world)
    if resume(state, run):
        run.say(f"resuming {run.path} at step {state.step}")
    run.begin(state.step, config.health.max_restarts)
    tracker, code = open_tracker(state, run), 1
    try:
        with (
            StopRequest(run.stop_file, config.train.time_limit, started) as stop,
            Watchdog(config.train.collective_timeout, world.rank) as dog,
        ):
            code = loop(state, run, tracker, stop, dog)
    except Exception as error:
        if not world.lost_peer(error):
            run.failed(f"{type(error).__name__}: {error}")
            raise
        first_line = str(error).partition("\n")[0]
        raise LostPeerError(
            f"rank {world.rank}: another rank ended, and its own message says why, or its host is gone ({first_line})"
        ) from error
    finally:
        state.reader.close()
        if tracker is not None:
            tracker.close(code)
    run.finish(code, state.step, time.monotonic() - started)
    if code == EXIT_STOPPED:  # the first rank to end so has its launcher end the others: rank 0 may be busy with W&B
        with suppress(RuntimeError):
            world.any(False)
    return code


def open_tracker(state: TrainState, run: RunDirectory) -> Tracker | None:
    """On rank 0; its error on every rank."""
    tracker, error = None, None
    if state.world.is_main:
        try:
            tracker = Tracker(state.config, run.path, state.step)
        except UserError as caught:
            error = caught
    state.world.raise_together(error)
    return tracker


@dataclass
class Interval:
    """What the loop adds up between two lines of metrics."""

    step: int
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0  # seconds for data
    reinit: float = 0.0  # sum of the steps' shares


def loop(state: TrainState, run: RunDirectory, tracker: Tracker | None, stop: StopRequest, dog: Watchdog) -> int:
    config, world, saver = state.config, state.world, Saver(run.checkpoints, state.world, run.say)
    if state.step == 0:
        saver.start(0, *snapshot(state))  # so that there is always one to roll back to
    interval = Interval(state.step)
    while state.step < config.train.steps:
        dog.beat()
        before = time.perf_counter()
        batch = next(state.reader)
        interval.waited += time.perf_counter() - before
        if batch.errors:
            state.skipped_samples += batch.skipped
            print(f"step {state.step + 1}: passed over {batch.skipped}: {batch.errors[0]}", flush=True)
        result = train_step(state, batch)
        step, last = state.step, state.step == config.train.steps
        if result.draw is not None:
            interval.reinit += result.draw.reinit.float().mean().item()
        if config.data.trace:
            trace(state, batch, result.draw, tracker)
        if step % config.health.every == 0 and heal(state, result, run, saver, tracker):
            interval = Interval(state.step)
            continue
        if step % config.train.log_every == 0 or last:
            metrics = measure(state, result, interval)
            if tracker is not None:
                tracker.log(step, metrics)
            interval = Interval(step)
        if step % config.tracking.samples_every == 0 or last:
            panels(state, batch, result, tracker)
        stopping, writing = world.any_of(stop.asked() is not None, not saver.ended)
        if saver.busy and not writing:
            finish_save(state, saver, tracker)
        if last or stopping:
            save_now(state, saver, tracker)
        elif step % config.checkpoint.every == 0:
            if saver.busy:  # slower than the steps of a whole interval: training waits
                finish_save(state, saver, tracker)
            saver.start(step, *snapshot(state))
        if stopping and not last:
            run.say(f"stopping at step {step}: {stop.reason or 'another rank was asked to'}")
            return EXIT_STOPPED
    return 0


def resume(state: TrainState, run: RunDirectory) -> bool:
    """Go on from the newest checkpoint, if there is one."""
    path, ladder = run.resume_point()
    if path is not None:
        load(state, path, ladder)
    return path is not None


def heal(state: TrainState, result: StepResult, run: RunDirectory, saver: Saver, tracker: Tracker | None) -> bool:
    """Judge the run's health and do what the ladder says. Whether the state is an earlier one now."""
    # Rank 0's numbers for all: a last bit that differs between machines must not part the ranks.
    verdict = state.ladder.judge(state.step, state.world.gather(read_health(state, result))[0])
    if verdict.action == "go on":
        return False
    if verdict.action == "stop":
        raise DivergenceError(
            f"training diverged at {verdict.reason}. In a new run, lower optim.lr or sampler.step_size or raise loss.l2"
        )
    scales = f"learning rate x {state.ladder.lr_scale:g}, step size x {state.ladder.step_scale:g}"
    if verdict.action == "cut":
        run.say(f"diverging at {verdict.reason}: {scales} from here on")
        return False
    if saver.busy:
        finish_save(state, saver, tracker)
    if not run.roll_back(state.step, state.ladder.state(), verdict.reason):
        raise DivergenceError(f"training diverged at {verdict.reason}, and there is no checkpoint to go back to")
    resume(state, run)
    if tracker is not None:
        tracker.rewind(state.step)
    run.say(f"diverged at {verdict.reason}: back to step {state.step} with new noise, {scales}")
    return True


def read_health(state: TrainState, result: StepResult) -> Reading:
    """This step's numbers over all ranks. Waits for the device."""
    world, sampler, step = state.world, state.sampler, result.scalars
    e_pos, e_neg = world.concatenate(torch.stack([result.e_pos, result.e_neg], dim=1)).unbind(1)
    weights = torch.stack([p.detach().double().sum() for p in state.energy.parameters()]).sum()
    weights = world.concatenate(weights[None])
    excess = step["sampler/saturated"] - step["data/saturated"]
    excess, grad_norm = world.mean(torch.stack([excess, step["sampler/grad_norm"]])).tolist()
    low, high = sampler.bounds or (-math.inf, math.inf)
    size = math.prod(state.config.data.shape)
    return Reading(
        gap=(e_neg.mean() - e_pos.mean()).item(),
        spread=torch.cat([e_pos, e_neg]).std().item(),
        auc=auc(e_pos, e_neg).item(),
        saturated=excess,
        drift=settings_of(sampler)["step_size"][-1] * grad_norm / size**0.5 / (high - low),
        void_in_row=int(state.skipped_in_row),
        replicas_agree=bool(torch.isfinite(weights).all() and (weights == weights[0]).all()),
    )


def finish_save(state: TrainState, saver: Saver, tracker: Tracker | None) -> bool:
    """Make the checkpoint under way final, with the records of its steps on the disk before it."""
    return saver.finish(state.config.checkpoint.keep, tracker is None or tracker.flush()) is not None


def save_now(state: TrainState, saver: Saver, tracker: Tracker | None) -> None:
    """A checkpoint of this very step, or an error: nothing follows that could make up for one that failed."""
    if saver.busy:
        finish_save(state, saver, tracker)
    for wait in (2.0, 10.0, None):
        saver.start(state.step, *snapshot(state))
        if finish_save(state, saver, tracker):
            return
        if wait is not None:
            time.sleep(wait)
    raise DataError(
        f"the checkpoint of step {state.step} could not be written in three tries; make room, then run the same "
        "command: it goes on from the checkpoint before"
    )


def measure(state: TrainState, result: StepResult, interval: Interval) -> dict[str, float]:
    """The metrics of an interval's steps, equal on all ranks but for perf/. Waits for the device."""
    config, world, ladder, steps = state.config, state.world, state.ladder, state.step - interval.step
    metrics = state.meters.read(world)
    metrics["energy/gap"] = metrics["energy/neg_mean"] - metrics["energy/pos_mean"]
    metrics["energy/auc"] = auc(world.concatenate(result.e_pos), world.concatenate(result.e_neg)).item()
    metrics["sampler/temperature"] = state.sampler.noise**2 / (2 * state.sampler.step_size)
    age = torch.zeros((), device=world.device) if state.buffer is None else state.buffer.age.float().mean()
    sums = torch.tensor([interval.reinit / steps, float(state.skipped_samples)], device=world.device)
    age, reinit, skipped, sick = world.mean(torch.cat([age[None], sums, state.quarantined[None].float()])).tolist()
    metrics |= {"buffer/age_mean": age, "buffer/reinit_frac": reinit, "data/skipped": round(skipped * world.size)}
    metrics["data/epoch"] = state.reader.epoch
    metrics["optim/lr"] = optimisation.learning_rate(config, state.step) * ladder.lr_scale
    metrics |= {"health/skipped_steps": int(state.skipped_steps), "health/quarantined": round(sick * world.size)}
    metrics |= {"health/warning": min(ladder.warning, 1e6), "health/rollbacks": ladder.rollbacks}
    metrics |= {"health/lr_scale": ladder.lr_scale, "health/step_scale": ladder.step_scale}
    seconds = time.perf_counter() - interval.started
    return metrics | {
        "perf/step_s": seconds / steps,
        "perf/data_wait_frac": interval.waited / seconds,
        "perf/chain_steps_per_s": config.sampler.num_steps * config.train.batch_size * steps / seconds,
    }


def trace(state: TrainState, batch: Batch, draw: Draw | None, tracker: Tracker | None) -> None:
    """One line of trace.jsonl: the samples and chains of the global batch, by stream."""
    chains = []
    if draw is not None:
        for stream, slots, reinit in zip(state.buffer.streams, draw.slots.tolist(), draw.reinit.tolist(), strict=True):
            chains += [[stream, slot, fresh] for slot, fresh in zip(slots, reinit, strict=True)]
    per_rank = state.world.gather((batch.keys, chains))
    if tracker is not None:
        samples = sorted((list(key) for keys, _ in per_rank for key in keys), key=lambda s: s[0])
        tracker.trace(state.step, samples, sorted((c for _, cs in per_rank for c in cs), key=lambda c: c[0]))


def panels(state: TrainState, batch: Batch, result: StepResult, tracker: Tracker | None) -> None:
    """Pictures of fresh chains (from noise, averaged weights), persistent chains and data; energy histograms."""
    if tracker is None:
        return
    config, n = state.config, state.config.tracking.num_samples
    folded = FoldedEnergy(state.ema.module, state.folded.dtype).refresh()
    fresh, _ = fresh_chains(
        folded,
        state.sampler,
        config.data.shape,
        n,
        config.tracking.sample_steps,
        seed=config.run.seed + state.step,
        device=state.world.device,
        num_classes=config.energy.num_classes,
    )
    images = {"samples/fresh": fresh}
    if state.buffer is not None:
        images["samples/buffer"] = state.buffer.x[:n].float()
    images["samples/data"] = batch.images[:n].float() / 127.5 - 1
    tracker.panels(state.step, images)
    tracker.histograms(state.step, {"energy/pos": result.e_pos, "energy/neg": result.e_neg})
