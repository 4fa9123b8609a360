"""What a run records: metrics.jsonl, trace.jsonl, sample panels, W&B, alerts, progress; in files that survive a full,
read-only or failing disk. For rank 0."""

import json
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from itertools import accumulate, takewhile
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ebm.config import Config, TrackingConfig
from ebm.errors import ConfigError, UserError
from ebm.inference.images import pictures, side_by_side
from ebm.runtime.files import open_own, replace, sync_directory
from ebm.tracking.delivery import WARNING, step_of
from ebm.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)


class Outage:
    """Logs once that `what` can't be written, and once that it can again."""

    def __init__(self, what: str):
        self._what, self.on = what, False

    def begin(self, error: OSError) -> None:
        if not self.on:
            log.warning(f"{self._what} can't be written ({error.strerror or error}); training goes on and tries again")
        self.on = True

    def end(self, kept: int) -> None:
        if self.on:
            log.info(f"{self._what} can be written again, with {kept} kept back till now")
        self.on = False


class Records:
    """An append-only file of JSON lines, each with its "step". JSON knows no NaN: such a number is the string "NaN",
    "Infinity" or "-Infinity".

    A file that is removed meanwhile begins anew, with what is not on the disk yet.

    A line that can't be written stays in memory, in order, and is tried again with the next one, at `flush` and at
    `close`; the file never keeps a part of it. Lines also stay in memory until `flush` has made them durable: call it
    now and then."""

    def __init__(self, path: Path, keep_until: int):
        """Open `path`. Records after step `keep_until`, and a line that a crash left torn, are cut off."""
        self._path, self._outage = path, Outage(str(path))
        self._file = open_own(path, os.O_RDWR | os.O_CREAT)
        self._end = self._durable = self._cut(keep_until)  # bytes written, and bytes on the disk for good
        sync_directory(path.parent)
        self._lines: list[bytes] = []  # from `_durable` on
        self._written = 0  # how many of these are in the file

    def _cut(self, keep_until: int) -> int:
        with self._path.open("rb") as lines:
            kept = sum(len(line) for line in takewhile(lambda line: step_of(line) <= keep_until, lines))
        os.ftruncate(self._file, kept)
        return kept

    def rewind(self, step: int) -> None:
        """Remove the records after `step`."""
        self._end = self._cut(step)
        self._durable = min(self._durable, self._end)
        self._lines = [line for line in self._lines if step_of(line) <= step]
        ends = accumulate((len(line) for line in self._lines), initial=self._durable)
        self._written = sum(end <= self._end for end in list(ends)[1:])

    @property
    def pending(self) -> int:
        """How many records are in memory only."""
        return len(self._lines) - self._written

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n"
        self._lines.append(line.encode())
        self._write(new=1)

    def flush(self) -> bool:
        """Sync the file. Returns whether every record is on the disk for good."""
        if not self._write():
            return False
        try:
            os.fsync(self._file)
        except OSError as error:
            # The system forgets what it failed to write and reports it once: all since the last fsync is suspect.
            self._end, self._written = self._durable, 0
            self._outage.begin(error)
            return False
        self._durable, self._written = self._end, 0
        self._lines.clear()
        return True

    def close(self) -> None:
        self.flush()
        if self.pending:
            log.warning(f"{self.pending} records are lost: {self._path} could not be written to the end")
        os.close(self._file)

    def _write(self, new: int = 0) -> bool:
        kept_back = self.pending - new
        try:
            if os.fstat(self._file).st_nlink == 0:
                self._begin_anew()
            while self.pending:
                line = self._lines[self._written]
                _write_at(self._file, line, self._end)
                self._end += len(line)
                self._written += 1
        except OSError as error:
            with suppress(OSError):  # the next try writes over what stays
                os.ftruncate(self._file, self._end)
            self._outage.begin(error)
            return False
        self._outage.end(kept_back)
        return True

    def _begin_anew(self) -> None:
        """Go on in a new file. Raises OSError if the directory is gone too."""
        file = open_own(self._path, os.O_RDWR | os.O_CREAT)
        log.warning(f"{self._path} was removed; the records before are lost, and those that follow are in a new file")
        os.close(self._file)
        self._file, self._end, self._durable, self._written = file, 0, 0, 0


class WholeFiles:
    """Files written whole or not at all; what can't be written stays in memory for `retry`."""

    def __init__(self, what: str):
        self._what, self._outage = what, Outage(what)
        self._waiting: dict[Path, bytes] = {}

    def write(self, path: Path, content: bytes) -> None:
        self._waiting[path] = content
        self.retry(new=1)

    def retry(self, new: int = 0) -> None:
        kept_back = len(self._waiting) - new
        try:
            for path in list(self._waiting):
                replace(path, self._waiting[path])
                del self._waiting[path]
        except OSError as error:
            self._outage.begin(error)
        else:
            self._outage.end(kept_back)

    def close(self) -> None:
        self.retry()
        if self._waiting:
            log.warning(f"{self._what}: {len(self._waiting)} files are lost, they could not be written to the end")


