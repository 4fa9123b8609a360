"""The training loop: where a run begins, its steps, health checks, records, checkpoints, and how it ends."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from ebm.config import Config
from ebm.data import Batch
from ebm.energies import UNetEnergyFunction
from ebm.errors import EXIT_STOPPED, ConfigError, DataError, DivergenceError, LostPeerError, UserError
from ebm.runtime import checkpoint
from ebm.runtime.checkpoint import Saver
from ebm.runtime.distributed import World
from ebm.runtime.process import leave_code
from ebm.runtime.run_directory import RunDirectory
from ebm.runtime.stopping import StopRequest, Watchdog
from ebm.tracking import Tracker
from ebm.training.cost import chain_ages, run_facts
from ebm.training.divergence import FreshReading, fresh_signs, judged_after
from ebm.training.readings import Heldout, Interval, measure, panels, read_health, read_heldout, trace
from ebm.training.state import TrainState, build_state, load, snapshot
from ebm.training.step import StepResult, train_step

log = logging.getLogger(__name__)


def begin(state: TrainState, run: RunDirectory) -> None:
    """Bring a new state to where the run begins. Raises ConfigError where its data are not those of the checkpoint,
    or where the other run's checkpoint does not fit."""
    path, divergence = run.resume_point()
    if path is not None:
        check_data(state, run, path)
        check_field(state, run, path)
        load(state, path, divergence)
        log.info(f"resuming {run.path} at step {state.step}")
    elif state.config.run.init is not None:
        is_field = state.config.run.init.endswith(".safetensors")
        (take_field if is_field else warm_start)(state, state.config.run.init)


def resume(state: TrainState, run: RunDirectory) -> bool:
    """Go back to the newest checkpoint. Returns whether there is one."""
    path, divergence = run.resume_point()
    if path is not None:
        load(state, path, divergence)
    return path is not None


def check_data(state: TrainState, run: RunDirectory, path: Path) -> None:
    """Raises ConfigError where a checkpoint was trained on other data, unless data.allow_change is set: then the change
    is recorded. Checkpoints of versions before 0.2 do not say."""
    before, now, config = checkpoint.read_state(path).data, state.data, state.config
    if before is None or before.identity == now.identity:
        return
    if not config.data.allow_change:
        raise ConfigError(
            f"data.shards={config.data.shards} holds other data than {run.path} was trained on: {before} until step "
            f"{checkpoint.step_of(path)}, {now} now. Give the data it was trained on, which may have moved; choose "
            "another run.dir; or go on with the new data by data.allow_change=true"
        )
    run.record_change(checkpoint.step_of(path), {"data": (str(before), str(now))})


def check_field(state: TrainState, run: RunDirectory, path: Path) -> None:
    """Raises ConfigError where the file of loss.field has changed since a checkpoint, unless train.extend is set: then
    the change is recorded."""
    before, now, config = checkpoint.read_state(path).field_sha256, state.field_sha256, state.config
    if before is None or now is None or before == now:  # another key is refused, or recorded, with the config
        return
    if not config.train.extend:
        raise ConfigError(
            f"loss.field={config.loss.trained_field} holds another field than {run.path} was trained with: sha256 "
            f"{before[:12]} until step {checkpoint.step_of(path)}, {now[:12]} now. Give the file it was trained with; "
            "choose another run.dir; or go on with the new field by train.extend=true"
        )
    run.record_change(checkpoint.step_of(path), {"loss.field": (before, now)})


def warm_start(state: TrainState, init: str) -> None:
    """Take over another run's weights, and what else run.init_* ask for, at step 0. All ranks together."""
    config = state.config.run
    path = state.world.on_main(lambda: find_checkpoint(Path(init)))
    try:
        name = {"ema": "ema", "raw": "model"}[config.init_weights]
        tensors = checkpoint.read_tensors(path, name, state.energy.state_dict())
        for module in (state.energy, state.ema):
            module.load_state_dict(tensors)
        if config.init_optimizer:
            checkpoint.load_optimizer(path, state.optimizer)
        if config.init_chains:
            take_chains(state, path)
    except DataError as error:
        raise ConfigError(
            f"run.init={init} does not fit this run: {error}; give the energy (and for run.init_chains=true also "
            "data.streams, and as buffer.size the number of chains) of that run's config.yaml"
        ) from error
    log.info(f"starting from the {config.init_weights} weights of {path}")


def take_field(state: TrainState, file: str) -> None:
    """The weights of a field that points at data (`UNetEnergyFunction.load_field`). Raises ConfigError."""
    config = state.config.run
    if config.init_optimizer or config.init_chains:
        raise ConfigError(f"run.init={file}: a field has neither Adam's averages nor chains; leave out run.init_*")
    if not isinstance(state.energy, UNetEnergyFunction) or not isinstance(state.ema, UNetEnergyFunction):
        raise ConfigError(f"run.init={file}: the weights of a field go with energy.kind=unet")
    try:
        tensors = load_file(file)
        for module in (state.energy, state.ema):
            module.load_field(tensors)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            f"run.init={file}: {error}; give the state_dict of a U-Net with this config's sizes"
        ) from error
    log.info(f"starting from the field of {file}")


