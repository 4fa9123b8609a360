"""The run directory: who may use it, what is in it, what is said at the end."""

import fcntl
import json
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from ebm.config import Config, check_same_run, load_config, to_yaml
from ebm.errors import EXIT_STOPPED, ConfigError
from ebm.runtime import checkpoint
from ebm.runtime.files import replace

log = logging.getLogger(__name__)

LOCK_WAIT = 60.0  # seconds for ranks that lost their launcher to notice it, save and end


class RunDirectory:
    """RUN/: config.yaml, checkpoints/, attempts.json, rollbacks.json, STOP, DONE. Rank 0 makes it, or checks that it
    was made with this config."""

    def __init__(self, config: Config, world):
        self.path, self.world = Path(config.run.dir), world
        self.checkpoints, self.stop_file = self.path / "checkpoints", self.path / "STOP"
        self._attempts, self._rollback_file = self.path / "attempts.json", self.path / "rollbacks.json"
        self._together(lambda: self._enter(config))
        self.done = world.any(world.is_main and (self.path / "DONE").exists())

    def _together(self, action):
        """What `action` returns on rank 0, or its error, on every rank."""

        def attempt():
            try:
                return action()
            except OSError as error:
                raise ConfigError(f"run.dir={self.path}: {error}; choose a directory that can be written") from error

        return self.world.on_main(attempt)

    def _enter(self, config: Config) -> None:
        file = self.path / "config.yaml"
        if file.exists():
            check_same_run(load_config(file), config, str(self.path))
        elif checkpoint.checkpoints(self.checkpoints):
            raise ConfigError(f"run.dir={self.path} holds checkpoints but no config.yaml; choose another run.dir")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        if _restarts()[0] == 0:  # else STOP is what ended the start before, and is to end this one
            self.stop_file.unlink(missing_ok=True)
        checkpoint.sweep(self.checkpoints)
        for part in (*self.path.glob("*.tmp"), *self.path.glob("samples/*.tmp")):  # of a job that was killed
            part.unlink()
        replace(file, to_yaml(config).encode())

    def _lock(self) -> None:
        """Keep other jobs out until this process ends, however it ends."""
        self._locked = (self.path / "lock").open("w")
        for wait in range(int(LOCK_WAIT)):
            try:
                fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if wait == 0:
                    log.info(f"{self.path} is used by another process; waiting up to {LOCK_WAIT:.0f} s for its end")
                time.sleep(1.0)
            except OSError as error:
                log.warning(f"{self.path} can't be locked ({error.strerror}): see that one job alone uses it")
                return
        raise ConfigError(f"run.dir={self.path} is used by another process; end it, or choose another run.dir")

    def resume_point(self) -> tuple[Path | None, dict | None]:
        """The newest checkpoint that verifies, and the state of the divergence monitor that replaces its own after a
        rollback. Rank 0 finds them for all. Newer checkpoints, damaged or given up by a rollback, are set aside."""
        return self._together(self._resume_point)

    def _resume_point(self) -> tuple[Path | None, dict | None]:
        past = self._rollbacks()
        last = past[-1] if past else {"rollbacks": 0, "to": 0}
        while (path := checkpoint.newest_valid(self.checkpoints)) is not None:
            for newer in checkpoint.checkpoints(self.checkpoints):
                if newer > path:
                    checkpoint.set_aside(newer)
            if checkpoint.read_state(path).divergence["rollbacks"] >= last["rollbacks"]:
                return path, None
            if checkpoint.step_of(path) <= last["to"]:
                return path, last.get("divergence") or last["ladder"]  # the key before 0.2
            checkpoint.set_aside(path)
        for damaged in checkpoint.checkpoints(self.checkpoints):
            checkpoint.set_aside(damaged)
        return None, None

    def roll_back(self, step: int, divergence: dict, reason: str) -> bool:
        """Decide where to go back to, and record it before anything changes: a job killed from here on resumes as if
        it had gone on. Further back where the last rollback went to the same. False: there is no checkpoint."""

        def record() -> bool:
            past = self._rollbacks()
            target = checkpoint.newest_good(self.checkpoints)
            if target is not None and past and checkpoint.step_of(target) == past[-1]["to"]:
                target = checkpoint.newest_good(self.checkpoints, before=target) or target
            if target is None:
                return False
            to = checkpoint.step_of(target)
            event = {"from": step, "to": to, "rollbacks": divergence["rollbacks"], "reason": reason}
            event["divergence"] = divergence
            replace(self._rollback_file, json.dumps([*past, event], indent=1).encode())
            return True

        return self._together(record)

    def _rollbacks(self) -> list[dict]:
        if not self._rollback_file.exists():
            return []
        try:
            return json.loads(self._rollback_file.read_text())
        except ValueError as error:
            raise ConfigError(f"{self._rollback_file}: {error}; restore it, or choose another run.dir") from error

    def begin(self, step: int, max_restarts: int) -> None:
        """Count this start from `step`. Raises ConfigError at the start after `max_restarts` that got no further."""
        self._together(lambda: self._count(step, max_restarts))

    def _count(self, step: int, max_restarts: int) -> None:
        seen = {"step": -1, "starts": 0, "reason": ""}
        if self._attempts.exists():
            try:
                seen |= json.loads(self._attempts.read_text())
            except (ValueError, TypeError):
                log.warning(f"{self._attempts} can't be read; counting from new")
        starts = seen["starts"] + 1 if seen["step"] == step else 1
        if starts > max_restarts + 1:
            raise ConfigError(
                f"run.dir={self.path}: {starts - 1} starts at step {step} ended without a newer checkpoint "
                f"(health.max_restarts={max_restarts}). The last one said: "
                f"{seen['reason'] or 'nothing (killed, perhaps for its memory)'}. To try again, remove "
                f"{self._attempts} or raise health.max_restarts; if jobs end before their first checkpoint, lower "
                "checkpoint.every"
            )
        replace(self._attempts, json.dumps({"step": step, "starts": starts, "reason": ""}).encode())

    def failed(self, reason: str) -> None:
        """Keep why this start ended, for the message that refuses another. Raises nothing: an error is under way."""
        with suppress(OSError, ValueError):
            seen = json.loads(self._attempts.read_text())
            replace(self._attempts, json.dumps(seen | {"reason": reason[:1000]}).encode())

    def finish(self, code: int, step: int, seconds: float) -> None:
        """Say what was written where and what to run next; DONE where the run is done."""
        if not self.world.is_main:
            return
        if code == 0:
            replace(self.path / "DONE", f"step {step}\n".encode())
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
            if _restarts()[1]:  # the launcher takes the end of the ranks for a failure and starts them again
                self.stop_file.touch()
            log.info(f"stopped at step {step}, checkpoint in {self.checkpoints}/; the same command goes on from there")


def _restarts() -> tuple[int, int]:
    """How often an elastic launcher (--max-restarts) has started this process again, and how often it would."""
    return tuple(int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
