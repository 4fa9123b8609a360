"""Reads what a run directory says about its run. Nothing half-written, damaged or of a wrong type gets in the way: a
run may come from a stranger."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np

from ebm.config import Config, load_config
from ebm.errors import DataError

RECENT = 20  # lines of metrics that are the present
MAX_BYTES = 1 << 24  # of rollbacks.json and its like
MAX_TEXT, MAX_VALUES = 1000, 2000  # characters of a reason, values of an evaluation, that are shown

T = TypeVar("T", bound=list[Any] | dict[str, Any])


class Rollback(NamedTuple):
    start: int  # step at which the run diverged
    to: int  # step it went back to
    reason: str


class Attempts(NamedTuple):
    """Starts in a row that reached no newer checkpoint."""

    step: int = 0
    starts: int = 1
    reason: str = ""  # why the last of them ended


class Evaluation(NamedTuple):
    """What `ebm evaluate` kept."""

    step: int = 0  # of the checkpoint; 0 where the run was not evaluated
    values: dict[str, float | str] = {}  # noqa: RUF012 - never changed
    lengths: tuple[int, ...] = ()  # steps of the chains whose distances are length/K


@dataclass
class Records:
    path: Path
    config: Config
    rows: list[dict[str, float]]
    damaged: int  # lines of metrics that could not be read
    rollbacks: list[Rollback] = field(default_factory=list)
    attempts: Attempts = field(default_factory=Attempts)
    evaluation: Evaluation = field(default_factory=Evaluation)

    @property
    def done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @cached_property
    def keys(self) -> list[str]:
        """All metrics of the run but the step, in the order they first came."""
        return [key for key in dict.fromkeys(key for row in self.rows for key in row) if key != "step"]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the lines that have the key."""
        pairs = np.array([(row["step"], row[key]) for row in self.rows if key in row], dtype=float).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def present(self, key: str) -> float:
        """The median of the newest lines that have the key, or its newest value where these lines have none. A number
        that is not finite counts; NaN where the run has no value."""
        steps, values = self.series(key)
        if not len(values):
            return math.nan
        newest = self.rows[-RECENT:][0]["step"]
        return float(np.median(values[min(int(np.searchsorted(steps, newest)), len(values) - 1) :]))

    @property
    def panels(self) -> list[Path]:
        return sorted((self.path / "samples").glob("step_*.png"))


def read(path: Path) -> Records:
    """Raises DataError where there is no run, ConfigError where its config can't be read."""
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path}: no run directory (it has no config.yaml); give the run.dir of a training run")
    config = load_config(path / "config.yaml")
    try:
        text = (path / "metrics.jsonl").read_bytes() if (path / "metrics.jsonl").exists() else b""
    except OSError as error:
        raise DataError(f"{path / 'metrics.jsonl'}: {error.strerror}; make it readable") from error
    rows = [_row(line) for line in text.splitlines()]
    sound = [row for row in rows if row is not None]
    rollbacks = [event for entry in _json(path / "rollbacks.json", list) if (event := _rollback(entry)) is not None]
    return Records(
        path,
        config,
        sound,
        len(rows) - len(sound),
        rollbacks,
        _attempts(_json(path / "attempts.json", dict)),
        _evaluation(_json(path / "evaluation.json", dict)),
    )


def _rollback(entry: object) -> Rollback | None:
    """None where the entry is not what training writes."""
    if not isinstance(entry, dict) or not all(_is_count(entry.get(key)) for key in ("from", "to")):
        return None
    return Rollback(entry["from"], entry["to"], str(entry.get("reason", ""))[:MAX_TEXT])


def _attempts(entry: dict[str, object]) -> Attempts:
    step, starts = (entry.get(key) for key in ("step", "starts"))
    if not (_is_count(step) and _is_count(starts)):
        return Attempts()
    return Attempts(step, starts, str(entry.get("reason", ""))[:MAX_TEXT])


def _evaluation(entry: dict[str, object]) -> Evaluation:
    step, values, lengths = (entry.get(key) for key in ("step", "values", "lengths"))
    if not (_is_count(step) and isinstance(values, dict) and isinstance(lengths, list)):
        return Evaluation()
    sound = {
        key[:200]: value[:MAX_TEXT] if isinstance(value, str) else float(value)
        for key, value in list(values.items())[:MAX_VALUES]
        if isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 1e300)
    }
    return Evaluation(step, sound, tuple(length for length in lengths[:MAX_VALUES] if _is_count(length)))


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _row(line: bytes) -> dict[str, float] | None:
    """A line of metrics as numbers ("NaN" and the like too); None where it is damaged."""
    try:
        row = {str(key): float(value) for key, value in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return row if math.isfinite(row.get("step", math.nan)) else None


def _json(path: Path, kind: type[T]) -> T:
    """The value in a file; an empty one where it is missing, too large, or of another kind."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        value = json.loads(text) if len(text) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()