def take_chains(state: TrainState, path: Path) -> None:
    """Another run's persistent chains. Raises ConfigError where this one has none, DataError where they don't fit."""
    if state.buffer is None:
        raise ConfigError("run.init_chains=true: this run's loss.negatives is not persistent; leave it out")
    checkpoint.read_state(path, state.config.data.streams)
    for i, stream in enumerate(state.buffer.streams):
        own = state.buffer.stream_state(i)
        state.buffer.load_stream(i, checkpoint.read_tensors(path, f"stream_{stream:04d}", own))


def find_checkpoint(place: Path) -> Path:
    """One checkpoint, or the newest of a run directory that verifies. Raises ConfigError."""
    if (place / "state.json").is_file():
        problem = checkpoint.problem_of(place)
        if problem:
            raise ConfigError(f"run.init={place}: {problem}; use another checkpoint")
        return place
    found = checkpoint.newest_valid(place / "checkpoints")
    if found is None:
        raise ConfigError(f"run.init={place}: no run directory with a checkpoint, nor a checkpoint; give one of these")
    return found


def train(config: Config, world: World, watchdog: Watchdog, started: float) -> int:
    """Run, or go on with, the training of `config`. Returns the exit code: 0 done, 75 stopped and resumable.

    `watchdog`: under way since before the ranks met; it ends with the last step.
    `started`: when the process began, by `time.monotonic`; `train.time_limit` counts from there.
    """
    run = RunDirectory(config, world, watchdog.beat)
    try:
        return run_from(run, config, world, watchdog, started)
    except UserError as error:
        leave_code(error.exit_code, run.path)
        raise


def run_from(run: RunDirectory, config: Config, world: World, watchdog: Watchdog, started: float) -> int:
    """`train`, once the run directory is this job's."""
    if run.done:
        log.info(
            f"{run.path} is done already; another run.dir begins a new run, and train.extend=true with more "
            "train.steps goes on with this one"
        )
        return 0
    watchdog.beat()
    state = build_state(config, world)
    watchdog.beat()
    begin(state, run)
    if state.buffer is not None:
        log.info(f"{config.buffer_size:,} persistent chains (buffer.size={config.buffer.size}): {chain_ages(config)}")
    run.begin(state.step, config.health.max_restarts)
    if idle := world.idle_cores():
        log.info(idle)
    watchdog.beat()
    heldout: list[Heldout | None] = []  # on rank 0 alone
    world.on_main(lambda: heldout.append(read_heldout(state)), watchdog.beat)
    facts = run_facts(state, watchdog.beat)
    tracker, code = open_tracker(state, run, facts), 1
    if tracker is not None:
        watchdog.on_stall(config.tracking.stall_after, tracker.stalled)
    try:
        with (
            StopRequest(run.stop_file if world.is_main else None, config.train.time_limit, started) as stop,
            watchdog,
            Saver(run.checkpoints, world) as saver,
        ):
            data, flops = heldout[0] if heldout else None, facts.get("flops_per_step")
            training = Training(state, run, saver, tracker, data, flops)
            try:
                code = training.loop(stop, watchdog)
            except Exception:
                if saver.busy and world.size == 1:  # which needs no other rank to make its checkpoint final
                    training.finish_save()
                raise
    except Exception as error:
        if isinstance(error, UserError):  # at once: the tracker's end takes time
            leave_code(error.exit_code, run.path)
            code = error.exit_code
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
        # The launcher ends all ranks when the first one ends: rank 0 closes first.
        if code == DivergenceError.exit_code:
            world.meet_within(config.train.collective_timeout)
    run.finish(code, state.step, time.monotonic() - started)
    if code == EXIT_STOPPED:  # as above
        leave_code(code, run.path)
        world.meet_within(config.train.collective_timeout)
    return code


def open_tracker(state: TrainState, run: RunDirectory, facts: dict[str, Any]) -> Tracker | None:
    """The tracker, on rank 0 alone; what keeps it from opening ends every rank."""
    tracker, error = None, None
    if state.world.is_main:
        try:
            tracker = Tracker(state.config, run.path, state.step, facts)
        except UserError as caught:
            error = caught
    state.world.raise_together(error)
    return tracker


