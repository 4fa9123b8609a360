"""The run directory: which job may use it, the records of starts and rollbacks, and what is said at the end."""

import fcntl
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter

from ebm.config import Config, changes, check_same_run, load_config, to_yaml
from ebm.errors import EXIT_STOPPED, ConfigError, DataError
from ebm.runtime import checkpoint, history
from ebm.runtime.distributed import World
from ebm.runtime.files import open_own, read_json, remove_leftovers, replace, try_lock
from ebm.runtime.process import EXIT_CODE

log = logging.getLogger(__name__)

T = TypeVar("T")

# Files of a run that are written by `replace`.
OURS = (
    r"config\.yaml|config_history\.json|attempts\.json|rollbacks\.json|environment\.json|DONE|"
    r"wandb_id|wandb_step|wandb_run\.json|report\.html|exit_code"
)
PICTURE = re.compile(r"step_\d{8,}\.png")
OF_ONE_CONFIG = (
    "attempts.json",
    "rollbacks.json",
    "DONE",
    "wandb_id",
    "wandb_step",
    "wandb_run.json",
    "evaluations.jsonl",
)
LOCK_WAIT = 60.0  # seconds for ranks that lost their launcher to notice it, save and end


class Attempts(BaseModel):
    """attempts.json: the starts in a row that began at one step, and how the last ended."""

    model_config = ConfigDict(strict=True)
    step: int = -1
    starts: Annotated[int, Field(ge=0)] = 0
    reason: str = ""


class _Rollback(BaseModel):
    """One of rollbacks.json; `divergence` is the state of the divergence monitor after it."""

    model_config = ConfigDict(strict=True)
    start: Annotated[int, Field(ge=0, alias="from")]
    to: Annotated[int, Field(ge=0)]
    rollbacks: Annotated[int, Field(ge=0)]
    reason: str
    divergence: Annotated[dict[str, Any], Field(validation_alias=AliasChoices("divergence", "ladder"))]  # before 0.2


