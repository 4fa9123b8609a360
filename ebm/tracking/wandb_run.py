"""A run's client of W&B, which works in a thread of its own."""

import errno
import json
import logging
import math
import netrc
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlparse

import numpy as np

from ebm.config import Config, TrackingConfig
from ebm.errors import EXIT_STOPPED, ConfigError
from ebm.runtime import checkpoint
from ebm.tracking import delivery
from ebm.tracking.delivery import (
    CLOSED,
    WARNING,
    Artifacts,
    Handed,
    best_frechet,
    newest_samples,
    number_part,
    rows_between,
    worst_warning,
)

log = logging.getLogger(__name__)

# What may wait for W&B; beyond it, calls are left out there. Pictures and histograms may take half of it, and so are
# the first to be left out.
MAX_WAITING, MAX_BYTES = 10_000, 256 << 20
BYTES_A_VALUE = 200  # of a row
# What W&B shows of a metric beside its curve, and compares runs by.
SUMMARIES = {
    "health/warning": "max,last",
    "energy/auc": "min,max,last",
    "fresh/spread": "min,last",
    "fresh/auc": "min,max,last",
    "heldout/auc": "max,last",
    "perf/step_s": "mean,last",
    "perf/images_per_s": "mean,last",
    "perf/gpu_memory_gb": "max,last",
    "perf/mfu": "mean,last",
    "frechet/fresh_ratio": "min,last",
    "frechet/persistent_ratio": "min,last",
}
UNSAFE = {"offline": 10.0, "online": 60.0}  # seconds a row is with the client before it is on the disk, or uploaded


