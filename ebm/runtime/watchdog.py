"""The watchdog: a rank that hangs shows where, and the job ends."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable

GRACE = 5.0  # seconds between the stacks and the end, for the other ranks to show theirs


class Watchdog:
    """Within a `with` block, `beat()` must be called at least every `timeout` seconds; else this process writes the
    stack of each of its threads to stderr and ends with exit code 1.

    A rank that waits for one that hangs stops beating at the same step, so every rank shows where it stands.
    Before that, `stalled(seconds)` hears, in another thread, that there was no beat for `stall_after` seconds.
    """

    def __init__(
        self,
        timeout: float,
        rank: int,
        stall_after: float = float("inf"),
        stalled: Callable[[float], None] | None = None,
    ):
        self._timeout, self._rank = timeout, rank
        self._stall_after, self._stalled = stall_after, stalled
        self._beaten, self._ended, self._over = threading.Event(), False, False
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def beat(self) -> None:
        # The thread below needs the interpreter; should a library hang while holding it, this one does not.
        faulthandler.dump_traceback_later(self._timeout + 2 * GRACE, exit=True)
        self._beaten.set()

    def __enter__(self):
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, _, error, __):
        if self._over and error is not None:  # what the wait ended in, such as the address of a host out of reach
            print(f"rank {self._rank}: {error}", file=sys.stderr, flush=True)
        self._ended = True
        self._beaten.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while self._beaten_in_time():
            self._beaten.clear()
            if self._ended:
                return
        self._over = True
        late = f"no step in {self._timeout:.0f} s (train.collective_timeout)"
        print(f"rank {self._rank}: {late}: a rank hangs, or its host is out of reach; the stacks of this one:",
              file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(all_threads=True)
        threading.Event().wait(GRACE)
        os._exit(1)

    def _beaten_in_time(self) -> bool:
        if self._stalled is None or self._stall_after >= self._timeout:
            return self._beaten.wait(self._timeout)
        if self._beaten.wait(self._stall_after):
            return True
        self._stalled(self._stall_after)
        return self._beaten.wait(self._timeout - self._stall_after)