class RunDirectory:
    """RUN/: config.yaml, checkpoints/, attempts.json, rollbacks.json, environment.json, STOP, DONE. Rank 0 makes it, or
    checks that it was made with this config. `beat` is called while rank 0 works, or waits for another process."""

    def __init__(self, config: Config, world: World, beat: Callable[[], None] | None = None):
        self.path, self.world, self._beat = Path(config.run.dir), world, beat
        self.checkpoints, self.stop_file = self.path / "checkpoints", self.path / "STOP"
        self._attempts, self._rollback_file = self.path / "attempts.json", self.path / "rollbacks.json"
        self._together(lambda: self._enter(config))
        self.done = world.any(world.is_main and (self.path / "DONE").exists())

    def _together(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0. Every rank returns what it returned, or raises its error."""

        def attempt() -> T:
            try:
                return action()
            except OSError as error:
                raise ConfigError(f"run.dir={self.path}: {error}; choose a directory that can be written") from error

        return self.world.on_main(attempt, self._beat)

    def _enter(self, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()  # before the config is looked at: another job may be about to write its own
        (self.path / EXIT_CODE).unlink(missing_ok=True)  # of the start before
        file = self.path / "config.yaml"
        if file.exists():
            self._bind(file, config)
        elif checkpoint.checkpoints(self.checkpoints):
            raise ConfigError(f"run.dir={self.path} holds checkpoints but no config.yaml; choose another run.dir")
        self.checkpoints.mkdir(exist_ok=True)
        if _restarts() == 0:  # else STOP is what ended the start before, and is to end this one
            self.stop_file.unlink(missing_ok=True)
        checkpoint.sweep(self.checkpoints)
        remove_leftovers(self.path, OURS)
        remove_leftovers(self.path / "samples", PICTURE.pattern)
        replace(file, to_yaml(config).encode())
        if self._ended_at() < config.train.steps:  # the end of a run that is extended
            (self.path / "DONE").unlink()

    def _bind(self, file: Path, config: Config) -> None:
        """Check that the run was made with this config, or record what train.extend changes. Without a step to lose,
        which only a first checkpoint makes, another config begins anew."""
        last = max((checkpoint.step_of(path) for path in checkpoint.checkpoints(self.checkpoints)), default=0)
        if last > 0:
            changed = check_same_run(load_config(file), config, str(self.path))
            if changed and config.train.steps < last:
                raise ConfigError(
                    f"train.steps={config.train.steps}: {self.path} is at step {last} already; give {last} or more"
                )
            if changed:
                history.record_change(self.path, last, changed)
            return
        try:
            if not changes(load_config(file), config):
                return
        except ConfigError:  # of another version, or damaged
            pass
        log.info(f"{self.path} held a start under another config that got to no checkpoint; the run begins anew")
        for path in checkpoint.checkpoints(self.checkpoints):
            checkpoint.remove(path)
        pictures = [path for path in (self.path / "samples").glob("step_*.png") if PICTURE.fullmatch(path.name)]
        for path in pictures:
            path.unlink()
        for name in OF_ONE_CONFIG:
            (self.path / name).unlink(missing_ok=True)

    def _ended_at(self) -> float:
        """The step that DONE names; infinite where there is none."""
        try:
            words = (self.path / "DONE").read_text()[:64].split()
        except (OSError, ValueError):
            return math.inf
        return int(words[1]) if len(words) == 2 and words[1].isdecimal() else math.inf

    def record_change(self, step: int, changed: dict[str, tuple[Any, Any]]) -> None:
        """Keep in the run's history what is different from `step` on. All ranks together."""
        self._together(lambda: history.record_change(self.path, step, changed))

    def _lock(self) -> None:
        """Keep other jobs out until this process ends, however it ends."""
        self._locked = open(open_own(self.path / "lock", os.O_RDWR | os.O_CREAT), "r+")  # noqa: SIM115 - kept open
        for wait in range(int(LOCK_WAIT)):
            try:
                if try_lock(self._locked.fileno()):
                    return
            except OSError as error:
                log.warning(f"{self.path} can't be locked ({error.strerror}): see that one job alone uses it")
                return
            if wait == 0:
                log.info(f"{self.path} is used by another process; waiting up to {LOCK_WAIT:.0f} s for its end")
            if self._beat is not None:
                self._beat()
            time.sleep(1.0)
        raise ConfigError(f"run.dir={self.path} is used by another process; end it, or choose another run.dir")

    def check_still_there(self) -> None:
        """Raises DataError if the directory was removed or replaced since the start."""
        mine = os.fstat(self._locked.fileno())
        try:
            found = os.stat(self.path / "lock", follow_symlinks=False)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (mine.st_dev, mine.st_ino):
            raise DataError(
                f"run.dir={self.path} was removed or replaced while the run wrote to it: its records and checkpoints "
                "are lost; run the same command again to train anew"
            )

    def resume_point(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The newest checkpoint that verifies, and the state of the divergence monitor that replaces its own after a
        rollback. Rank 0 finds them for all. Newer checkpoints, damaged or given up by a rollback, are set aside."""
        return self._together(self._resume_point)

    def _resume_point(self) -> tuple[Path | None, dict[str, Any] | None]:
        past = self._rollbacks()
        done, to, divergence = (past[-1].rollbacks, past[-1].to, past[-1].divergence) if past else (0, 0, {})
        while (path := checkpoint.newest_valid(self.checkpoints)) is not None:
            for newer in checkpoint.checkpoints(self.checkpoints):
                if newer > path:
                    checkpoint.set_aside(newer)
            if checkpoint.read_state(path).divergence["rollbacks"] >= done:
                return path, None
            if checkpoint.step_of(path) <= to:
                return path, divergence
            checkpoint.set_aside(path)
        for damaged in checkpoint.checkpoints(self.checkpoints):
            checkpoint.set_aside(damaged)
        return None, None

    def roll_back(self, step: int, divergence: dict[str, Any], reason: str) -> bool:
        """Choose the checkpoint to go back to, and record it before anything changes, so that a job that is killed now
        resumes as if it had gone on. Goes further back if the last rollback went to the same checkpoint. Returns
        whether there is a checkpoint."""

        def record() -> bool:
            past = self._rollbacks()
            target = checkpoint.newest_good(self.checkpoints)
            if target is not None and past and checkpoint.step_of(target) == past[-1].to:
                target = checkpoint.newest_good(self.checkpoints, before=target) or target
            if target is None:
                return False
            to = checkpoint.step_of(target)
            event = {"from": step, "to": to, "rollbacks": divergence["rollbacks"], "reason": reason}
            event["divergence"] = divergence
            events = [*(known.model_dump(by_alias=True) for known in past), event]
            replace(self._rollback_file, json.dumps(events, indent=1).encode())
            return True

        return self._together(record)

    def _rollbacks(self) -> list[_Rollback]:
        if not self._rollback_file.exists():
            return []
        try:
            return TypeAdapter(list[_Rollback]).validate_python(read_json(self._rollback_file))
        except (OSError, ValueError) as error:
            problem = " ".join(str(error).split())[:200]
            raise ConfigError(f"{self._rollback_file}: {problem}; restore it, or choose another run.dir") from error

    def begin(self, step: int, max_restarts: int) -> None:
        """Count and record this start from `step`. Raises ConfigError at the start after `max_restarts` that got no
        further."""
        self._together(lambda: self._count(step, max_restarts))

    def _count(self, step: int, max_restarts: int) -> None:
        seen = self.starts_before()
        starts = seen.starts + 1 if seen.step == step else 1
        if starts > max_restarts + 1:
            raise ConfigError(
                f"run.dir={self.path}: {starts - 1} starts at step {step} ended without a newer checkpoint "
                f"(health.max_restarts={max_restarts}). The last one said: "
                f"{seen.reason or 'nothing (killed, perhaps for its memory)'}. To try again, remove "
                f"{self._attempts} or raise health.max_restarts; if jobs end before their first checkpoint, lower "
                "checkpoint.every"
            )
        replace(self._attempts, Attempts(step=step, starts=starts).model_dump_json().encode())
        history.record_start(self.path, self.world, step)

    def starts_before(self) -> Attempts:
        """Returns the starts counted so far. A file of another kind counts as none, and is logged."""
        if not self._attempts.exists():
            return Attempts()
        try:
            return Attempts.model_validate(read_json(self._attempts))
        except (OSError, ValueError):
            log.warning(f"{self._attempts} can't be read; counting from new")
            return Attempts()

    def failed(self, reason: str) -> None:
        """Keep why this start ended, for the message that refuses another. Raises nothing: an error is under way."""
        with suppress(OSError, ValueError):
            seen = Attempts.model_validate(read_json(self._attempts))
            replace(self._attempts, seen.model_copy(update={"reason": reason[:1000]}).model_dump_json().encode())

    def finish(self, code: int, step: int, seconds: float) -> None:
        """Say what was written where and what to run next; DONE where the run is done. Raises DataError where the
        directory is gone."""
        if not self.world.is_main:
            return
        self.check_still_there()
        if code == 0:
            try:
                replace(self.path / "DONE", f"step {step}\n".encode())
            except OSError as error:
                raise DataError(f"{self.path}/DONE: {error}; make room, then run the same command again") from error
            log.info(
                f"done: {step} steps, {seconds:.0f} s\n"
                f"  metrics      {self.path}/metrics.jsonl\n"
                f"  samples      {self.path}/samples/\n"
                f"  checkpoints  {self.checkpoints}/\n"
                f"next:\n"
                f"  python -m ebm sample {self.path} --num 64 --steps 200 --out samples.png\n"
                f"  python -m ebm evaluate {self.path}\n"
                f"  python -m ebm report {self.path}"
            )
        elif code == EXIT_STOPPED:
            log.info(f"stopped at step {step}, checkpoint in {self.checkpoints}/; the same command goes on from there")


def is_training(run_dir: Path) -> bool:
    """Returns whether a training has the run's lock. False if the file system has no locks."""
    try:
        with open(open_own(run_dir / "lock", os.O_RDONLY), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def reserved(run_dir: Path) -> Iterator[None]:
    """Keep trainings out of the run for a moment; one that starts waits for the end. Raises ConfigError while one is
    under way."""
    try:
        file = open_own(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise ConfigError(f"{run_dir}/lock: {error.strerror}; make the run directory writable") from error
    with open(file, "r+b") as lock:
        try:
            free = try_lock(lock.fileno())
        except OSError:  # a file system without locks, which training warns of
            free = True
        if not free:
            raise ConfigError(f"{run_dir} is being trained, and W&B takes one writer; wait for its end, or stop it")
        yield


def _restarts() -> int:
    """How often an elastic launcher (--max-restarts) has started this process again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
