"""Every metric: what it is, its unit, and what a healthy value looks like. docs/monitoring.md holds the same table."""

from collections.abc import Callable
from typing import NamedTuple

from ebm.config import Config
from ebm.training.divergence import MIN_FRESH_SPREAD, largest_grad_norm

Range = tuple[float, float]


class Metric(NamedTuple):
    key: str  # a trailing * stands for what an objective or a sampler calls its own numbers
    meaning: str
    unit: str
    healthy: str
    bounds: Callable[[Config, dict[str, float]], Range] | None = (
        None  # of the config and the data's share at the bounds
    )


def _drift(config: Config, _: object) -> Range:
    """The limit of the drift, as a gradient norm."""
    return 0.0, largest_grad_norm(config.health.max_drift, config.sampler, config.data.shape)


def _zero(*_: object) -> Range:
    return 0.0, 0.0


def _one(*_: object) -> Range:
    return 1.0, 1.0


def _reinit(config: Config, _: object) -> Range:
    return config.buffer.reinit_prob - 0.05, config.buffer.reinit_prob + 0.05


METRICS = (
    Metric("step", "optimizer steps so far, the axis of all others", "steps", "grows"),
    Metric("train/loss", "mean loss, with its regularisers", "energy",
           "finite, near 0 and level; says nothing about the quality of samples"),
    Metric("energy/pos_mean", "mean energy of data", "energy", "near 0, together with neg_mean"),
    Metric("energy/neg_mean", "mean energy of chains", "energy", "close to pos_mean"),
    Metric("energy/gap", "neg_mean less pos_mean", "energy",
           "small and level, of either sign; where it rises steadily, the chains are left behind"),
    Metric("energy/auc", "P(a chain's energy is above a datum's); .5: they can't be told apart", "probability",
           ".2 to .9; near 1 the chains don't reach the data, near 0 they lie in holes where no data is",
           lambda *_: (0.2, 0.9)),
    Metric("sampler/grad_norm", "norm of dE/dx at the last step of a chain, before any clamp", "energy / x",
           "level; below health.max_drift x width of the bounds x sqrt(size) / step_size", _drift),
    Metric("sampler/displacement", "norm of x_K - x_0: how far a chain moves in one step of training", "x",
           "level; 0: the chains are stuck"),
    Metric("sampler/saturated", "share of the chains' pixels at a bound", "share",
           "near data/saturated, at most .25 above it", lambda _, data: (0.0, data["data/saturated"] + 0.25)),
    Metric("sampler/temperature", "noise_scale^2 / (2 step_size)", "energy", "as configured"),
    Metric("sampler/acceptance*", "share of proposals that the Metropolis test accepts", "share",
           "near the sampler's target"),
    Metric("sampler/*", "what a sampler reports of its own", "", "as its keys in train.py --help sampler say"),
    Metric("loss/*", "a term of the objective, by its name", "energy", "finite; weighted, they sum to train/loss"),
    Metric("fresh/energy_mean", "mean energy of a panel's fresh chains, by the averaged weights", "energy",
           "close to pos_mean"),
    Metric("fresh/auc", "as energy/auc, for a panel's fresh chains", "probability",
           "near .5 at the end; near 1 they don't reach the data, near 0 they run past it, as early in a run",
           lambda *_: (0.05, 0.95)),
    Metric("fresh/saturated", "share of the fresh chains' pixels at a bound", "share",
           "near data/saturated, at most .25 above it", lambda _, data: (0.0, data["data/saturated"] + 0.25)),
    Metric("fresh/spread", "how much fresh chains differ from each other, as a share of how much data do", "share",
           "near 1; below .1 all chains are the same picture", lambda *_: (MIN_FRESH_SPREAD, 2.0)),
    Metric("data/saturated", "share of the data's pixels at a bound", "share", "constant, a property of the data"),
    Metric("data/epoch", "epoch of the data", "epochs", "grows"),
    Metric("data/skipped", "samples passed over (data.on_error=skip)", "samples", "0", _zero),
    Metric("buffer/age_mean", "mean age of the persistent chains", "chain steps",
           "grows to about num_steps / reinit_prob, then level"),
    Metric("buffer/reinit_frac", "share of drawn chains restarted from noise", "share",
           "within .05 of buffer.reinit_prob", _reinit),
    Metric("optim/lr", "learning rate", "", "its schedule times health/lr_scale"),
    Metric("optim/grad_norm", "mean norm of the gradient, before clipping", "",
           "level; a rise over decades announces divergence"),
    Metric("health/warning", "worst sign of divergence, as a share of its limit", "share", "below 1",
           lambda *_: (0.0, 1.0)),
    Metric("health/rollbacks", "returns to an earlier checkpoint", "count", "0; one that helped is no harm", _zero),
    Metric("health/skipped_steps", "steps skipped for a non-finite gradient", "count", "0; a few with fp16", _zero),
    Metric("health/reset_chains", "chains restarted since they were not finite", "count", "0", _zero),
    Metric("health/lr_scale", "what cuts left of the learning rate", "factor", "1", _one),
    Metric("health/step_scale", "what cuts left of the step size", "factor", "1", _one),
    Metric("perf/step_s", "wall time of a step", "s", "level"),
    Metric("perf/chain_steps_per_s", "steps of single chains a second", "1/s", "level"),
    Metric("perf/data_wait_frac", "share of the time spent waiting for data", "share",
           "below .1; above it, raise data.workers", lambda *_: (0.0, 0.1)),
)  # fmt: skip


def metric_of(key: str) -> Metric | None:
    """The entry of a key; of several patterns the first, and a name before any pattern."""
    exact = next((m for m in METRICS if m.key == key), None)
    return exact or next((m for m in METRICS if m.key.endswith("*") and key.startswith(m.key[:-1])), None)
