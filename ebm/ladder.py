"""The divergence ladder: from signs of trouble to what is done about it (docs/design.md).

Every `health.every` steps the run is judged by numbers that are equal on all ranks, so all take the same rung, and by
that step's numbers alone, so that a resumed run decides as an uninterrupted one. Before any of this, a step with a
non-finite gradient is void and chains that are not finite start again.
"""

import math
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Literal, NamedTuple

from ebm.config import HealthConfig

HISTORY = 50  # checks that the gap is compared with, once there are MINIMUM of them
MINIMUM = 20
ALERT = "health/warning"


class Reading(NamedTuple):
    """One step of the whole run. Energies are the global batch's."""

    gap: float  # mean E(x_neg) - mean E(x_pos)
    spread: float  # standard deviation of both phases' energies together
    auc: float
    saturated: float  # share of the chains' components at the bounds, beyond that of the data
    drift: float  # step_size * root mean square of dE/dx, as a share of the bounds' width
    void_in_row: int  # steps without a finite gradient up to now
    replicas_agree: bool  # the ranks' weights are finite and equal


class Verdict(NamedTuple):
    action: Literal["go on", "cut", "roll back", "stop"]
    reason: str = ""


@dataclass
class Ladder:
    """What the judgement remembers; `state()` goes into checkpoints."""

    config: HealthConfig
    lr_scale: float = 1.0
    lr_ceiling: float = 1.0
    step_scale: float = 1.0
    rollbacks: int = 0  # also the salt of the noise
    remedies: int = 0  # of the trouble that is not over yet
    trouble: int = 0  # bad checks, less good ones
    healthy: int = 0  # good checks in a row
    gaps: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    warning: float = 0.0  # the worst sign as a share of its limit

    def state(self) -> dict:
        values = asdict(self)
        del values["config"]
        return values

    def load(self, values: dict) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    @property
    def good(self) -> bool:
        """Whether a state of now is one to roll back to."""
        return self.healthy >= self.config.patience

    def judge(self, step: int, reading: Reading) -> Verdict:
        """Take in a check and say what to do. Rungs: smaller steps; roll back; stop."""
        signs = self._signs(step, reading)
        worst = max(signs, key=lambda name: signs[name])
        self.warning = signs[worst]
        reason = f"step {step}: {worst} ({reading})"
        if reading.void_in_row >= self.config.max_skipped_steps or not reading.replicas_agree:
            return self._broken(reason)
        if self.warning < 1:
            self._remember(reading)
            self._recover()
            return Verdict("go on")
        self.healthy, self.trouble = 0, self.trouble + 1
        return self._sick(reason) if self.trouble >= self.config.patience else Verdict("go on")

    def _signs(self, step: int, r: Reading) -> dict[str, float]:
        """Each sign as a share of its limit: 1 and above is bad."""
        c = self.config
        signs = {
            "no finite gradient": r.void_in_row / c.max_skipped_steps,
            "the ranks' weights differ or are not finite": float(not r.replicas_agree),
            "chains lie below all data": c.min_auc / max(r.auc, 1e-3) if r.auc <= 0.5 else 0.0,
            "chains at the bounds": r.saturated / c.max_saturated,
            "steps as large as the domain": r.drift / c.max_drift,
        }
        if step > c.grace:  # chains begin as noise, which any energy tells from data
            signs["chains lie above all data"] = (1 - c.max_auc) / max(1 - r.auc, 1e-4) if r.auc > 0.5 else 0.0
        if len(self.gaps) >= MINIMUM:
            centre = median(self.gaps)
            deviation = 1.4826 * median(abs(gap - centre) for gap in self.gaps)
            scale = max(deviation, median(self.spreads), 1e-6)
            signs["the energy gap left its history"] = abs(r.gap - centre) / (c.gap_deviations * scale)
        return {name: value if math.isfinite(value) else math.inf for name, value in signs.items()}

    def _remember(self, reading: Reading) -> None:
        if reading.void_in_row == 0:  # a void step says nothing about the gap
            self.gaps, self.spreads = [*self.gaps, reading.gap][-HISTORY:], [*self.spreads, reading.spread][-HISTORY:]

    def _recover(self) -> None:
        self.trouble, self.healthy = max(0, self.trouble - 1), self.healthy + 1
        if self.healthy % self.config.recover == 0:
            self.lr_scale = min(self.lr_ceiling, self.lr_scale / self.config.cut)
        if self.healthy == 10 * self.config.recover:
            self.remedies = 0

    def _broken(self, reason: str) -> Verdict:
        """Only an earlier state can help. What broke it may have been chance: the first time nothing else changes."""
        return self._act("roll back", reason, cut=self.remedies > 0)

    def _sick(self, reason: str) -> Verdict:
        return self._act("cut" if self.remedies == 0 else "roll back", reason, cut=True)

    def _act(self, action: str, reason: str, cut: bool) -> Verdict:
        if not self.config.ladder:
            return Verdict("stop", f"{reason}; health.ladder=false")
        if action == "roll back" and self.rollbacks >= self.config.max_rollbacks:
            return Verdict("stop", f"{reason}; after health.max_rollbacks={self.rollbacks} rollbacks")
        if cut and self.remedies % 4 < 2:
            # More often to blame. It comes back to half of the rate at which the trouble began.
            self.lr_ceiling = self.lr_scale / 2
            self.lr_scale *= self.config.cut
        elif cut:
            self.lr_scale = self.lr_ceiling = 1.0  # was not the cause
            self.step_scale *= self.config.cut
        self.remedies += 1
        self.rollbacks += action == "roll back"
        self.trouble, self.healthy, self.gaps, self.spreads = 0, 0, [], []
        return Verdict(action, reason)
