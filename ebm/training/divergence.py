"""Divergence: its signs, and what is done about it (docs/design.md).

Every `health.every` steps the run is judged by numbers that are equal on all ranks, so all take the same action, and
that come from this step alone, so a resumed run decides as an uninterrupted one would. Before any of this, a step
with a non-finite gradient is skipped, and chains that are not finite restart.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from ebm.config import Config, HealthConfig, SamplerConfig
from ebm.errors import DataError

HISTORY = 50  # good checks that the energy gap is compared with
ENOUGH_GAPS = 20  # number of good checks after which the gap's usual range is known
MIN_FRESH_SPREAD = 0.5  # spread across fresh chains, over that of the data, below which too few are different
ONE_PICTURE = 0.1  # the same, below which they are all one picture
MAX_HELDOUT_AUC = 0.95  # P(E(held-out) > E(training data)), above which the energy remembers what it was trained on
ENOUGH_SPREADS = 5  # number of good checks after which the scale of the energies is known


def drift(grad_norm: float, sampler: SamplerConfig, shape: Sequence[int]) -> float | None:
    """How far the gradient alone moves a component in a chain's last step, as a share of the bounds' width.

    This is the root mean square over the components of states of `shape`, for chains whose gradient dE/dx has the mean
    norm `grad_norm`, before any clamp. None without bounds.
    """
    if sampler.bounds is None:
        return None
    return grad_norm * _drift_per_norm(sampler.last_step_size, sampler.bounds, shape)


def largest_grad_norm(limit: float, sampler: SamplerConfig, shape: Sequence[int]) -> float:
    """The norm of dE/dx at which `drift` reaches `limit`; infinite without bounds."""
    return (
        math.inf if sampler.bounds is None else limit / _drift_per_norm(sampler.last_step_size, sampler.bounds, shape)
    )


def _drift_per_norm(step_size: float, bounds: tuple[float, float], shape: Sequence[int]) -> float:
    return step_size / math.sqrt(math.prod(shape)) / (bounds[1] - bounds[0])


def judged_after(config: Config) -> float:
    """The step after which a run's fresh chains tell something about it. By then it is past its warm-up, and has taken
    more chain steps than a persistent chain lives on average, which are num_steps / reinit_prob."""
    persistent = config.loss.negatives == "persistent" and config.buffer.reinit_prob > 0
    return max(config.optim.warmup_steps, 1 / config.buffer.reinit_prob if persistent else 0)


class FreshReading(NamedTuple):
    """A panel's fresh chains beside its data, and held-out data beside these; energies by the averaged weights."""

    spread: float  # across chains, over that of the data
    auc: float  # P(E(chain) > E(data))
    saturated: float  # share of the chains' components at the bounds, less that of the data's
    heldout_auc: float | None  # P(E(held-out) > E(data)); None without held-out data

    def __str__(self) -> str:
        heldout = "" if self.heldout_auc is None else f", held-out auc {self.heldout_auc:.3f}"
        return f"spread {self.spread:.2g}, auc {self.auc:.3f}, saturated {self.saturated:+.2f}{heldout}"


def fresh_signs(step: int, reading: FreshReading, config: Config) -> dict[str, float]:
    """Each sign of a panel's fresh chains as a share of its limit: 1 and above is bad. None is left before
    `judged_after`, and before health.grace, in which chains from noise run past the data, only their collapse."""
    c = config.health
    if step <= judged_after(config):
        return {}
    if step <= c.grace:
        return _finite_signs({"fresh chains are nearly the same picture": ONE_PICTURE / max(reading.spread, 1e-30)})
    alike = "are nearly the same picture" if reading.spread < ONE_PICTURE else "are alike"
    signs = {
        f"fresh chains {alike}": MIN_FRESH_SPREAD / max(reading.spread, 1e-30),
        "fresh chains at the bounds": reading.saturated / c.max_saturated,
        "fresh chains lie below all data": _below(reading.auc, c),
        "fresh chains lie above all data": _above(reading.auc, c),
    }
    if reading.heldout_auc is not None:
        signs["the energy remembers its training data"] = (1 - MAX_HELDOUT_AUC) / max(1 - reading.heldout_auc, 1e-9)
    return _finite_signs(signs)


