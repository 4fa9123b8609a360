"""The W&B side of a run, in a thread of its own."""

import errno
import logging
import netrc
import os
import secrets
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlparse

import numpy as np

from ebm.config import Config, TrackingConfig
from ebm.tracking.records import replace

MAX_WAITING = 10_000  # calls; W&B is given up on here, not memory


class WandbRun:
    """Training never waits for W&B before its end, and nothing that goes wrong here reaches training: the first
    failure is said, further ones are counted.

    A thread starts the client and makes its calls, in order: the start takes `tracking.wandb_timeout` where the server
    does not answer, and a call may block for ever where the client's service process stalls."""

    def __init__(self, config: Config, run_dir: Path, say: Callable[[str], None]):
        self._say, self._timeout, self._run_dir = say, config.tracking.wandb_timeout, run_dir
        self._failures = self._left_out = 0
        self._run, self._wandb, self._thread, self.mode = None, None, None, config.tracking.wandb
        self._calls, self._started, self._uploaded = SimpleQueue(), threading.Event(), False
        if self.mode == "disabled":
            return
        # Its telemetry would hold the exit of the process for 20 s where the server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb  # takes a second: only runs that use it wait for it

            logging.getLogger("wandb").setLevel(logging.ERROR)
            self._wandb, self.mode = wandb, _mode(config.tracking, wandb)
        except Exception as error:  # not installed, or installed beside a package it does not work with
            say(f"W&B can't be used ({_first_line(error)}); metrics.jsonl has everything")
            return
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, args=(config,), daemon=True)
            self._thread.start()

    def _work(self, config: Config) -> None:
        self._run = self._start(config)
        self._started.set()
        while (call := self._calls.get()) is not None:
            if self._run is not None:
                self._try(call)

    def _start(self, config: Config):
        try:
            return self._init(config)
        except Exception as error:  # the client raises many kinds; none may end a training run
            if self.mode == "online":
                self._say(f"W&B can't be reached ({_first_line(error)}); logging offline instead")
                self.mode = "offline"
                self._bounded(self._wandb.teardown, self._timeout)  # its service still holds the failed attempt's id
                return self._start(config)
            self._say(f"W&B could not start ({_first_line(error)}); metrics.jsonl has everything")
            return None

    def _init(self, config: Config):
        wandb, tracking = self._wandb, config.tracking
        wandb.setup(wandb.Settings(silent=True))
        settings = {"init_timeout": self._timeout, "console": "off", "silent": True}
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = 1.0  # seconds; SIGKILL loses what came later
        run = wandb.init(
            dir=self._run_dir, mode=self.mode, id=_run_id(self._run_dir), resume="allow", project=tracking.project,
            entity=tracking.entity, name=tracking.name or self._run_dir.name, group=tracking.group,
            tags=list(tracking.tags) or None, config=config.model_dump(mode="json"),
            settings=wandb.Settings(**settings))  # fmt: skip
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        if self.mode == "online":
            self._say(f"W&B: {run.url}")
        return run

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._call(lambda: self._log(step, values))

    def log_images(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        self._call(lambda: self._log(step, {name: self._wandb.Image(p) for name, p in pictures.items()}))

    def log_histograms(self, step: int, values: dict[str, np.ndarray]) -> None:
        self._call(lambda: self._log(step, {name: self._wandb.Histogram(v) for name, v in values.items()}))

    def _call(self, call: Callable[[], None]) -> None:
        if self._thread is None:
            return
        if self._calls.qsize() < MAX_WAITING:
            self._calls.put(call)
            return
        self._left_out += 1
        if self._left_out == 1:
            self._say("W&B does not keep up: what comes now is left out there; metrics.jsonl has everything")

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})
        if shutil.disk_usage(self._run_dir / "wandb").free < 2**16:  # its service loses data without a word
            raise OSError(errno.ENOSPC, "no space left for its files", str(self._run_dir / "wandb"))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._failures += 1
            if self._failures == 1:
                self._say(f"W&B: {_first_line(error)}; training goes on, metrics.jsonl has everything")

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, waiting `wandb_timeout` at most (and as long again for a start that is still under way):
        a server that died would hold it for minutes."""
        if self._thread is None:
            return
        self._started.wait(self._timeout)
        self._calls.put(lambda: self._finish(exit_code))
        self._calls.put(None)
        self._thread.join(self._timeout)
        ended = not self._thread.is_alive()
        if not ended:
            self._say(f"W&B did not finish in {self._timeout:.0f} s")
        if self._failures > 1 or self._left_out:
            self._say(f"W&B: {self._failures} calls failed, {self._left_out} left out; metrics.jsonl has everything")
        self._say = lambda text: None  # what the client still has to say is about its end
        # After `finish` the service may still be writing. And where nothing ended, the client's own exit hook, which
        # this takes away, would wait for it without bound.
        self._bounded(lambda: self._wandb.teardown(exit_code), self._timeout if ended else 1.0)

    def _finish(self, exit_code: int) -> None:
        self._run.finish(exit_code)
        self._uploaded = self.mode == "online"

    def _bounded(self, action: Callable[[], None], seconds: float) -> None:
        """Wait for `action` that long; then it goes on in a thread that ends with the process."""
        thread = threading.Thread(target=lambda: self._try(action), daemon=True)
        thread.start()
        thread.join(seconds)

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
        replace(path, secrets.token_hex(4).encode())
    return path.read_text().strip()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
