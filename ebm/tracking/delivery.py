"""Which W&B run a run is, which rows of it W&B has already, its offline parts, and the files that wait for their
upload.

What the config says of a run's name and project wins, then what an earlier start obtained, then the environment,
then the default. A resumed run is the same W&B run, whatever the environment says by then."""

import json
import logging
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ebm.config import TrackingConfig
from ebm.runtime.files import open_own, read_json, replace

log = logging.getLogger(__name__)

WARNING = "health/warning"  # the worst sign of divergence, as a share of its limit
MAX_EVALUATIONS = 1 << 24  # bytes that are read
MAX_ID = 128
ID = re.compile(r"[\w.-]{1,128}")
DEFAULT_PROJECT = "ebm"
YES = ("1", "true", "yes", "on")


class Obtained(BaseModel):
    """RUN/wandb_run.json: where the client put the run. `folder`: the directory with its `wandb` directory, if not RUN,
    which may move. `facts`: what the run's W&B config has beside the config."""

    model_config = ConfigDict(strict=True)
    project: Annotated[str, Field(max_length=1000)]
    entity: Annotated[str, Field(max_length=1000)] | None = None
    folder: Annotated[str, Field(max_length=4096)] | None = None
    facts: dict[str, Any] = {}


class Identity(NamedTuple):
    """What the client is asked for."""

    id: str
    project: str
    entity: str | None
    name: str
    folder: Path


def asked_for(tracking: TrackingConfig, run_dir: Path, environment: Mapping[str, str]) -> Identity:
    """Of the start of a run in `run_dir`. Raises OSError where the id can't be kept."""
    before = obtained(run_dir)
    return Identity(
        run_id(run_dir, environment),
        tracking.project or (before and before.project) or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        tracking.entity or (before and before.entity) or environment.get("WANDB_ENTITY") or None,
        tracking.name or environment.get("WANDB_NAME") or run_dir.name,
        _folder(run_dir, environment),
    )


def keep(run: Any, run_dir: Path, folder: Path, facts: Mapping[str, Any]) -> str:
    """Keep what the client obtained for its run, and return its id: in a sweep it takes the agent's id and project,
    whatever it was asked for. Where they are others than before, none of the rows is delivered there."""
    before = obtained(run_dir)
    entity = run.entity or (before.entity if before is not None else None)  # an offline client does not know its own
    place = None if folder == run_dir else str(folder.absolute())
    now = Obtained(project=run.project, entity=entity or None, folder=place, facts=dict(facts))
    moved = before is not None and (before.project != now.project or (before.entity or entity) != entity)
    if moved:
        (run_dir / "wandb_step").unlink(missing_ok=True)
    if before != now:
        replace(run_dir / "wandb_run.json", now.model_dump_json().encode())
    if run.id != run_id(run_dir, {}):
        log.info(f"W&B's client took the run id {run.id}, as the environment says; it is kept in {run_dir}/wandb_id")
        replace(run_dir / "wandb_id", run.id.encode())
    return str(run.id)


def obtained(run_dir: Path) -> Obtained | None:
    """What an earlier start obtained; None where there is none, or the file is not of this kind."""
    file = run_dir / "wandb_run.json"
    try:
        return Obtained.model_validate(read_json(file)) if file.exists() else None
    except (OSError, ValueError) as error:
        log.warning(f"{file} can't be read ({str(error).splitlines()[0]}); the project is the config's")
        return None


def run_id(run_dir: Path, environment: Mapping[str, str]) -> str:
    """The run's W&B id. It is kept in RUN/wandb_id, so that a resumed run is the same W&B run."""
    path = run_dir / "wandb_id"
    found = path.read_text(errors="replace")[: MAX_ID + 1].strip() if path.is_file() else ""
    if not ID.fullmatch(found):
        if found:
            log.warning(f"{path} holds no W&B id; a new W&B run begins")
        given = environment.get("WANDB_RUN_ID", "")
        if given and not ID.fullmatch(given):
            log.warning(f"WANDB_RUN_ID={json.dumps(given)[:200]} is no W&B id; a new one is made")
        found = given if ID.fullmatch(given) else secrets.token_hex(4)
        replace(path, found.encode())
    return found