def _below(auc: float, config: HealthConfig) -> float:
    """The sign that chains lie below all data."""
    return min(config.min_auc / max(auc, 1e-9), 2.0)


def _above(auc: float, config: HealthConfig) -> float:
    """The sign that chains lie above all data."""
    return min((1 - config.max_auc) / max(1 - auc, 1e-9), 2.0)


def _finite_signs(signs: dict[str, float]) -> dict[str, float]:
    return {name: value if math.isfinite(value) else math.inf for name, value in signs.items()}


class ChainReading(NamedTuple):
    """One step's chains beside its data. Energies are those of the global batch."""

    gap: float  # mean E(x_neg) - mean E(x_pos)
    spread: float  # standard deviation of the energies of both phases together
    auc: float  # P(E(x_neg) > E(x_pos))
    saturated: float  # share of the chains' components at the bounds, less that of the data's
    drift: float | None  # see `drift`

    def __str__(self) -> str:
        moved = "" if self.drift is None else f", drift {self.drift:.2g}"
        return f"gap {self.gap:.3g}, auc {self.auc:.3f}, saturated {self.saturated:+.2f}{moved}"


class Reading(NamedTuple):
    """One step of the whole run."""

    skipped_in_row: int  # steps without a finite gradient up to this one
    replicas_agree: bool  # the ranks' weights are finite and equal
    chains: ChainReading | None  # None without chains, or in a skipped step, whose energies mean nothing


class Verdict(NamedTuple):
    action: Literal["go on", "cut", "roll back", "stop"]
    reason: str = ""


