"""Where a run begins: at its newest checkpoint, at step 0, or at step 0 with another run's weights."""

import logging
from pathlib import Path

from ebm.errors import ConfigError, DataError
from ebm.runtime import checkpoint
from ebm.runtime.run_directory import RunDirectory
from ebm.training.state import TrainState, load

log = logging.getLogger(__name__)


def begin(state: TrainState, run: RunDirectory) -> None:
    """Bring a new state to where the run begins. Raises ConfigError where its data are not those of the checkpoint,
    or where the other run's checkpoint does not fit."""
    path, divergence = run.resume_point()
    if path is not None:
        check_data(state, run, path)
        load(state, path, divergence)
        log.info(f"resuming {run.path} at step {state.step}")
    elif state.config.run.init is not None:
        warm_start(state, state.config.run.init)


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
            "buffer.size and data.streams) of that run's config.yaml"
        ) from error
    log.info(f"starting from the {config.init_weights} weights of {path}")


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
