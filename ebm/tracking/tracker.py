"""What a run records: metrics.jsonl, trace.jsonl, sample panels, W&B, alerts, progress. For rank 0."""

import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ebm.config import Config, TrackingConfig
from ebm.errors import UserError
from ebm.inference.pictures import pictures, side_by_side
from ebm.tracking.records import Records, WholeFiles
from ebm.tracking.wandb_run import WandbRun

log = logging.getLogger(__name__)

WARNING = "health/warning"  # the ladder's worst sign, as a share of its limit
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


class Progress:
    """Shows step, rate, time left, loss and AUC, as a bar on a terminal and as lines of the log elsewhere."""

    def __init__(self, total_steps: int, first_step: int):
        self.total, self._first, self._started = total_steps, first_step, time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step") if on_terminal else None

    def update(self, step: int, metrics: dict[str, float]) -> None:
        shown = {name: metrics[f"{group}/{name}"] for group, name in (("train", "loss"), ("energy", "gap"),
                 ("energy", "auc")) if f"{group}/{name}" in metrics}  # fmt: skip
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
            return
        rate = (step - self._first) / (time.monotonic() - self._started)
        left = int((self.total - step) / rate) if rate else 0
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        values = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        log.info(f"step {step}/{self.total}  {rate:.1f} it/s  left {clock}  {values}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Tracker:
    """All that rank 0 records of a run that goes on at `resume_step`. Only the start raises (UserError): a disk that is
    full, read-only or failing later on is logged, and tried again, while training goes on."""

    def __init__(self, config: Config, run_dir: Path, resume_step: int):
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
        self._wandb = WandbRun(config, run_dir, resume_step)
        self._alerts, self._step = Alerts(config.tracking, self._wandb.alert), resume_step

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._step = step
        self._metrics.append({"step": step, **metrics})
        self._wandb.log(step, metrics)
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
        self._wandb.log_checkpoint(path)

    def rewind(self, step: int) -> None:
        """Training went back to `step`: the records after it go, so that every step stands once."""
        for records in self._records:
            records.rewind(step)
        self._wandb.rewind(step)

    def trace(self, step: int, samples: list[Any], chains: list[Any]) -> None:
        assert self._trace is not None, "data.trace=false"
        self._trace.append({"step": step, "samples": samples, "chains": chains})

    def panels(self, step: int, samples: dict[str, Tensor]) -> None:
        """Images (N, C, H, W) in [-1, 1] or vectors (N, D), by panel: all in samples/step_N.png, each in W&B."""
        panels = pictures(samples)
        file = BytesIO()
        side_by_side(panels).save(file, format="png")
        self._samples.write(self._samples_dir / f"step_{step:08d}.png", file.getvalue())
        self._wandb.log_images(step, panels)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        self._wandb.log_histograms(step, {name: v.float().cpu().numpy() for name, v in values.items()})

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
        self._wandb.finish(exit_code)
        hint = self._wandb.sync_hint()
        if hint:
            log.info(hint)