def _write_at(file: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):  # a disk that fills up takes a part first, and fails then
        done += os.pwrite(file, content[done:], offset + done)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


HISTORY, MINIMUM, RECENT = 50, 10, 3  # lines of metrics: what the step time is compared with, and what is


class Alerts:
    """Judges the lines of metrics and hears of events; each title goes out once in `tracking.alert_every` seconds.

    `send(title, text, level)` uploads. May be called from any thread."""

    def __init__(self, tracking: TrackingConfig, send: Callable[[str, str, str], None]):
        self._tracking, self._send = tracking, send
        self._sent: dict[str, float] = {}  # when, by title
        self._seconds: deque[float] = deque(maxlen=HISTORY + RECENT)
        self._lock = threading.Lock()

    def event(self, title: str, text: str, level: str = "WARN") -> bool:
        """Send an alert on something that is logged already. Returns whether it was sent: the same title is not sent
        again within `tracking.alert_every`."""
        now, every = time.monotonic(), self._tracking.alert_every
        with self._lock:
            if not self._tracking.alerts or now - self._sent.get(title, -math.inf) < every:
                return False
            self._sent[title] = now
        self._send(title, text, level)
        return True

    def read(self, step: int, metrics: dict[str, float]) -> None:
        """Judge a line of metrics."""
        warning = metrics.get(WARNING, 0.0)
        if warning >= 1:
            self._tell("training may diverge", f"step {step}: {WARNING} {warning:.3g} (1 and above is bad)")
        if "perf/step_s" not in metrics:
            return
        self._seconds.append(metrics["perf/step_s"])
        before, now = list(self._seconds)[:-RECENT], list(self._seconds)[-RECENT:]
        # A few lines together: one alone may hold a sample panel or a checkpoint.
        if len(before) >= MINIMUM and min(now) > self._tracking.slow_factor * median(before):
            times = median(now) / median(before)
            self._tell("steps are slow", f"step {step}: {median(now):.3g} s a step, {times:.1f} times the usual")

    def stalled(self, step: int, seconds: float) -> None:
        """Tell that there was no step for `seconds`."""
        self._tell("no step", f"no step in {seconds:.0f} s, the last line of metrics is step {step}'s", "ERROR")

    def _tell(self, title: str, text: str, level: str = "WARN") -> None:
        if self.event(title, text, level):
            log.warning(f"{title}: {text}")


