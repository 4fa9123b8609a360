"""The run directory: who may use it, what is in it, what is said at the end."""

import fcntl
import json
import os
import time
from pathlib import Path

from ebm import checkpoint
from ebm.config import Config, check_same_run, load_config, to_yaml
from ebm.errors import EXIT_STOPPED, ConfigError, UserError

LOCK_WAIT = 60.0  # seconds for ranks that lost their launcher to notice it, save and end


class RunDirectory:
    """RUN/: config.yaml, checkpoints/, attempts.json, STOP, DONE. Made, or checked against the config, by rank 0."""

    def __init__(self, config: Config, world):
        self.path, self.world = Path(config.run.dir), world
        self.checkpoints, self.stop_file = self.path / "checkpoints", self.path / "STOP"
        self._attempts = self.path / "attempts.json"
        self._together(lambda: self._enter(config))
        self.done = world.any(world.is_main and (self.path / "DONE").exists())

    def _together(self, action):
        """What `action` returns on rank 0, or its error, on every rank."""
        result, error = None, None
        if self.world.is_main:
            try:
                result = action()
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = ConfigError(f"run.dir={self.path}: {caught}; choose a directory that can be written")
        self.world.raise_together(error)
        return self.world.gather(result)[0]

    def _enter(self, config: Config) -> None:
        file = self.path / "config.yaml"
        if file.exists():
            check_same_run(load_config(file), config, str(self.path))
        elif checkpoint.checkpoints(self.checkpoints):
            raise ConfigError(f"run.dir={self.path} holds checkpoints but no config.yaml; choose another run.dir")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.stop_file.unlink(missing_ok=True)
        checkpoint.sweep(self.checkpoints)
        _replace(file, to_yaml(config))

    def _lock(self) -> None:
        """Keep other jobs out until this process ends, however it ends."""
        self._locked = (self.path / "lock").open("w")
        for wait in range(int(LOCK_WAIT)):
            try:
                return fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait == 0:
                    self.say(f"{self.path} is used by another process; waiting up to {LOCK_WAIT:.0f} s for its end")
                time.sleep(1.0)
            except OSError as error:
                return self.say(f"{self.path} can't be locked ({error.strerror}): see that one job alone uses it")
        raise ConfigError(f"run.dir={self.path} is used by another process; end it, or choose another run.dir")

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that verifies, found by rank 0 and agreed by all; damaged ones go out of its way."""

        def find():
            found = checkpoint.newest_valid(self.checkpoints, self.say)
            for path in checkpoint.checkpoints(self.checkpoints):
                if found is None or path > found:
                    checkpoint.set_aside(path)
            return found

        return self._together(find)

    def begin(self, step: int, max_restarts: int) -> None:
        """Count this start from `step`. Raises ConfigError at the start after `max_restarts` that got no further."""
        self._together(lambda: self._count(step, max_restarts))

    def _count(self, step: int, max_restarts: int) -> None:
        seen = {"step": -1, "starts": 0, "reason": ""}
        if self._attempts.exists():
            try:
                seen |= json.loads(self._attempts.read_text())
            except (ValueError, TypeError):
                self.say(f"{self._attempts} can't be read; counting from new")
        starts = seen["starts"] + 1 if seen["step"] == step else 1
        if starts > max_restarts + 1:
            raise ConfigError(
                f"run.dir={self.path}: {starts - 1} starts at step {step} ended without a newer checkpoint "
                f"(health.max_restarts={max_restarts}). The last one said: "
                f"{seen['reason'] or 'nothing (killed, perhaps for its memory)'}. To try again, remove "
                f"{self._attempts} or raise health.max_restarts; if jobs end before their first checkpoint, lower "
                "checkpoint.every"
            )
        _replace(self._attempts, json.dumps({"step": step, "starts": starts, "reason": ""}))

    def failed(self, reason: str) -> None:
        """Keep why this start ended, for the message that refuses another. Raises nothing: an error is under way."""
        try:
            seen = json.loads(self._attempts.read_text())
            _replace(self._attempts, json.dumps(seen | {"reason": reason[:1000]}))
        except (OSError, ValueError):
            pass

    def finish(self, code: int, step: int, seconds: float) -> None:
        """Say what was written where and what to run next; DONE where the run is done."""
        if not self.world.is_main:
            return
        if code == 0:
            _replace(self.path / "DONE", f"step {step}\n")
            self.say(
                f"done: {step} steps, {seconds:.0f} s\n"
                f"  metrics      {self.path}/metrics.jsonl\n"
                f"  samples      {self.path}/samples/\n"
                f"  checkpoints  {self.checkpoints}/\n"
                f"next:\n"
                f"  python -m ebm sample {self.path} --num 64 --steps 200 --out samples.png\n"
                f"  python -m ebm evaluate {self.path}"
            )
        elif code == EXIT_STOPPED:
            self.say(f"stopped at step {step}, checkpoint in {self.checkpoints}/; the same command goes on from there")


def _replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_suffix(f"{path.suffix}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