class WandbRun:
    """Training never waits for W&B before its end, and nothing that goes wrong here reaches training: the first
    failure is logged, further ones are counted.

    A thread starts the client and makes its calls, in order: the start takes `tracking.wandb_timeout` where the server
    does not answer, and a call may block for ever where the client's service process stalls.

    A run that is resumed goes on as the same W&B run, and hands over the rows that earlier starts did not deliver."""

    def __init__(self, config: Config, run_dir: Path, resume_step: int, facts: Mapping[str, Any] | None = None):
        """`facts`: what the run's W&B config has beside the config, such as devices and the size of the network."""
        self._config, self._run_dir, self._resume_step, self._facts = config, run_dir, resume_step, facts
        self._worst, self._worst_step = 0.0, 0  # health/warning so far, and its step
        self._log_level = logging.WARNING
        self._folder = run_dir / "wandb"  # of the client's files
        self._timeout = config.tracking.wandb_timeout
        self._artifacts = Artifacts(run_dir, config.tracking.artifacts_gb)
        self._failures = self._left_out = 0
        self._run: Any = None  # W&B's, which has no types
        self._wandb: Any = None
        self._handed: Handed | None = None  # there is one once the client has started
        self._thread: threading.Thread | None = None
        self.mode: str = config.tracking.wandb
        self._calls: SimpleQueue[tuple[Callable[[], None] | None, int]] = SimpleQueue()
        self._bytes, self._bytes_lock = 0, threading.Lock()  # of the arguments of calls in the queue
        self._rows_left_out: SimpleQueue[int] = SimpleQueue()
        self._started, self._uploaded = threading.Event(), False
        if self.mode == "disabled":
            return
        # Its telemetry would hold the exit of the process for 20 s where the server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            # Panels are drawn by it. A first import after the start makes the client call its service, and may block.
            import torchvision  # noqa: F401
            import wandb  # takes a second: only runs that use it wait for it

            logging.getLogger("wandb").setLevel(logging.ERROR)
            self._wandb, self.mode = wandb, _mode(config.tracking, wandb)
        except Exception as error:  # not installed, or installed beside a package it does not work with
            log.warning(f"W&B can't be used ({_first_line(error)}); metrics.jsonl has everything")
            return
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        self._run = self._start()
        self._started.set()
        call: Callable[[], None] | None = self._catch_up
        size = 0
        while call is not None:
            if self._run is not None:
                self._try(call)
            if self._run is not None and self.mode == "offline" and time.monotonic() > self._part_ends:
                self._try(self._new_part)
            with self._bytes_lock:
                self._bytes -= size
            call, size = self._calls.get()

    def _start(self) -> Any:
        try:
            return self._init()
        except Exception as error:  # the client raises many kinds; none may end a training run
            if self.mode == "online":
                self._tell(f"W&B can't be reached ({_first_line(error)}); logging offline instead")
                self.mode = "offline"
                self._bounded(self._wandb.teardown, self._timeout)  # its service still holds the failed attempt's id
                return self._start()
            self._tell(f"W&B could not start ({_first_line(error)}); metrics.jsonl has everything")
            return None

    def _init(self) -> Any:
        wandb, tracking = self._wandb, self._config.tracking
        delivery.share_with_client(delivery.asked_for(tracking, self._run_dir, os.environ))
        wandb.setup(wandb.Settings(silent=True))
        console = "wrap" if tracking.console else "off"
        settings = {"init_timeout": self._timeout, "console": console, "silent": True}
        settings["x_transaction_log_flush_interval"] = 1.0  # seconds; SIGKILL loses what came later
        asked = delivery.asked_for(tracking, self._run_dir, os.environ)
        asked.folder.mkdir(parents=True, exist_ok=True)
        config = self._config.model_dump(mode="json")
        facts = self._facts
        if facts is None:  # those of the last training
            before = delivery.obtained(self._run_dir)
            facts = {} if before is None else before.facts
        config["environment"] = dict(facts)
        run = wandb.init(
            dir=asked.folder, mode=self.mode, id=asked.id, resume="allow", project=asked.project, entity=asked.entity,
            name=asked.name, group=tracking.group, tags=list(tracking.tags) or None, notes=tracking.notes,
            job_type=tracking.job_type, config=config, settings=wandb.Settings(**settings))  # fmt: skip
        if self.mode == "offline":
            number_part(Path(run.dir).parent)
        else:
            log.info(f"W&B: {run.url}")
        if self._resume_step:
            run.config.update(config, allow_val_change=True)  # what train.extend changed
        obtained, self._folder = delivery.keep(run, self._run_dir, asked.folder, facts), asked.folder / "wandb"
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        for key, summary in SUMMARIES.items():
            run.define_metric(key, step_metric="step", summary=summary)
        if self._handed is None:
            self._handed = Handed(self._run_dir, obtained, UNSAFE[self.mode])
        self._part_ends = time.monotonic() + tracking.offline_part
        self._summarise_before(run)
        return run

    def _summarise_before(self, run: Any) -> None:
        """The summaries of what came before this start, or this part of an offline run: W&B takes a part's for the
        whole run's."""
        if not self._worst:
            self._worst, self._worst_step = worst_warning(self._run_dir / "metrics.jsonl", self._resume_step)
        if self._worst:
            run.summary.update({"worst/warning": self._worst, "worst/step": self._worst_step})
        best = best_frechet(self._run_dir)
        if best is not None:
            run.summary.update({"best/frechet_ratio": best[0], "best/step": best[1]})

    def _catch_up(self) -> None:
        """Hand over the rows before this start that no earlier one delivered."""
        handed = self._delivered
        for row in rows_between(self._run_dir / "metrics.jsonl", handed.first_lacking, self._resume_step):
            if handed.lacks(row["step"]):
                self._try(partial(self._log_row, row))

    def _new_part(self) -> None:
        """Close the offline file, which can be uploaded then, and go on in another."""
        self._part_ends += self._config.tracking.offline_part  # where this fails, it is not tried at every call
        self._close_part(EXIT_STOPPED)
        self._run = self._start()

    def _close_part(self, exit_code: int) -> None:
        if exit_code == EXIT_STOPPED:
            self._run.mark_preempting()  # there it counts as preempted till it goes on, not as failed
        self._run.finish(exit_code)
        self._note_left_out()
        self._delivered.all_safe()
        if self.mode == "offline":
            (Path(self._run.dir).parent / CLOSED).touch()

    def log(self, step: int, values: dict[str, Any]) -> None:
        if not self._call(lambda: self._log_row({"step": step, **values}), BYTES_A_VALUE * (len(values) + 1)):
            self._rows_left_out.put(step)

    def rewind(self, step: int) -> None:
        """Training went back to `step`; W&B keeps what it has, and of a step that comes again the last row counts."""
        self._call(lambda: self._delivered.rewind(step))

    def log_images(self, step: int, pictures: dict[str, np.ndarray], captions: Mapping[str, str]) -> None:
        def call() -> None:
            images = {key: self._wandb.Image(p, caption=captions.get(key)) for key, p in pictures.items()}
            self._log({"step": step} | images)

        self._call(call, sum(picture.nbytes for picture in pictures.values()), MAX_BYTES // 2)

    def log_histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        size = sum(value.nbytes for value in values.values())
        call = lambda: self._log({"step": step} | {k: self._wandb.Histogram(v) for k, v in values.items()})  # noqa: E731
        self._call(call, size, MAX_BYTES // 2)

    def alert(self, title: str, text: str, level: str) -> None:
        every = self._config.tracking.alert_every
        self._call(lambda: self._run.alert(title, text, level, wait_duration=every))

    def log_checkpoint(self, path: Path, metrics: Mapping[str, Any]) -> None:
        """Upload a checkpoint that is final as an artifact, and its averaged weights with config and `metrics` as a
        model, if `tracking.artifacts` says so."""
        wanted, last = self._config.tracking.artifacts, path.name == f"step_{self._config.train.steps:08d}"
        if wanted == "all" or (wanted == "final" and last):
            self._call(lambda: self._log_artifact("checkpoint", path.name, sorted(path.iterdir())))
            self._call(lambda: self._log_model(path, metrics, ["latest"]))
        if wanted != "none" and last:
            self._call(lambda: self._log_artifact("samples", "samples", newest_samples(self._run_dir)))

    def log_evaluation(self, path: Path, values: Mapping[str, Any]) -> None:
        """What `ebm evaluate` measured of the checkpoint `path`: a row at its step, the best so far as a summary, and
        the model, if `tracking.artifacts` says that the run's are uploaded."""
        step, best = checkpoint.step_of(path), best_frechet(self._run_dir)
        self._call(lambda: self._log({"step": step, **values}), BYTES_A_VALUE * (len(values) + 1))
        if self._config.tracking.artifacts != "none":
            newest = max(map(checkpoint.step_of, checkpoint.checkpoints(path.parent)), default=step)
            aliases = ["latest"] * (step == newest) + ["best"] * (best is not None and best[1] == step)
            self._call(lambda: self._log_model(path, {"step": step, **values}, aliases))

    def _log_artifact(self, kind: str, name: str, files: list[Path]) -> None:
        if not files:
            return
        artifact = self._wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        artifact.add_dir(str(self._artifacts.hold(name, files)), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", name])

    def _log_model(self, path: Path, metrics: Mapping[str, Any], aliases: list[str]) -> None:
        """The averaged weights of a checkpoint, the run's config, and metrics, as an artifact of the type model."""
        sound = {key: value for key, value in metrics.items() if not isinstance(value, float) or math.isfinite(value)}
        files = [path / "ema.safetensors", self._run_dir / "config.yaml"]
        held = self._artifacts.hold(f"model_{path.name}", files, {"metrics.json": json.dumps(sound, indent=1)})
        artifact = self._wandb.Artifact(f"model-{self._run.id}", type="model", metadata=sound)
        artifact.add_dir(str(held), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=[*aliases, path.name])

    def _call(self, call: Callable[[], None], size: int = 0, most: int = MAX_BYTES) -> bool:
        """Queue a call that holds `size` bytes, unless more than `most` would wait then. Returns whether it is
        queued."""
        if self._thread is None:
            return True
        with self._bytes_lock:
            fits = self._bytes + size <= most and self._calls.qsize() < MAX_WAITING
            self._bytes += size if fits else 0
        if fits:
            self._calls.put((call, size))
            return True
        self._left_out += 1
        if self._left_out == 1:
            self._tell("W&B does not keep up: some of what comes is left out there; metrics.jsonl has everything")
        return False

    @property
    def _delivered(self) -> Handed:
        assert self._handed is not None
        return self._handed

    def _note_left_out(self) -> None:
        while not self._rows_left_out.empty():
            self._delivered.miss(self._rows_left_out.get())

    def _log_row(self, row: dict[str, Any]) -> None:
        self._note_left_out()
        try:
            self._log(row)
        except Exception:
            self._delivered.miss(row["step"])
            raise
        self._delivered.note(row["step"])
        if row.get(WARNING, 0.0) > self._worst:
            self._worst, self._worst_step = row[WARNING], row["step"]
            self._run.summary.update({"worst/warning": self._worst, "worst/step": self._worst_step})

    def _log(self, row: dict[str, Any]) -> None:
        self._run.log(row)
        if shutil.disk_usage(self._folder).free < 2**16:  # its service loses data without a word
            raise OSError(errno.ENOSPC, "no space left for its files", str(self._folder))

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # of many kinds, and none may reach training
            self._failures += 1
            if self._failures == 1:
                self._tell(f"W&B: {_first_line(error)}; training goes on, metrics.jsonl has everything")

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, waiting `wandb_timeout` at most (and as long again for a start that is still under way):
        a server that died would hold it for minutes."""
        if self._thread is None:
            return
        self._started.wait(self._timeout)
        self._calls.put((lambda: self._finish(exit_code), 0))
        self._calls.put((None, 0))
        self._thread.join(self._timeout)
        ended = not self._thread.is_alive()
        if not ended:
            self._tell(f"W&B did not finish in {self._timeout:.0f} s")
        if self._failures > 1 or self._left_out:
            self._tell(f"W&B: {self._failures} calls failed, {self._left_out} left out; metrics.jsonl has everything")
        self._log_level = logging.DEBUG  # what the client still has to say is about its end
        # After `finish` the service may still be writing. And where nothing ended, the client's own exit hook, which
        # this takes away, would wait for it without bound.
        self._bounded(lambda: self._wandb.teardown(exit_code), self._timeout if ended else 1.0)

    def _tell(self, text: str) -> None:
        log.log(self._log_level, text)

    def _finish(self, exit_code: int) -> None:
        self._part_ends = math.inf
        self._close_part(exit_code)
        self._uploaded = self.mode == "online"
        if self._uploaded:
            self._artifacts.release()

    def _bounded(self, action: Callable[[], None], seconds: float) -> None:
        """Wait for `action` that long; then it goes on in a thread that ends with the process."""
        thread = threading.Thread(target=lambda: self._try(action), daemon=True)
        thread.start()
        thread.join(seconds)

    def sync_hint(self) -> str | None:
        """Returns the command that uploads what the finished run could not, or None."""
        if self._run is None or self._uploaded:
            return None
        command = f"python -m ebm sync {shlex.quote(str(self._run_dir))}"
        if self.mode == "online":  # what the service did not get to
            files = f"{shlex.quote(str(self._folder))}/run-*-{self._run.id}"
            command = f"wandb sync --include-online {files}"
        return f"not uploaded to W&B; to do so: wandb login && {command}"


def send_evaluation(config: Config, run_dir: Path, path: Path, values: Mapping[str, Any], last_step: int) -> str:
    """Send what `ebm evaluate` measured of the checkpoint `path` to the run's W&B run, or into an offline part of it.
    Returns what to tell the user. Nobody may train the run meanwhile. Raises ConfigError where it has no W&B run.

    `last_step`: of the run's metrics.
    """
    run = WandbRun(config, run_dir, last_step)
    if run.mode == "disabled":
        raise ConfigError(
            "--log: the run has no W&B (tracking.wandb=disabled, or the environment says so); set tracking.wandb in "
            f"{run_dir}/config.yaml to auto, online or offline"
        )
    run.log_evaluation(path, {key: value for key, value in values.items() if not isinstance(value, str)})
    run.finish(0 if (run_dir / "DONE").exists() else EXIT_STOPPED)
    return run.sync_hint() or f"logged to W&B, at step {checkpoint.step_of(path)}"


def mode_here(tracking: TrackingConfig) -> str:
    """Returns the mode that a run would have here; or, where W&B can't be used, why."""
    try:
        import wandb

        return _mode(tracking, wandb)
    except Exception as error:  # not installed, or installed beside a package it does not work with
        return f"can't be used ({_first_line(error)})"


def _mode(tracking: TrackingConfig, wandb: Any) -> str:
    """Returns the mode: what config or environment say, else online with a login, and offline without."""
    if (mode := delivery.mode_of(tracking, os.environ)) is not None:
        return mode
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return "online" if settings.api_key or _in_netrc(settings) else "offline"


def _in_netrc(settings: Any) -> bool:
    """Whether `wandb login` left a key in the netrc file. The client itself would prompt, or ask the server."""
    hosts = [urlparse(settings.base_url).netloc]
    if settings.base_url == type(settings).model_fields["base_url"].default:
        hosts.append("api.wandb.ai")  # the public server, whatever name this version calls it by
    try:
        keys = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: a user without a home directory
        return False
    return any(keys.authenticators(host) for host in hosts)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