def folders_of(run_dir: Path) -> list[Path]:
    """The `wandb` directories with files of the run: its own, and the one that WANDB_DIR said last."""
    before = obtained(run_dir)
    elsewhere = [Path(before.folder) / "wandb"] if before is not None and before.folder else []
    return [folder for folder in (run_dir / "wandb", *elsewhere) if folder.is_dir()]


def _folder(run_dir: Path, environment: Mapping[str, str]) -> Path:
    """RUN, or what WANDB_DIR says. W&B's agent sets it to its working directory: that is nobody's wish."""
    given = environment.get("WANDB_DIR")
    if not given or (environment.get("WANDB_SWEEP_ID") and Path(given) == Path.cwd()):
        return run_dir
    return Path(given).expanduser()


def mode_of(tracking: TrackingConfig, environment: Mapping[str, str]) -> str | None:
    """online, offline or disabled, as config or environment say; None where neither does."""
    if tracking.wandb != "auto":
        return tracking.wandb
    if environment.get("WANDB_DISABLED", "").lower() in YES:
        return "disabled"
    mode = environment.get("WANDB_MODE", "").lower()
    known = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    return known.get(mode)


def share_with_client(identity: Identity) -> None:
    """In a sweep the client obeys the environment alone: let a resumed trial find its own run there."""
    if os.environ.get("WANDB_SWEEP_ID"):
        os.environ.setdefault("WANDB_RUN_ID", identity.id)
        os.environ.setdefault("WANDB_PROJECT", identity.project)
        if identity.entity:
            os.environ.setdefault("WANDB_ENTITY", identity.entity)


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


EVALUATIONS = "evaluations.jsonl"  # in a run directory: a line for each `ebm evaluate`
FRECHET = "frechet/fresh_ratio"  # by which checkpoints of a run are compared


def add_evaluation(run_dir: Path, record: dict[str, Any]) -> None:
    """Append what `ebm evaluate` measured: its step, settings and values. Raises OSError."""
    with open(open_own(run_dir / EVALUATIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as file:
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")


def best_frechet(run_dir: Path) -> tuple[float, int] | None:
    """The lowest Fréchet ratio of fresh chains that a checkpoint of the run reached, and its step: among the
    evaluations with the settings of the newest one. None where there is none."""
    found: list[tuple[Any, float, int]] = []
    try:
        lines = (run_dir / EVALUATIONS).read_bytes()[-MAX_EVALUATIONS:].splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            record = json.loads(line)
            found.append((record["settings"], float(record["values"][FRECHET]), int(record["step"])))
        except (ValueError, TypeError, KeyError, RecursionError):  # torn, of another kind, or without this metric
            continue
    return min(((ratio, step) for settings, ratio, step in found if settings == found[-1][0]), default=None)


def worst_warning(metrics: Path, until: int) -> tuple[float, int]:
    """The largest health/warning of the records up to the step `until`, and its step; (0, 0) without any."""
    rows = rows_between(metrics, 0, until) if metrics.is_file() else iter(())
    return max(((row[WARNING], row["step"]) for row in rows if isinstance(row.get(WARNING), float)), default=(0.0, 0))


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

    def hold(self, name: str, files: list[Path], texts: Mapping[str, str] = MappingProxyType({})) -> Path:
        """Returns a directory with these files, which nobody changes any more, and with `texts` by file name. Raises
        OSError beyond the limit, and if a file is gone."""
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
        for file_name, text in texts.items():
            (directory / file_name).write_text(text)
        return directory

    def release(self) -> None:
        """Remove the held files. Everything is uploaded."""
        shutil.rmtree(self._root, ignore_errors=True)


def newest_samples(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "samples").glob("step_*.png"))[-MAX_SAMPLES:]


def step_of(line: bytes) -> float:
    """Returns the step of a record. It is infinite if the line is none: torn by a crash, or not of our making."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else math.inf