@dataclass
class DivergenceMonitor:
    """Judges readings and remembers what that takes; `state()` goes into checkpoints."""

    config: HealthConfig
    lr_scale: float = 1.0  # what cuts have left of the learning rate
    step_scale: float = 1.0  # what cuts have left of the sampler's step size
    before: tuple[float, float] = (1.0, 1.0)  # both scales before the trouble that is not over yet
    cuts: int = 0  # number of cuts in that trouble
    on_trial: bool = False  # whether the last cut still has to show its effect
    rollbacks: int = 0  # rollbacks of the run; they also change the seed of its noise
    trouble: float = 0.0  # bad checks by their weight, less half of the good ones
    healthy: int = 0  # good checks in a row
    gaps: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    warning: float = 0.0  # the worst sign as a share of its limit

    def state(self) -> dict[str, Any]:
        values = asdict(self)
        del values["config"]
        return values

    def load(self, values: dict[str, Any]) -> None:
        """Take over what `state()` gave. Raises DataError."""
        try:
            loaded = TypeAdapter(DivergenceMonitor).validate_python(values | {"config": self.config})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(f"state.json: divergence.{key}={str(first['input'])[:80]!r}: {first['msg']}") from error
        self.__dict__.update(loaded.__dict__)

    @property
    def good(self) -> bool:
        """Whether the present state is one to roll back to."""
        return self.healthy >= self.config.patience and self.trouble == 0

    def judge(self, step: int, reading: Reading) -> Verdict:
        """Take in a reading and decide. In the order of severity: smaller steps; roll back; stop."""
        signs = self._signs(step, reading)
        worst = max(signs, key=lambda name: signs[name])
        self.warning = signs[worst]
        reason = f"step {step}: {worst}" + ("" if reading.chains is None else f" ({reading.chains})")
        broken = reading.skipped_in_row >= self.config.max_skipped_steps or not reading.replicas_agree
        if self.warning < 1:
            self._take_in_good(reading)
            return Verdict("go on")
        weight = 1 + int(math.log10(min(self.warning, 100)))  # ten times the limit counts for two, a hundred for three
        self.healthy, self.trouble = 0, self.trouble + weight
        if not self.config.ladder:
            return Verdict("stop", reason) if broken or self.trouble >= self.config.patience else Verdict("go on")
        if step <= self.config.grace and not broken:  # a wild start may calm down by itself
            too_long = self.trouble >= 2 * self.config.patience
            return self._roll_back(reason, cut=True) if too_long else Verdict("go on")
        if broken or self.trouble >= self.config.patience:
            return self._roll_back(reason, cut=self.rollbacks > 0 if broken else not self.on_trial)
        if self.trouble > self.config.patience // 2 and not self.on_trial:
            self._cut()
            return Verdict("cut", reason)
        return Verdict("go on")

    def _signs(self, step: int, reading: Reading) -> dict[str, float]:
        """Each sign of divergence as a share of its limit: 1 and above is bad."""
        c = self.config
        signs = {
            "the ranks' weights differ or are not finite": 0.0 if reading.replicas_agree else math.inf,
            "no finite gradient": reading.skipped_in_row / c.max_skipped_steps,
        }
        if reading.chains is None:
            return signs
        gap, spread, auc, saturated, moved = reading.chains
        signs["chains at the bounds"] = saturated / c.max_saturated
        if moved is not None:
            signs["steps as large as the domain"] = moved / c.max_drift
            signs["the energy is flat"] = c.min_drift / max(moved, 1e-30)
        if len(self.spreads) >= ENOUGH_SPREADS:
            signs["the energies are all alike"] = c.min_spread * median(self.spreads) / max(spread, 1e-30)
        if len(self.gaps) >= ENOUGH_GAPS:
            centre = median(self.gaps)
            deviation = 1.4826 * median(abs(gap - centre) for gap in self.gaps)
            scale = max(deviation, median(self.spreads), 1e-6)
            signs["the energy gap left its history"] = abs(gap - centre) / (c.gap_deviations * scale)
        # An untrained energy may rate noise below all data: in the first steps this counts beside another sign alone.
        if step > c.grace or max(signs.values()) >= 0.5:
            signs["chains lie below all data"] = _below(auc, c)
        if step > c.grace:  # chains begin as noise, which any energy tells from data
            signs["chains lie above all data"] = _above(auc, c)
        return _finite_signs(signs)

    def _take_in_good(self, reading: Reading) -> None:
        if reading.skipped_in_row:
            return
        if reading.chains is not None:
            self.gaps = [*self.gaps, reading.chains.gap][-HISTORY:]
            self.spreads = [*self.spreads, reading.chains.spread][-HISTORY:]
        self.trouble, self.healthy = max(0.0, self.trouble - 0.5), self.healthy + 1
        if self.trouble == 0 and self.good:
            self.on_trial = False
        if self.healthy == self.config.recover and self.cuts:
            # The trouble is over: the learning rate comes back to half of what it was when it began.
            self.lr_scale, self.cuts = max(self.lr_scale, self.before[0] / 2), 0

    def _cut(self) -> None:
        """First the learning rate, then the step size in its place, then both, more each time."""
        if self.cuts == 0:
            self.before = (self.lr_scale, self.step_scale)
        power = max(1, self.cuts - 1)
        factors = [(power, 0), (0, power), (power, power)][min(self.cuts, 2)]
        self.lr_scale, self.step_scale = (b * self.config.cut**f for b, f in zip(self.before, factors, strict=True))
        self.cuts, self.on_trial = self.cuts + 1, True

    def _roll_back(self, reason: str, cut: bool) -> Verdict:
        if self.rollbacks >= self.config.max_rollbacks:
            return Verdict("stop", f"{reason}, after health.max_rollbacks={self.rollbacks} rollbacks")
        if cut:
            self._cut()
        self.rollbacks, self.trouble, self.healthy, self.on_trial = self.rollbacks + 1, 0, 0, False
        self.gaps, self.spreads = [], []
        return Verdict("roll back", reason)
