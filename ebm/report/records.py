"""What a run directory says about its run, read so that nothing half-written or damaged gets in the way."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ebm.config import Config, load_config
from ebm.errors import DataError

RECENT = 20  # lines of metrics that are the present


@dataclass
class Records:
    path: Path
    config: Config
    rows: list[dict[str, float]]
    damaged: int  # lines of metrics that could not be read
    rollbacks: list[dict] = field(default_factory=list)
    attempts: dict = field(default_factory=dict)

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
        """The median of the newest lines, a number that is not finite included; NaN where there are none."""
        values = self.series(key)[1][-RECENT:]
        return float(np.median(values)) if len(values) else math.nan

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
    rollbacks = [event for event in _json(path / "rollbacks.json", list) if isinstance(event, dict)]
    attempts = _json(path / "attempts.json", dict)
    return Records(path, config, sound, len(rows) - len(sound), rollbacks, attempts)


def _row(line: bytes) -> dict[str, float] | None:
    """A line of metrics as numbers ("NaN" and the like too); None where it is damaged."""
    try:
        row = {str(key): float(value) for key, value in json.loads(line).items()}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return row if math.isfinite(row.get("step", math.nan)) else None


def _json(path: Path, kind: type):
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return kind()
    return value if isinstance(value, kind) else kind()
