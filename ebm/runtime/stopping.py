"""How a run ends before its last step: asked to (signals, the file STOP, the time limit, a launcher that died), or by
the watchdog, because it hangs. Then every rank shows its stacks first."""

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from ebm.runtime.process import STOP_SIGNALS, signals_blocked

log = logging.getLogger(__name__)


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


GRACE = 5.0  # seconds between the stacks and the end, for the other ranks to show theirs
TICK = 1.0  # seconds; time is counted in these, so that one in which the process was suspended counts as one

# A second process, for a library that hangs while it holds the interpreter, so that no thread here can run: it ends
# this one if nothing comes through the pipe, which a thread here fills. It does not count the time of a suspension.
GUARD = """
import os, select, signal, sys, time
parent, seconds, late = int(sys.argv[1]), float(sys.argv[2]), 0.0
while late < seconds:
    ready = select.select([0], [], [], 1.0)[0]
    if ready and not os.read(0, 4096):
        sys.exit()
    with open(f"/proc/{parent}/stat") as file:
        stopped = file.read().rpartition(")")[2].split()[0] in "Tt"
    late = 0.0 if ready or stopped else late + 1.0
os.kill(parent, signal.SIGABRT)
time.sleep(float(sys.argv[3]))
os.kill(parent, signal.SIGKILL)
"""


class Watchdog:
    """From the first `with` block to the end of the innermost, `beat()` must be called at least every `timeout`
    seconds; else this process writes the stack of each of its threads to stderr, waits for a beat once more, and ends
    with exit code 1. Time in which the process was suspended (Ctrl-Z, `scontrol suspend`) does not count.

    A rank that waits for one that hangs stops beating at the same step, so every rank shows where it stands.
    """

    def __init__(self, timeout: float, rank: int):
        self._timeout, self._rank = timeout, rank
        self._stall_after = float("inf")
        self._stalled: Callable[[float], None] = lambda seconds: None
        self._beaten, self._ended, self._over = threading.Event(), False, False
        self._thread: threading.Thread | None = None
        self._guard: IO[bytes] | None = None
        self._fed = 0.0  # when the guard last heard of this process

    def beat(self) -> None:
        self._beaten.set()

    def on_stall(self, after: float, stalled: Callable[[float], None]) -> None:
        """Have `stalled(seconds)` called, in another thread, when there was no beat for `after` seconds."""
        self._stalled, self._stall_after = stalled, after

    def __enter__(self) -> Self:
        self.beat()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._guard = _start_guard(self._timeout + 2 * GRACE)
            self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._over and error is not None:  # what the wait ended in, such as the address of a host out of reach
            self._tell(str(error))
        self._ended = True
        self.beat()
        if self._thread is not None:
            self._thread.join()
        if self._guard is not None:
            self._guard.close()

    def _watch(self) -> None:
        while not self._ended:
            if not self._wait(min(self._stall_after, self._timeout)):
                if self._stall_after < self._timeout:
                    self._stalled(self._stall_after)
                if not self._wait(max(0.0, self._timeout - self._stall_after)):
                    self._give_up()
            self._beaten.clear()

    def _wait(self, seconds: float) -> bool:
        """Returns whether there is a beat within `seconds`, not counting time in which this process was suspended."""
        left = seconds
        while left > 0:
            self._feed_guard()
            before = time.monotonic()
            if self._beaten.wait(min(left, TICK)):
                return True
            left -= min(time.monotonic() - before, TICK)
        return self._beaten.is_set()

    def _feed_guard(self) -> None:
        if self._guard is not None and time.monotonic() > self._fed + TICK / 2:
            self._fed = time.monotonic()
            with suppress(OSError):  # the guard was ended, or a full pipe holds word enough
                os.write(self._guard.fileno(), b".")

    def _give_up(self) -> None:
        """Show the stacks, and end the process unless a beat comes after all."""
        self._over = True
        self._tell(
            f"no step in {self._timeout:.0f} s (train.collective_timeout): a rank hangs, or its host is out of reach; "
            "the stacks of this one:"
        )
        with suppress(OSError):
            faulthandler.dump_traceback(file=2, all_threads=True)
        if not self._wait(GRACE):
            os._exit(1)
        self._over = False
        if not self._ended:
            self._tell("goes on: there was a step after all")

    def _tell(self, text: str) -> None:
        with suppress(OSError):  # a log on a full disk, or a closed pipe, must not keep the process from its end
            os.write(2, f"rank {self._rank}: {text}\n".encode())


def _start_guard(seconds: float) -> IO[bytes] | None:
    """Start a guard of this process. Returns the pipe to it, or None if it can't be started."""
    faulthandler.enable(file=2)  # on SIGABRT it writes the stacks, without the interpreter
    command = [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), str(seconds), str(GRACE)]
    try:
        with signals_blocked():  # of the whole job, which a batch system sends; the end of the pipe ends the guard
            guard = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
    except OSError as error:
        log.debug(f"no guard process: {error}")
        return None
    assert guard.stdin is not None
    os.set_blocking(guard.stdin.fileno(), False)
    threading.Thread(target=guard.wait, daemon=True).start()  # leaves no zombie
    return guard.stdin
