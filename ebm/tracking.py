"""What a run records: metrics.jsonl, trace.jsonl, sample panels, W&B, progress. For rank 0."""

import json
import logging
import math
import netrc
import os
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Callable
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ebm.config import Config, TrackingConfig
from ebm.figures import grid, side_by_side


class Records:
    """An append-only file of JSON lines, each with its "step". JSON knows no NaN: such a number is the string "NaN",
    "Infinity" or "-Infinity"."""

    def __init__(self, path: Path, keep_until: int):
        """Open `path`; records after step `keep_until`, and a line that a crash left torn, are cut off."""
        if path.exists():
            _cut(path, keep_until)
        self._file = path.open("a")

    def append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, keep_until: int) -> None:
    temporary = path.with_suffix(".tmp")
    with path.open("rb") as lines, temporary.open("wb") as kept:
        kept.writelines(takewhile(lambda line: _step(line) <= keep_until, lines))
        kept.flush()
        os.fsync(kept.fileno())
    if temporary.stat().st_size < path.stat().st_size:
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _step(line: bytes) -> float:
    """The step of a record; infinite where a crash left no whole record."""
    try:
        return json.loads(line.decode())["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class Progress:
    """A bar on a terminal, lines elsewhere: step, rate, time left, loss, AUC."""

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
        print(f"step {step}/{self.total}  {rate:.1f} it/s  left {clock}  {values}", flush=True)

    def write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class WandbRun:
    """The W&B side of a run. Training never waits for it longer than `tracking.wandb_timeout`, and nothing that goes
    wrong here reaches training: the first failure is said, further ones are counted."""

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]):
        self._say, self._timeout, self._failures = say, config.tracking.wandb_timeout, 0
        self._run_dir, self._uploaded = run_dir, True
        self._run, self._wandb, self.mode = None, None, config.tracking.wandb
        if self.mode == "disabled":
            return
        try:
            import wandb  # takes a second: only runs that use it wait for it

            logging.getLogger("wandb").setLevel(logging.ERROR)
            self._wandb, self.mode = wandb, _mode(config.tracking, wandb)
        except Exception as error:  # not installed, or installed beside a package it does not work with
            say(f"W&B can't be used ({_first_line(error)}); metrics.jsonl has everything")
            return
        if self.mode != "disabled":
            self._run = self._start(config, run_dir)

    def _start(self, config: Config, run_dir: Path):
        try:
            return self._init(config, run_dir)
        except Exception as error:  # the client raises many kinds; none may end a training run
            if self.mode == "online":
                self._say(f"W&B can't be reached ({_first_line(error)}); logging offline instead")
                self.mode = "offline"
                self._bounded(self._wandb.teardown)  # its service still holds the run's id for the failed attempt
                return self._start(config, run_dir)
            self._say(f"W&B could not start ({_first_line(error)}); metrics.jsonl has everything")
            return None

    def _init(self, config: Config, run_dir: Path):
        wandb, tracking = self._wandb, config.tracking
        wandb.setup(wandb.Settings(silent=True))
        settings = {"init_timeout": self._timeout, "console": "off", "silent": True}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = 1.0  # seconds; SIGKILL loses what came later
        run = wandb.init(
            dir=run_dir, mode=self.mode, id=_run_id(run_dir), resume="allow", project=tracking.project,
            entity=tracking.entity, name=tracking.name or run_dir.name, group=tracking.group,
            tags=list(tracking.tags) or None, config=config.model_dump(mode="json"),
            settings=wandb.Settings(**settings))  # fmt: skip
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if self.mode == "online":
            self._say(f"W&B: {run.url}")
        return run

    def log(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._try(lambda: self._run.log({"step": step, **values}))

    def log_images(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        if self._run is not None:
            self._try(lambda: self.log(step, {name: self._wandb.Image(p) for name, p in pictures.items()}))

    def log_histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        if self._run is not None:
            self._try(lambda: self.log(step, {name: self._wandb.Histogram(v) for name, v in values.items()}))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                self._say(f"W&B: {_first_line(error)}; training goes on, metrics.jsonl has everything")

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, waiting `wandb_timeout` at most: a server that died would hold it for minutes."""
        if self._run is None:
            return
        ended = self._bounded(lambda: self._end(exit_code))
        if not ended:
            self._say(f"W&B did not finish in {self._timeout:.0f} s")
        if self._failures > 1:
            self._say(f"W&B: {self._failures} calls failed; metrics.jsonl has everything")
        self._uploaded = ended and self.mode == "online"

    def _end(self, exit_code: int) -> None:
        self._run.finish(exit_code)
        self._wandb.teardown(exit_code)  # `finish` may return before the service has written the offline file

    def _bounded(self, action: Callable[[], None]) -> bool:
        """Whether `action` ended within `wandb_timeout`; if not, it goes on in a thread that ends with the process."""
        thread = threading.Thread(target=lambda: self._try(action), daemon=True)
        thread.start()
        thread.join(self._timeout)
        return not thread.is_alive()

    def sync_hint(self) -> str | None:
        """The command that uploads what the finished run could not; the parts of a resumed run join under its id."""
        if self._run is None or self._uploaded:
            return None
        files = "offline-run-*" if self.mode == "offline" else "run-*"
        folder = shlex.quote(str(self._run_dir / "wandb"))
        return f"not uploaded to W&B; to do so: wandb login && wandb sync --id {self._run.id} {folder}/{files}"


def _mode(tracking: TrackingConfig, wandb) -> str:
    """auto: online with a login, else offline; WANDB_MODE decides where it is set."""
    if tracking.wandb != "auto":
        return tracking.wandb
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return "online" if settings.api_key or _in_netrc(settings) else "offline"


def _in_netrc(settings) -> bool:
    """Whether `wandb login` left a key in the netrc file. The client itself would prompt, or ask the server."""
    hosts = [urlparse(settings.base_url).netloc]
    if settings.base_url == type(settings).model_fields["base_url"].default:
        hosts.append("api.wandb.ai")  # the public server, whatever name this version calls it by
    try:
        keys = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return any(keys.authenticators(host) for host in hosts)


def _run_id(run_dir: Path) -> str:
    """The run's W&B id, made once and kept in RUN/wandb_id: a resumed run is the same W&B run."""
    path = run_dir / "wandb_id"
    if not path.exists() or not path.read_text().strip():
        _replace(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Tracker:
    """All that rank 0 records of a run that goes on at `resume_step`."""

    def __init__(self, config: Config, run_dir: Path, resume_step: int):
        self._run_dir = run_dir
        self._progress = Progress(config.train.steps, resume_step)
        self._metrics = Records(run_dir / "metrics.jsonl", resume_step)
        self._trace = Records(run_dir / "trace.jsonl", resume_step) if config.data.trace else None
        self._wandb = WandbRun(config, run_dir, self.say)
        (run_dir / "samples").mkdir(exist_ok=True)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._metrics.append({"step": step, **metrics})
        self._wandb.log(step, metrics)
        self._progress.update(step, metrics)

    def rewind(self, step: int) -> None:
        """Training went back to `step`: the records after it go, so that every step stands once."""
        for name, records in (("metrics", self._metrics), ("trace", self._trace)):
            if records is not None:
                records.close()
                setattr(self, f"_{name}", Records(self._run_dir / f"{name}.jsonl", step))

    def trace(self, step: int, samples: list, chains: list) -> None:
        self._trace.append({"step": step, "samples": samples, "chains": chains})

    def panels(self, step: int, images: dict[str, Tensor]) -> None:
        """Images (N, C, H, W) in [-1, 1] by panel: side by side in samples/step_N.png, each in W&B."""
        pictures = {name: grid(x) for name, x in images.items()}
        file = BytesIO()
        side_by_side(pictures).save(file, format="png")
        _replace(self._run_dir / "samples" / f"step_{step:08d}.png", file.getvalue())
        self._wandb.log_images(step, pictures)

    def histograms(self, step: int, values: dict[str, Tensor]) -> None:
        self._wandb.log_histograms(step, {name: v.float().cpu().numpy() for name, v in values.items()})

    def say(self, text: str) -> None:
        self._progress.write(text)

    def close(self, exit_code: int) -> None:
        self._progress.close()
        self._wandb.finish(exit_code)
        hint = self._wandb.sync_hint()
        if hint:
            print(hint, flush=True)
        for records in (self._metrics, self._trace):
            if records is not None:
                records.close()
