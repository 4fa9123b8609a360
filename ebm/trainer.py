"""The trainer: one step, and the loop."""

import time
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from ebm import optimisation
from ebm.checkpoint import Saver
from ebm.config import Config
from ebm.data import Batch, augment
from ebm.distributed import World
from ebm.errors import EXIT_STOPPED, DataError, DivergenceError, LostPeerError, UserError
from ebm.health import saturated
from ebm.negatives import coldest, initial_states
from ebm.readings import Interval, StepResult, measure, panels, read_health, trace
from ebm.run_directory import RunDirectory
from ebm.samplers import adapted, sampler_of
from ebm.state import TrainState, build_state, load, snapshot
from ebm.stopping import StopRequest
from ebm.streams import StreamGenerators
from ebm.tracking import Tracker
from ebm.watchdog import Watchdog


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
            loss, terms = state.model(take(x_pos), x_neg, **labels, generator=random_of_loss, step=step, chain=settings)
            world.backward(loss / parts)
        outputs.append(terms)
        scalars.append({"train/loss": loss.detach()} | happened)

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
        e_pos, e_neg = (_join([terms.pop(name, None) for terms in outputs], streams) for name in ("e_pos", "e_neg"))
        if start is not None and start.draw is not None:
            x = _join(chains, streams)
            sick = ~torch.isfinite(x).flatten(1).all(1) | ~torch.isfinite(e_neg)
            state.buffer.write(start.draw, x, config.sampler.num_steps, finite, sick)
            state.quarantined = state.quarantined + sick.sum()

    # Meters, on the device.
    state.step = step
    state.skipped_steps = state.skipped_steps + ~finite
    state.skipped_in_row = torch.where(finite, 0, state.skipped_in_row + 1)
    scalars = [own | {f"loss/{name}": term.mean() for name, term in terms.items()}
               for own, terms in zip(scalars, outputs, strict=True)]  # fmt: skip
    values = {name: torch.stack([own[name] for own in scalars]).mean() for name in scalars[0]}
    values |= {f"energy/{name}_mean": e.mean() for name, e in (("pos", e_pos), ("neg", e_neg)) if e is not None}
    values |= {"optim/grad_norm": grad_norm, "data/saturated": saturated(x_pos, config.sampler.bounds)}
    state.meters.add(values)
    if state.step_size is not None and start is not None:
        target, rate = config.sampler.target_acceptance, config.sampler.adapt_rate
        state.step_size.copy_(adapted(state.step_size, world.mean(values["sampler/acceptance"]), target, rate))
    return StepResult(None if start is None else start.draw, e_pos, e_neg, values)


@contextmanager
def one_thread():
    """For tensors so small that on a CPU to wake another thread takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    if idle := world.idle_cores():
        run.say(idle)
    tracker, code = open_tracker(state, run), 1
    try:
        with (
            StopRequest(run.stop_file, config.train.time_limit, started) as stop,
            Watchdog(
                config.train.collective_timeout,
                world.rank,
                config.tracking.stall_after,
                None if tracker is None else tracker.stalled,
            ) as dog,
            Saver(run.checkpoints, world, run.say) as saver,
        ):
            code = loop(state, run, saver, tracker, stop, dog)
    except Exception as error:
        if tracker is not None:
            tracker.alert("the run ended", f"step {state.step}: {error}", "ERROR")
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


def loop(
    state: TrainState, run: RunDirectory, saver: Saver, tracker: Tracker | None, stop: StopRequest, dog: Watchdog
) -> int:
    config, world = state.config, state.world
    if state.step == 0:
        saver.start(0, *snapshot(state))  # so that there is always one to roll back to
    interval, agreed = Interval(state.step), world.ask(stop.asked() is not None, not saver.ended)
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
        stopping, writing = agreed()
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
        if not last:  # answered after the next step
            agreed = world.ask(stop.asked() is not None, not saver.ended)
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
        if tracker is not None:
            tracker.alert("steps were cut", f"{verdict.reason}: {scales} from here on")
        return False
    if saver.busy:
        finish_save(state, saver, tracker)
    if not run.roll_back(state.step, state.ladder.state(), verdict.reason):
        raise DivergenceError(f"training diverged at {verdict.reason}, and there is no checkpoint to go back to")
    resume(state, run)
    if tracker is not None:
        tracker.rewind(state.step)
        tracker.alert("rolled back", f"{verdict.reason}: back to step {state.step}, {scales}")
    run.say(f"diverged at {verdict.reason}: back to step {state.step} with new noise, {scales}")
    return True


def finish_save(state: TrainState, saver: Saver, tracker: Tracker | None) -> bool:
    """Make the checkpoint under way final, with the records of its steps on the disk before it."""
    path = saver.finish(state.config.checkpoint.keep, tracker is None or tracker.flush())
    if path is not None and tracker is not None:
        tracker.checkpoint(path)
    return path is not None


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