@dataclass
class Training:
    """A run under way. All ranks call everything here at the same steps; `tracker` is on rank 0 alone."""

    state: TrainState
    run: RunDirectory
    saver: Saver
    tracker: Tracker | None
    heldout: Heldout | None  # on rank 0, where the run has held-out data
    flops: int | None  # of a step over all ranks, where they are known

    def loop(self, stop: StopRequest, watchdog: Watchdog) -> int:
        """Train to the last step (0), or until a stop is asked for (75)."""
        state, saver, config, world = self.state, self.saver, self.state.config, self.state.world
        if state.step == 0:
            saver.start(0, *snapshot(state))  # so that there is always one to roll back to
        interval, agreed = Interval(state.step), world.ask(stop.asked() is not None, not saver.ended)
        while state.step < config.train.steps:
            watchdog.beat()
            batch = self.next_batch(interval)
            result = train_step(state, batch)
            step, last = state.step, state.step == config.train.steps
            interval.add(result)
            if config.data.trace:
                trace(state, batch, result.draw, self.tracker)
            if step % config.health.every == 0 and self.heal(result):
                interval = Interval(state.step)
                continue
            showing = step % config.tracking.samples_every == 0 or last
            if step % config.train.log_every == 0 or showing:
                metrics = measure(state, result, interval, self.flops)
                interval = Interval(step)
                if showing:
                    self.show(batch, result, metrics)
                if self.tracker is not None:
                    self.tracker.log(step, metrics)
            stopping, writing = agreed()
            if saver.busy and not writing:
                self.finish_save()
            if last or stopping:
                self.save_now()
            elif step % config.checkpoint.every == 0:
                if saver.busy:  # slower than the steps of a whole interval: training waits
                    self.finish_save()
                saver.start(step, *snapshot(state))
            if stopping and not last:
                log.info(f"stopping at step {step}: {stop.reason or 'another rank was asked to'}")
                return EXIT_STOPPED
            if not last:  # answered after the next step
                agreed = world.ask(stop.asked() is not None, not saver.ended)
        return 0

    def next_batch(self, interval: Interval) -> Batch:
        before = time.perf_counter()
        batch = next(self.state.reader)
        interval.waited += time.perf_counter() - before
        if batch.errors:
            self.state.skipped_samples += batch.skipped
            log.warning(f"step {self.state.step + 1}: passed over {batch.skipped}: {batch.errors[0]}")
        return batch

    def show(self, batch: Batch, result: StepResult, metrics: dict[str, float]) -> None:
        """Show this step's panels. Adds the metrics of their fresh chains and of held-out data to `metrics`, and their
        signs to its warning. No action follows these: what has collapsed needs another recipe."""
        config, step = self.state.config, self.state.step
        found = panels(self.state, batch, result, self.tracker, self.heldout)
        if self.tracker is None:
            return
        metrics |= found
        excess = found["fresh/saturated"] - metrics["data/saturated"]
        reading = FreshReading(found["fresh/spread"], found["fresh/auc"], excess, found.get("heldout/auc"))
        signs = fresh_signs(step, reading, config)
        if not signs:
            log.info(f"step {step}: too early to judge by fresh chains before step {judged_after(config) + 1:.0f}")
            return
        worst = max(signs, key=lambda name: signs[name])
        metrics["health/warning"] = max(metrics["health/warning"], min(signs[worst], 1e6))
        if signs[worst] >= 1:
            told = f"step {step}: {worst} ({reading}); docs/your_images.md says what to change"
            log.warning(told)
            self.tracker.alert(worst, told)

    def heal(self, result: StepResult) -> bool:
        """Judge the run's health and act on it. Returns whether the run went back to an earlier state."""
        state, tracker = self.state, self.tracker
        # Rank 0's numbers for all: a last bit that differs between machines must not part the ranks.
        verdict = state.divergence.judge(state.step, state.world.gather(read_health(state, result))[0])
        if verdict.action == "go on":
            return False
        if verdict.action == "stop":
            raise DivergenceError(
                f"training diverged at {verdict.reason}. In a new run, lower optim.lr or sampler.step_size or raise "
                "loss.l2"
            )
        scales = f"learning rate x {state.divergence.lr_scale:g}, step size x {state.divergence.step_scale:g}"
        if verdict.action == "cut":
            log.info(f"diverging at {verdict.reason}: {scales} from here on")
            if tracker is not None:
                tracker.alert("steps were cut", f"{verdict.reason}: {scales} from here on")
            return False
        if self.saver.busy:
            self.finish_save()
        if not self.run.roll_back(state.step, state.divergence.state(), verdict.reason):
            raise DivergenceError(f"training diverged at {verdict.reason}, and there is no checkpoint to go back to")
        resume(state, self.run)
        if tracker is not None:
            tracker.rewind(state.step)
            tracker.alert("rolled back", f"{verdict.reason}: back to step {state.step}, {scales}")
        log.info(f"diverged at {verdict.reason}: back to step {state.step} with new noise, {scales}")
        return True

    def finish_save(self) -> bool:
        """Make the checkpoint under way final, with the records of its steps on the disk before it."""
        path = self.saver.finish(self.state.config.checkpoint.keep, self.tracker is None or self.tracker.flush())
        if path is not None and self.tracker is not None:
            self.tracker.checkpoint(path)
        return path is not None

    def save_now(self) -> None:
        """A checkpoint of this very step, or an error: nothing follows that could make up for one that failed."""
        if self.saver.busy:
            self.finish_save()
        for wait in (2.0, 10.0, None):
            self.saver.start(self.state.step, *snapshot(self.state))
            if self.finish_save():
                return
            if wait is not None:
                time.sleep(wait)
        raise DataError(
            f"the checkpoint of step {self.state.step} could not be written in three tries; make room, then run the "
            "same command: it goes on from the checkpoint before"
        )