class TensorBoard:
    """RUN/tensorboard: the same metrics, panels and histograms as event files, by torch's writer. (Accelerate's tracker
    is the same writer without what a resumed run needs: events after the step that it goes on from are hidden.)

    What goes wrong after the start is logged once, and training goes on without it."""

    def __init__(self, folder: Path, resume_step: int):
        """Raises ConfigError where the package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"tracking.tensorboard=true needs the package tensorboard ({error}): pip install tensorboard, or "
                "pip install 'ebm[tensorboard]'; or set tracking.tensorboard=false"
            ) from error
        self._begin: Callable[..., Any] = partial(SummaryWriter, str(folder))
        self._writer: Any = None
        self._failed = False
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Hide what was written after `step`."""
        self.close()
        with self._guarded():
            self._writer = self._begin(purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._guarded():
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        with self._guarded():
            for key, picture in pictures.items():
                self._writer.add_image(key, picture, step, dataformats="HWC")

    def histograms(self, step: int, values: Mapping[str, np.ndarray]) -> None:
        with self._guarded():
            for key, value in values.items():
                if np.isfinite(value).all():  # it has no bins for others
                    self._writer.add_histogram(key, value, step)

    def close(self) -> None:
        with self._guarded():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of many kinds, a full disk's among them, and none may reach training
            if not self._failed:  # later calls end here, too: there is no writer any more
                log.warning(f"TensorBoard: {error}; training goes on without it, metrics.jsonl has everything")
            self._failed, self._writer = True, None


class Progress:
    """Shows step, rate, time left, loss, gap, AUC and the worst sign of divergence, each with three significant digits,
    as a bar on a terminal and as lines of the log elsewhere."""

    def __init__(self, total_steps: int, first_step: int):
        self.total, self._first, self._started = total_steps, first_step, time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if on_terminal else None

    def update(self, step: int, metrics: dict[str, float]) -> None:
        keys = ("train/loss", "energy/gap", "energy/auc", "health/warning")
        shown = {key.partition("/")[2]: f"{metrics[key]:.3g}" for key in keys if key in metrics}
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(shown)
            return
        rate = (step - self._first) / (time.monotonic() - self._started)
        left = int((self.total - step) / rate) if rate else 0
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        speed = f"{rate:.3g} it/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s/step"
        log.info(f"step {step}/{self.total}  {speed}  left {clock}  {'  '.join(map(' '.join, shown.items()))}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Tracker:
    """All that rank 0 records of a run that goes on at `resume_step`. Only the start raises (UserError): a disk that is
    full, read-only or failing later on is logged, and tried again, while training goes on."""

    def __init__(self, config: Config, run_dir: Path, resume_step: int, facts: Mapping[str, Any] | None = None):
        """`facts`: see WandbRun. Raises UserError, also where tracking.tensorboard can't be had."""
        self._samples_dir = run_dir / "samples"
        self._progress = Progress(config.train.steps, resume_step)
        try:
            self._samples_dir.mkdir(exist_ok=True)
            self._metrics = Records(run_dir / "metrics.jsonl", resume_step)
            self._trace = Records(run_dir / "trace.jsonl", resume_step) if config.data.trace else None
        except OSError as error:
            raise UserError(
                f"run.dir={run_dir}: {error}; free some space or make it writable, then run the same command again"
            ) from error
        self._records = [self._metrics] if self._trace is None else [self._metrics, self._trace]
        self._samples = WholeFiles(str(self._samples_dir))
        self._board = TensorBoard(run_dir / "tensorboard", resume_step) if config.tracking.tensorboard else None
        self._wandb = WandbRun(config, run_dir, resume_step, facts)
        self._last: dict[str, Any] = {}  # line of metrics
        self._alerts, self._step = Alerts(config.tracking, self._wandb.alert), resume_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._step, self._last = step, {"step": step, **metrics}
        self._metrics.append(self._last)
        self._wandb.log(step, metrics)
        if self._board is not None:
            self._board.log(step, metrics)
        self._progress.update(step, metrics)
        self._alerts.read(step, metrics)

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Send an alert on something that is logged already. `level`: INFO, WARN or ERROR."""
        self._alerts.event(title, text, level)

    def stalled(self, seconds: float) -> None:
        """Tell that there was no step for `seconds`. May be called from any thread."""
        self._alerts.stalled(self._step, seconds)

    def checkpoint(self, path: Path) -> None:
        """Upload a checkpoint that became final as an artifact, if `tracking.artifacts` says so."""
        self._wandb.log_checkpoint(path, self._last)

    def rewind(self, step: int) -> None:
        """Training went back to `step`: the records after it go, so that every step stands once."""
        for records in self._records:
            records.rewind(step)
        self._wandb.rewind(step)
        if self._board is not None:
            self._board.rewind(step)

    def trace(self, step: int, samples: list[Any], chains: list[Any]) -> None:
        assert self._trace is not None, "data.trace=false"
        self._trace.append({"step": step, "samples": samples, "chains": chains})

    def panels(
        self,
        step: int,
        samples: dict[str, Tensor],
        captions: Mapping[str, str] = MappingProxyType({}),
        further: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Images (N, C, H, W) in [-1, 1] or vectors (N, D), by panel: all in samples/step_N.png, each in W&B with its
        caption. `further` panels, such as those of single classes, are in W&B alone."""
        panels = pictures(samples)
        file = BytesIO()
        side_by_side(panels).save(file, format="png")
        self._samples.write(self._samples_dir / f"step_{step:08d}.png", file.getvalue())
        shown = panels | (pictures(dict(further)) if further else {})
        self._wandb.log_images(step, shown, captions)
        if self._board is not None:
            self._board.images(step, shown)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        arrays = {name: v.float().cpu().numpy() for name, v in values.items()}
        self._wandb.log_histograms(step, arrays)
        if self._board is not None:
            self._board.histograms(step, arrays)

    def flush(self) -> bool:
        """Sync the records. Returns whether all of them are on the disk for good. Call it before a checkpoint becomes
        final, since a run resumed from it does not write the records before it again. Pictures are tried again, but
        hold no checkpoint back."""
        self._samples.retry()
        return all([records.flush() for records in self._records])

    @property
    def pending(self) -> int:
        """How many records are in memory only; after `close`, how many are lost."""
        return sum(records.pending for records in self._records)

    def close(self, exit_code: int) -> None:
        self._progress.close()
        files: list[Records | WholeFiles] = [*self._records, self._samples]
        for file in files:  # before W&B, which may take its time
            file.close()
        if self._board is not None:
            self._board.close()
        self._wandb.finish(exit_code)
        hint = self._wandb.sync_hint()
        if hint:
            log.info(hint)
