"""Which rows of a run W&B has already, its offline parts, and the files that wait for their upload."""

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebm.runtime.files import replace
from ebm.tracking.records import step_of

WRITE_EVERY = 5.0  # seconds
MAX_INTERVALS = 100
MAX_TEXT = 1 << 16  # characters of RUN/wandb_step that are read


class Handed:
    """RUN/wandb_step: the W&B id, the last step whose row is safe there, and the intervals of steps before it that
    lack theirs.

    A row counts as safe `delay` seconds after it was handed over, once a later one was taken too: SIGKILL takes what
    the client had not flushed. Called by one thread."""

    def __init__(self, run_dir: Path, run_id: str, delay: float):
        self._path, self._id, self._delay = run_dir / "wandb_step", run_id, delay
        self._recent: deque[tuple[float, int]] = deque()  # rows that are not safe yet: when they were taken, and step
        self._written = -math.inf
        self._limit = sys.maxsize  # beyond which no row counts as safe
        self._open = False  # whether the last row was missed, so that the next missed one is of the same interval
        self._safe, self._missed = self._read()

    @property
    def step(self) -> int:
        """The last safe step. It is 0 if nothing is known of this id: the run had no W&B before, or has a new id."""
        return self._safe

    def lacks(self, step: int) -> bool:
        """Whether the row of `step` is to be handed over again."""
        return step > self._safe or any(first <= step <= last for first, last in self._missed)

    @property
    def first_lacking(self) -> int:
        """No row before this step is to be handed over again."""
        return min([first for first, _ in self._missed], default=self._safe + 1)

    def note(self, step: int) -> None:
        """Note that the client took the row of `step`."""
        now, done = time.monotonic(), False
        self._recent.append((now, step))
        self._open = False
        if now - self._written < WRITE_EVERY:
            return
        while self._recent[0][0] < now - self._delay:
            self._deliver(self._recent.popleft()[1])
            done = True
        if done:
            self._write()

    def miss(self, step: int) -> None:
        """Note that the client did not take the row of `step`."""
        if self._open and self._missed and self._missed[-1][1] < step:
            self._missed[-1] = (self._missed[-1][0], step)
        elif len(self._missed) < MAX_INTERVALS:
            self._missed.append((step, step))
        else:  # all from here on is handed over again: rows that stand twice, with the same values, cost little
            self._limit = min(self._limit, step - 1)
        self._open = True

    def all_safe(self) -> None:
        """The client ended well, so every row that it took is safe."""
        while self._recent:
            self._deliver(self._recent.popleft()[1])
        self._write()

    def rewind(self, step: int) -> None:
        """The rows after `step` come again, with other values."""
        self._recent.clear()
        self._safe = min(self._safe, step)
        self._missed = [(first, min(last, step)) for first, last in self._missed if first <= step]
        self._write()

    def _deliver(self, step: int) -> None:
        """Rows are handed over in order: those of an interval that come before `step` were tried again already."""
        self._safe = max(self._safe, min(step, self._limit))
        shorter = [(step + 1, last) if first <= step <= last else (first, last) for first, last in self._missed]
        self._missed = [(first, last) for first, last in shorter if first <= last]

    def _read(self) -> tuple[int, list[tuple[int, int]]]:
        try:
            run_id, safe, *intervals = self._path.read_text()[:MAX_TEXT].split()
            if run_id != self._id or not safe.isdecimal():
                return 0, []
            ends = [interval.partition("-") for interval in intervals]
            return int(safe), [(int(first), int(last)) for first, _, last in ends]
        except (OSError, ValueError):
            return 0, []

    def _write(self) -> None:
        intervals = "".join(f" {first}-{min(last, self._safe)}" for first, last in self._missed if first <= self._safe)
        with suppress(OSError):  # a lower step costs rows that stand twice, with the same values
            replace(self._path, f"{self._id} {self._safe}{intervals}\n".encode())
            self._written = time.monotonic()


def rows_between(metrics: Path, first: int, until: int) -> Iterator[dict[str, Any]]:
    """Yields the records of `metrics.jsonl` with first <= step <= until, as they were logged. Stops at a line that is
    no record."""
    with metrics.open("rb") as lines:
        for line in lines:
            if (step := step_of(line)) > until:
                return
            if step >= first:
                yield {key: _number(value) for key, value in json.loads(line).items()}


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


CLOSED = "closed"  # a file in the directory of an offline part that nobody writes to any more
PART = "part"  # a file there with the part's number


def number_part(part: Path) -> None:
    """Give a new offline part, a directory in RUN/wandb, its number. W&B names it by the local time, which goes back in
    autumn, on another node, or when a clock is set."""
    others = [part_number(other) for other in part.parent.glob("offline-run-*") if other != part]
    replace(part / PART, f"{max(others, default=0) + 1}\n".encode())


def part_number(part: Path) -> int:
    """Returns the part's number. It is 0 if there is none: the part is of a version before 0.2, or its start was
    killed."""
    try:
        text = (part / PART).read_text()[:32].strip()
    except (OSError, ValueError):
        return 0
    return int(text) if text.isdecimal() else 0


MAX_SAMPLES = 100  # newest pictures


class Artifacts:
    """RUN/wandb/artifacts/: what was handed to W&B and may not be uploaded yet, at most `max_gb` gigabytes."""

    def __init__(self, run_dir: Path, max_gb: float):
        self._root, self._max_bytes = run_dir / "wandb" / "artifacts", int(max_gb * 1e9)

    def hold(self, name: str, files: list[Path]) -> Path:
        """Returns a directory with these files, which nobody changes any more. Raises OSError beyond the limit, and if
        a file is gone."""
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
        """Remove the held files. Everything is uploaded."""
        shutil.rmtree(self._root, ignore_errors=True)


def newest_samples(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "samples").glob("step_*.png"))[-MAX_SAMPLES:]
