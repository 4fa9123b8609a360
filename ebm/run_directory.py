"""The run directory: who may use it, what is in it, what is said at the end."""

import os
from pathlib import Path

from ebm import checkpoint
from ebm.config import Config, check_same_run, load_config, to_yaml
from ebm.errors import EXIT_STOPPED, ConfigError, UserError


class RunDirectory:
    """RUN/: config.yaml, checkpoints/, STOP, DONE. Made, or checked against the config, by rank 0 for all."""

    def __init__(self, config: Config, world):
        self.path, self.world = Path(config.run.dir), world
        self.checkpoints, self.stop_file = self.path / "checkpoints", self.path / "STOP"
        error = None
        if world.is_main:
            try:
                self._enter(config)
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = ConfigError(f"run.dir={config.run.dir}: {caught}; choose a directory that can be written")
        world.raise_together(error)
        self.done = world.any(world.is_main and (self.path / "DONE").exists())

    def _enter(self, config: Config) -> None:
        file = self.path / "config.yaml"
        if file.exists():
            check_same_run(load_config(file), config, str(self.path))
        elif checkpoint.checkpoints(self.checkpoints):
            raise ConfigError(f"run.dir={self.path} holds checkpoints but no config.yaml; choose another run.dir")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.stop_file.unlink(missing_ok=True)
        _replace(file, to_yaml(config))

    def say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that verifies, found by rank 0 and agreed by all."""
        found = checkpoint.newest_valid(self.checkpoints, self.say) if self.world.is_main else None
        return self.world.gather(found)[0]

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
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
