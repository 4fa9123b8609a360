"""Checkpoints and samples that wait for W&B: hard links, so that they outlive the pruning of checkpoints."""

import os
import shutil
from pathlib import Path

MAX_SAMPLES = 100  # newest pictures


class Artifacts:
    """RUN/wandb/artifacts/: what was handed to W&B and may not be uploaded yet, at most `max_gb` gigabytes."""

    def __init__(self, run_dir: Path, max_gb: float):
        self._root, self._max_bytes = run_dir / "wandb" / "artifacts", int(max_gb * 1e9)

    def hold(self, name: str, files: list[Path]) -> Path:
        """A directory with these files, which nobody changes any more. Raises OSError: beyond the limit, or pruned."""
        size = sum(file.stat().st_size for file in files)
        held = sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())
        if held + size > self._max_bytes:
            raise OSError(
                f"{name} is left out: {(held + size) / 1e9:.2f} GB would wait in {self._root}; sync the run, or raise "
                "tracking.artifacts_gb"
            )
        directory = self._root / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for file in files:
            try:
                os.link(file, directory / file.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, directory / file.name)
        return directory

    def release(self) -> None:
        """All is uploaded."""
        shutil.rmtree(self._root, ignore_errors=True)


def newest_samples(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "samples").glob("step_*.png"))[-MAX_SAMPLES:]
