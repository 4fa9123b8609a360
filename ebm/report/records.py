"""What a run directory says about its run, and what every metric means: its unit and what a healthy value looks like.
Nothing half-written, damaged or of a wrong type gets in the way: a run may come from a stranger."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np

from ebm.config import Config, load_config
from ebm.errors import DataError
from ebm.training.divergence import MAX_HELDOUT_AUC, MIN_FRESH_SPREAD, largest_grad_norm

Range = tuple[float, float]


class Metric(NamedTuple):
    key: str  # a trailing * stands for what an objective or a sampler calls its own numbers
    meaning: str
    unit: str
    healthy: str
    bounds: Callable[[Config, dict[str, float]], Range] | None = (
        None  # of the config and the data's share at the bounds
    )


def _drift(config: Config, _: object) -> Range:
    """The limit of the drift, as a gradient norm."""
    return 0.0, largest_grad_norm(config.health.max_drift, config.sampler, config.data.shape)


def _zero(*_: object) -> Range:
    return 0.0, 0.0


def _one(*_: object) -> Range:
    return 1.0, 1.0


def _reinit(config: Config, _: object) -> Range:
    return config.buffer.reinit_prob - 0.05, config.buffer.reinit_prob + 0.05


def _saturated(_: Config, data: dict[str, float]) -> Range:
    return 0.0, data["data/saturated"] + 0.25


METRICS = (
    Metric("step", "optimizer steps so far, the axis of all others", "steps", "grows"),
    Metric("train/loss", "mean loss, with its regularisers", "energy",
           "finite, near 0 and level; says nothing about the quality of samples"),
    Metric("energy/pos_mean", "mean energy of data", "energy", "near 0, together with neg_mean"),
    Metric("energy/neg_mean", "mean energy of chains", "energy", "close to pos_mean"),
    Metric("energy/gap", "neg_mean less pos_mean", "energy",
           "small and level, of either sign; where it rises steadily, the chains are left behind"),
    Metric("energy/auc", "P(a chain's energy is above a datum's); .5: they can't be told apart", "probability",
           ".2 to .9; near 1 the chains don't reach the data, near 0 they lie in holes where no data is",
           lambda *_: (0.2, 0.9)),
    Metric("sampler/grad_norm", "norm of dE/dx at the last step of a chain, before any clamp", "energy / x",
           "level; below health.max_drift x width of the bounds x sqrt(size) / step_size", _drift),
    Metric("sampler/displacement", "norm of x_K - x_0: how far a chain moves in one step of training", "x",
           "level; 0: the chains are stuck"),
    Metric("sampler/saturated", "share of the chains' pixels at a bound", "share",
           "near data/saturated, at most .25 above it", _saturated),
    Metric("sampler/temperature", "noise_scale^2 / (2 step_size)", "energy", "as configured"),
    Metric("sampler/acceptance*", "share of proposals that the Metropolis test accepts", "share",
           "near the sampler's target"),
    Metric("sampler/*", "what a sampler reports of its own", "", "as its keys in train.py --help sampler say"),
    Metric("loss/*", "a term of the objective, by its name", "energy", "finite; weighted, they sum to train/loss"),
    Metric("fresh/energy_mean", "mean energy of a panel's fresh chains, by the averaged weights", "energy",
           "close to pos_mean"),
    Metric("fresh/auc", "as energy/auc, for a panel's fresh chains", "probability",
           "near .5 at the end; near 1 they don't reach the data, near 0 they run past it, as early in a run",
           lambda *_: (0.05, 0.95)),
    Metric("fresh/saturated", "share of the fresh chains' pixels at a bound", "share",
           "near data/saturated, at most .25 above it", _saturated),
    Metric("fresh/spread", "how much fresh chains differ from each other, as a share of how much data do; images by "
           "the means of 4 x 4 fields", "share", "near 1; below .5 they are alike, below .1 all the same picture",
           lambda *_: (MIN_FRESH_SPREAD, 2.0)),
    Metric("heldout/energy_mean", "mean energy of held-out data, by the averaged weights", "energy",
           "close to pos_mean"),
    Metric("heldout/auc", "P(a held-out datum's energy is above a training datum's), of a panel's few images",
           "probability", "near .5; near 1 the energy remembers its training data",
           lambda *_: (0.2, MAX_HELDOUT_AUC)),
    Metric("data/saturated", "share of the data's pixels at a bound", "share", "constant, a property of the data"),
    Metric("data/epoch", "epoch of the data", "epochs", "grows"),
    Metric("data/skipped", "samples passed over (data.on_error=skip)", "samples", "0", _zero),
    Metric("buffer/age_mean", "mean age of the persistent chains", "chain steps",
           "grows to about num_steps / reinit_prob, then level"),
    Metric("buffer/reinit_frac", "share of drawn chains restarted from noise", "share",
           "within .05 of buffer.reinit_prob", _reinit),
    Metric("optim/lr", "learning rate", "", "its schedule times health/lr_scale"),
    Metric("optim/grad_norm", "mean norm of the gradient, before clipping", "",
           "level; a rise over decades announces divergence"),
    Metric("health/warning", "worst sign of divergence, as a share of its limit", "share", "below 1",
           lambda *_: (0.0, 1.0)),
    Metric("health/rollbacks", "returns to an earlier checkpoint", "count", "0; one that helped is no harm", _zero),
    Metric("health/skipped_steps", "steps skipped for a non-finite gradient", "count", "0; a few with fp16", _zero),
    Metric("health/reset_chains", "chains restarted since they were not finite", "count", "0", _zero),
    Metric("health/lr_scale", "what cuts left of the learning rate", "factor", "1", _one),
    Metric("health/step_scale", "what cuts left of the step size", "factor", "1", _one),
    Metric("perf/step_s", "wall time of a step", "s", "level"),
    Metric("perf/chain_steps_per_s", "steps of single chains a second", "1/s", "level"),
    Metric("perf/images_per_s", "training images a second, over all ranks", "1/s", "level"),
    Metric("perf/gpu_memory_gb", "most GPU memory that rank 0 had in use since the last line", "GB", "level"),
    Metric("perf/mfu", "FLOPs of a step, counted for its chains and loss, as a share of what the GPUs can do at most "
           "(dense, by their data sheets)", "share", "level; .3 is good"),
    Metric("perf/data_wait_frac", "share of the time spent waiting for data", "share",
           "below .1; above it, raise data.workers", lambda *_: (0.0, 0.1)),
)  # fmt: skip


def metric_of(key: str) -> Metric | None:
    """The entry of a key; of several patterns the first, and a name before any pattern."""
    exact = next((m for m in METRICS if m.key == key), None)
    return exact or next((m for m in METRICS if m.key.endswith("*") and key.startswith(m.key[:-1])), None)


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
