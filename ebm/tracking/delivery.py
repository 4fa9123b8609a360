"""What W&B has of a run already, and the files that wait for it."""

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebm.runtime.files import replace

WRITE_EVERY = 5.0  # seconds


class Handed:
    """RUN/wandb_step: the W&B id, and the last step whose row is safe there.

    A row counts as safe `delay` seconds after it was handed over: SIGKILL takes what the client had not flushed."""

    def __init__(self, run_dir: Path, run_id: str, delay: float):
        self._path, self._id, self._delay = run_dir / "wandb_step", run_id, delay
        self._recent: deque[tuple[float, int]] = deque()
        self._written = -math.inf

    @property
    def step(self) -> int:
        """0 where nothing is known of this id: a run that had no W&B before, or has a new id."""
        try:
            run_id, step = self._path.read_text().split()
            return int(step) if run_id == self._id else 0
        except (OSError, ValueError):
            return 0

    def note(self, step: int) -> None:
        """The row of `step` was handed over."""
        now, safe = time.monotonic(), None
        self._recent.append((now, step))
        if now - self._written < WRITE_EVERY:
            return
        while self._recent[0][0] < now - self._delay:
            safe = self._recent.popleft()[1]
        if safe is not None:
            self._write(safe)

    def all_safe(self) -> None:
        if self._recent:
            self._write(self._recent[-1][1])

    def rewind(self, step: int) -> None:
        """The rows after `step` come again, with other values."""
        self._recent.clear()
        if self.step > step:
            self._write(step)

    def _write(self, step: int) -> None:
        with suppress(OSError):  # a lower step costs rows that stand twice, with the same values
            replace(self._path, f"{self._id} {step}\n".encode())
            self._written = time.monotonic()


def rows_between(metrics: Path, after: int, until: int) -> Iterator[dict[str, Any]]:
    """The records of `metrics.jsonl` with after < step <= until, as they were logged."""
    with metrics.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if row["step"] > until:
                return
            if row["step"] > after:
                yield {key: _number(value) for key, value in row.items()}


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


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
