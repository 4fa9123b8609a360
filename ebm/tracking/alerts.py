"""What deserves somebody's attention: divergence, stalls, the end of a run that failed."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import median

from ebm.config import TrackingConfig

WARNING = "health/warning"  # the ladder's worst sign, as a share of its limit
HISTORY, MINIMUM, RECENT = 50, 10, 3  # lines of metrics: what the step time is compared with, and what is


class Alerts:
    """Judges the lines of metrics and hears of events; each title goes out once in `tracking.alert_every` seconds.

    `send(title, text, level)` uploads; `say(text)` is the log's. May be called from any thread."""

    def __init__(self, tracking: TrackingConfig, send: Callable[[str, str, str], None], say: Callable[[str], None]):
        self._tracking, self._send, self._say = tracking, send, say
        self._sent: dict[str, float] = {}  # when, by title
        self._seconds: deque[float] = deque(maxlen=HISTORY + RECENT)
        self._lock = threading.Lock()

    def event(self, title: str, text: str, level: str = "WARN") -> bool:
        """Send an alert that the log has already. Whether it was: not again within `tracking.alert_every`."""
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
        """There was no step for `seconds`."""
        self._tell("no step", f"no step in {seconds:.0f} s, the last line of metrics is step {step}'s", "ERROR")

    def _tell(self, title: str, text: str, level: str = "WARN") -> None:
        if self.event(title, text, level):
            self._say(f"{title}: {text}")
