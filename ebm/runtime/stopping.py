"""Requests to stop: signals, the file STOP, the time limit, a launcher that died."""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ebm.runtime.process import STOP_SIGNALS


class StopRequest:
    """Remembers that a stop was asked for; the training loop asks between steps. A second SIGINT ends at once.

    `stop_file`: only rank 0 looks for it, and the others hear of it by the vote of the ranks: a thousand ranks that ask
    a shared file system at every step would keep it busy. None on these."""

    def __init__(self, stop_file: Path | None, time_limit: float | None, started: float):
        self.reason: str | None = None
        self._stop_file, self._deadline = stop_file, None if time_limit is None else started + time_limit
        # A launcher that is killed leaves its ranks running (accelerate and torchrun alike): notice it.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ or "RANK" in os.environ else None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the end of the terminal is nothing to this run
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def asked(self) -> str | None:
        """Why this process wants to stop, or None."""
        if self.reason is None:
            if self._stop_file is not None and self._stop_file.exists():
                self.reason = f"{self._stop_file} exists"
            elif self._deadline is not None and time.monotonic() > self._deadline:
                self.reason = "train.time_limit is over"
            elif self._launcher is not None and os.getppid() != self._launcher:
                self.reason = "the launcher died"
        return self.reason
