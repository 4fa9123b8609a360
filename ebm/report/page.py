"""The page: sections of HTML about a run, and its figures as SVG, by matplotlib without a display. Whatever comes from
the run is escaped."""

import base64
import html
import io
import logging
import math
from collections.abc import Callable
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ebm.config import to_yaml
from ebm.report.records import METRICS, RECENT, Metric, Records, metric_of
from ebm.training.divergence import judged_after

log = logging.getLogger(__name__)

COLOURS = ("#2f6db3", "#d9822b", "#4f9d69")
INK, FAINT, BAND, MARK = "#333333", "#d9d9d9", "#e4f2e7", "#c0392b"
FIGURE_STYLE: dict[str, Any] = {
    "svg.hashsalt": "ebm", "font.family": "sans-serif", "font.size": 8.5, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#eeeeee",
    "xtick.major.size": 0, "ytick.major.size": 0, "legend.frameon": False, "axes.axisbelow": True,
}  # fmt: skip
MAX_POINTS = 1000  # of a curve; more can't be seen

Curve = tuple[np.ndarray, np.ndarray]


def draw_curves(ax: Axes, curves: dict[str, Curve], healthy: tuple[float, float] | None, marks: list[float]) -> None:
    """Curves by name, the healthy range shaded, and a line where the run went back."""
    for colour, (name, (steps, values)) in zip(COLOURS, curves.items(), strict=False):
        ax.plot(*thinned(steps, values), color=colour, lw=1.2, label=name, marker="." if len(steps) < 3 else None)
    values = np.concatenate([v for _, v in curves.values()])
    scale_to(ax, values[np.isfinite(values)])
    if healthy is not None:
        shade(ax, *healthy)
    for step in marks:
        ax.axvline(step, color=MARK, lw=0.8, ls=(0, (3, 2)))
    if len(curves) > 1:
        ax.legend(loc="best", handlelength=1.2, fontsize=7.5)


def shade(ax: Axes, low: float, high: float) -> None:
    """The healthy range, in full where it is not many times as wide as what there is to see."""
    bottom, top = ax.get_ylim()
    if ax.get_yscale() == "linear" and high - low < 4 * (top - bottom):
        bottom, top = min(bottom, low), max(top, high)
    if low < high:
        ax.axhspan(max(low, bottom), max(min(high, top), bottom), color=BAND, lw=0, zorder=0)
    ax.set_ylim(bottom, top)


def scale_to(ax: Axes, values: np.ndarray) -> None:
    """Decades where the values span them, else linear; room for a level curve."""
    if not len(values):
        return
    size = np.abs(values[values != 0])
    if len(size) and size.max() > 1000 * np.median(size):
        ax.set_yscale("symlog", linthresh=float(np.median(size)))
    elif values.min() > 0 and values.max() > 100 * values.min():
        ax.set_yscale("log")
    elif np.ptp(values) < 1e-9 * max(1.0, np.abs(values).max()):
        pad = 0.2 * abs(values[0]) or 1.0
        ax.set_ylim(values[0] - pad, values[0] + pad)
    if ax.get_yscale() == "linear":
        ax.ticklabel_format(axis="y", scilimits=(-3, 4))


def thinned(steps: np.ndarray, values: np.ndarray) -> Curve:
    """At most about MAX_POINTS, the smallest and the largest of each bin, so that no spike is lost."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    comparable = np.where(np.isfinite(values), values, 0.0)
    kept = sorted({int(i) for b in bins for i in (b[comparable[b].argmin()], b[comparable[b].argmax()])})
    return steps[kept], values[kept]


def draw_histograms(ax: Axes, energies: dict[str, np.ndarray]) -> None:
    """Energies by set, as densities over common bins; the outermost half per cent is left out."""
    joined = np.concatenate(list(energies.values()))
    low, high = np.quantile(joined, [0.005, 0.995])
    bins = np.linspace(low, high if high > low else low + 1e-6, 61).tolist()
    for colour, (name, values) in zip(COLOURS, energies.items(), strict=False):
        ax.hist(values, bins, density=True, histtype="stepfilled", color=colour, alpha=0.12)
        ax.hist(values, bins, density=True, histtype="step", color=colour, lw=1.3, label=name)
    ax.set_xlabel("energy")
    ax.set_yticks([])
    ax.legend(loc="best")


def draw_lengths(ax: Axes, curve: np.ndarray, low: list[float], high: list[float]) -> None:
    """Distances (N, 2) of pairs (chain steps, ratio to the floor) with their intervals, both axes in decades."""
    steps, ratios = curve.T
    ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.15, lw=0)
    ax.plot(steps, ratios, color=COLOURS[0], marker="o", ms=4, lw=1.3)
    ax.axhline(1.0, color=FAINT, lw=1)
    ax.set(xscale="log", yscale="log", xlabel="chain steps", ylabel="distance / floor")
    ax.minorticks_off()
    ax.set_xticks(steps, [f"{step:g}" for step in steps])
    marks = [m * 10.0**d for d in range(-2, 6) for m in (1, 2, 5) if min(low) <= m * 10.0**d <= max(high)] or [1.0]
    ax.set_yticks(marks, [f"{mark:g}" for mark in marks])


def svg(draw: Callable[[Axes], None], size: tuple[float, float]) -> bytes:
    """A figure of `size` inches that `draw(ax)` has drawn."""
    return _saved(draw, size, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)


def pixels(draw: Callable[[Axes], None], size: tuple[float, float]) -> np.ndarray:
    """The same as a picture of 100 pixels an inch, uint8 (height, width, 3)."""
    with Image.open(io.BytesIO(_saved(draw, size, format="png", dpi=100)), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"))


def _saved(draw: Callable[[Axes], None], size: tuple[float, float], **options: Any) -> bytes:
    with rc_context(FIGURE_STYLE):  # type: ignore[arg-type]  # keys are checked by matplotlib when they are set
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, **options)
        return file.getvalue()


IN_RANGE, OUT_OF_RANGE, TOO_EARLY = "in range", "out of range", "too early to judge"

STYLE = """
:root { color: #222; background: #fff; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; font-weight: 500; margin: 0; }
h2 { font-size: 18px; font-weight: 500; margin: 52px 0 8px; }
h3 { font-size: 14px; font-weight: 500; margin: 0; }
p { margin: 4px 0; }
small, .faint { color: #777; font-size: 12.5px; }
.facts { display: flex; flex-wrap: wrap; gap: 8px 44px; margin-top: 22px; }
.facts b { display: block; font-weight: 500; font-size: 19px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 30px 32px; margin-top: 16px; }
.panels { display: grid; grid-template-columns: repeat(2, 1fr); gap: 18px 24px; margin-top: 12px; }
.panels > :first-child { grid-column: 1 / -1; }
.grid img, .panels img, .wide img { width: 100%; display: block; margin: 4px 0 2px; }
table { border-collapse: collapse; font-size: 13px; margin-top: 8px; }
td, th { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #eee; vertical-align: top; }
th { font-weight: 500; color: #777; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.ok { color: #2e7d4f; white-space: nowrap; }
.off { color: #c0392b; white-space: nowrap; }
.note { border-left: 3px solid #e0b252; padding: 2px 12px; margin: 16px 0 0; }
summary { cursor: pointer; color: #444; }
pre { font-size: 12.5px; overflow-x: auto; }
"""


def escape(text: object) -> str:
    return html.escape(str(text))


def number(value: float) -> str:
    """Four digits of a value; a count as it is."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def image(content: bytes, kind: str, alt: str) -> str:
    """A picture in the page itself; `kind` is png or svg+xml."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def cell(text: object, style: str = "", **data: str) -> str:
    """A cell of a table: `text` escaped, a class, and what scripts may look for."""
    attributes = f' class="{style}"' if style else ""
    attributes += "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    return f"<td{attributes}>{escape(text)}</td>"


def table(columns: str, rows: list[list[str]]) -> str:
    """`columns`: names separated by |, those of numbers begin with #. `rows` of cells."""
    head = "".join(f'<th class="n">{c[1:]}</th>' if c[:1] == "#" else f"<th>{c}</th>" for c in columns.split("|"))
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def verdict(ok: bool) -> str:
    return f'<span class="ok">{IN_RANGE}</span>' if ok else f'<span class="off">{OUT_OF_RANGE}</span>'


CHARTS = (
    ("Energies", ("energy/pos_mean", "energy/neg_mean")),
    ("Energy gap", ("energy/gap",)),
    ("AUC of chains against data", ("energy/auc",)),
    ("Loss", ("train/loss",)),
    ("Gradient of the weights", ("optim/grad_norm",)),
    ("Gradient along the chains", ("sampler/grad_norm",)),
    ("Spread of fresh chains", ("fresh/spread",)),
    ("AUC of fresh chains", ("fresh/auc",)),
    ("Pixels of fresh chains at a bound", ("fresh/saturated",)),
    ("Energy of fresh chains and held-out data", ("fresh/energy_mean", "heldout/energy_mean")),
    ("AUC of held-out against training data", ("heldout/auc",)),
    ("Pixels at a bound", ("sampler/saturated", "data/saturated")),
    ("Displacement", ("sampler/displacement",)),
    ("Age of the chains", ("buffer/age_mean",)),
    ("Worst sign of divergence", ("health/warning",)),
    ("Skipped steps, reset chains", ("health/skipped_steps", "health/reset_chains")),
    ("Learning rate", ("optim/lr",)),
    ("Seconds a step", ("perf/step_s",)),
    ("Images a second", ("perf/images_per_s",)),
    ("GPU memory", ("perf/gpu_memory_gb",)),
    ("Share of the GPUs' peak", ("perf/mfu",)),
    ("Share of time waiting for data", ("perf/data_wait_frac",)),
)
IN_NUMBERS_ONLY = {"data/epoch", "data/skipped", "health/rollbacks", "health/lr_scale", "health/step_scale"}
IN_NUMBERS_ONLY |= {"perf/chain_steps_per_s", "buffer/reinit_frac", "sampler/temperature"}
MAX_PIXELS = 1 << 26  # of a picture
MAX_PANELS, PANEL_WIDTH = 5, 1200  # pictures over time; pixels of the newest, the others are half as wide


def page(records: Records, energies: dict[str, np.ndarray], energy_note: str) -> str:
    """The whole page. `energies` by set, empty where there are none; `energy_note` says of what, or why not."""
    sections = (
        header(records),
        health(records),
        samples(records),
        energy_histograms(energies, energy_note),
        evaluation(records),
        curves(records),
        events(records),
        numbers(records),
        f"<h2>Config</h2><details><summary>config.yaml</summary><pre>{escape(to_yaml(records.config))}</pre></details>",
    )
    head = f'<meta charset="utf-8"><title>{escape(name_of(records))}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{"".join(sections)}</body></html>\n'


def name_of(records: Records) -> str:
    return records.config.tracking.name or records.path.resolve().name


def healthy_range(records: Records, metric: Metric | None) -> tuple[float, float] | None:
    """None where the metric has none, or this run has not what it is relative to."""
    if metric is None or metric.bounds is None:
        return None
    low, high = metric.bounds(records.config, {"data/saturated": records.present("data/saturated")})
    return None if math.isnan(low + high) else (low, high)


def is_within(value: float, bounds: tuple[float, float]) -> bool:
    """Whether a value is in a range; NaN is in none."""
    return bounds[0] <= value <= bounds[1]


def is_too_early(records: Records, key: str) -> bool:
    """Whether panels can't tell anything yet about a run that is so short."""
    return key.startswith(("fresh/", "heldout/")) and records.step <= judged_after(records.config)


def header(records: Records) -> str:
    config = records.config
    state = "done" if records.done else f"unfinished, step {records.step} of {config.train.steps}"
    last = "no line of metrics yet"
    if records.rows:
        last = f"last line {datetime.fromtimestamp((records.path / 'metrics.jsonl').stat().st_mtime):%Y-%m-%d %H:%M}"
    facts = {
        "steps": f"{records.step:,}",
        "images seen": f"{records.step * config.train.batch_size:,}",
        "energy": config.energy.kind,
        "steps a chain": config.sampler.num_steps,
        "seconds a step": number(records.present("perf/step_s")) if records.rows else "–",
        "rollbacks": len(records.rollbacks),
    }
    shown = "".join(f"<div><b>{escape(value)}</b><small>{name}</small></div>" for name, value in facts.items())
    about = " · ".join((state, last, str(records.path.resolve())))
    damage = ""
    if records.damaged:
        damage = f'<p class="note">{records.damaged} damaged line(s) of metrics.jsonl left out</p>'
    return (
        f"<h1>{escape(name_of(records))}</h1>"
        f'<p class="faint">{escape(about)}</p><div class="facts">{shown}</div>{damage}'
    )


def health(records: Records) -> str:
    """Each metric of the run that has a healthy range, against it."""
    rows = []
    for metric in METRICS:
        bounds = healthy_range(records, metric) if metric.key in records.keys else None
        if bounds is None:
            continue
        now, every = records.present(metric.key), records.series(metric.key)[1]
        ok, outside = is_within(now, bounds), sum(not is_within(value, bounds) for value in every)
        shown = number(bounds[0]) if bounds[0] == bounds[1] else f"{number(bounds[0])} to {number(bounds[1])}"
        rows.append([
            cell(metric.key, verdict=metric.key), cell(number(now), "n"), cell(shown, "n"),
            cell(TOO_EARLY, "faint") if is_too_early(records, metric.key) else
            cell(IN_RANGE if ok else OUT_OF_RANGE, "ok" if ok else "off"),
            cell(f"{outside} of {len(every)}" if outside else "–", "n"), cell(metric.meaning, "faint"),
        ])  # fmt: skip
    if not rows:
        return ""
    about = f'<p class="faint">Now: the median of the last {RECENT} lines. Outside: lines of the whole run.</p>'
    return f"<h2>Health</h2>{about}{table('metric|#now|#healthy||#outside|', rows)}"


def samples(records: Records) -> str:
    """The newest panel large, and earlier ones spread over the run."""
    panels = records.panels
    shown: list[str] = []
    picked = {round(i) for i in np.linspace(0, len(panels) - 1, MAX_PANELS)} if panels else ()
    for i in sorted(picked, reverse=True):
        step = panels[i].stem.removeprefix("step_").lstrip("0")
        picture = read_picture(panels[i], PANEL_WIDTH if not shown else PANEL_WIDTH // 2)
        if picture is not None:
            shown.append(
                f"<div><small>step {escape(step)}</small>{image(picture, 'png', f'samples, step {step}')}</div>"
            )
    if not shown:
        return '<h2>Samples</h2><p class="faint">None yet; the next come as tracking.samples_every says.</p>'
    return f'<h2>Samples</h2><div class="panels">{"".join(shown)}</div>'


def read_picture(path: Path, width: int) -> bytes | None:
    """A PNG of at most that many pixels across; None where the file is damaged."""
    try:
        with Image.open(path, formats=("PNG",)) as opened:  # of the others, some start programs
            if opened.width * opened.height > MAX_PIXELS:
                log.warning("%s: %d x %d pixels are too many to show", path, opened.width, opened.height)
                return None
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for a broken file
        return None
    if picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, format="png", optimize=True)
    return file.getvalue()


def energy_histograms(energies: dict[str, np.ndarray], note: str) -> str:
    if not energies:
        return f'<h2>Energies</h2><p class="faint">{escape(note)}</p>'
    picture = svg(lambda ax: draw_histograms(ax, energies), (7.4, 2.5))
    rows = [
        [cell(name), *(cell(number(x), "n") for x in (len(values), values.mean(), values.std()))]
        for name, values in energies.items()
    ]
    return (
        f'<h2>Energies</h2><p class="faint">{escape(note)}. Healthy: training and held-out images lie on one another, '
        "or the energy remembers its training images; the chains lie on both.</p>"
        f"{image(picture, 'svg+xml', 'histograms of energies')}{table('set|#images|#mean|#deviation', rows)}"
    )


def evaluation(records: Records) -> str:
    """What `ebm evaluate` kept in the run directory: distances against the length of chains, pictures, values."""
    step, values, lengths = records.evaluation
    if not values:
        return ""
    about = f'<h2>Evaluation</h2><p class="faint">`ebm evaluate` of step {step}.</p>'
    ratios = [(length, values.get(f"length/{length}")) for length in lengths]
    curve = [(length, ratio) for length, ratio in ratios if isinstance(ratio, float)]
    if curve:
        bounds = {end: [float(values.get(f"length/{n}_{end}", r)) for n, r in curve] for end in ("low", "high")}
        points = np.array(curve, dtype=float)
        drawn = svg(lambda ax: draw_lengths(ax, points, **bounds), (5.2, 2.5))
        about += (
            '<p class="faint">Fréchet distance of fresh chains, in floors, against their number of steps: an energy '
            "that is a density is flat from some length on.</p>" + image(drawn, "svg+xml", "distance against length")
        )
    for name in ("lengths.png", "landscape.png"):
        picture = read_picture(records.path / name, PANEL_WIDTH)
        if picture is not None and (name != "lengths.png" or curve):
            about += f'<div class="wide">{image(picture, "png", name)}</div>'
    rows = [[cell(key), cell(value if isinstance(value, str) else number(value), "n")] for key, value in values.items()]
    return f"{about}<details><summary>all values</summary>{table('value|#', rows)}</details>"


def curves(records: Records) -> str:
    """The charts of what every run has, and one of each further metric."""
    if not records.rows:
        return ""
    known = {key for _, keys in CHARTS for key in keys} | IN_NUMBERS_ONLY
    charts = [*CHARTS, *((key, (key,)) for key in records.keys if key not in known)]
    found = [(title, [key for key in keys if key in records.keys]) for title, keys in charts]
    cards = "".join(chart(records, title, keys) for title, keys in found if keys)
    about = '<p class="faint">Shaded: healthy. Dashed: a rollback went to this step.</p>'
    return f'<h2>Curves</h2>{about}<div class="grid">{cards}</div>'


def chart(records: Records, title: str, keys: list[str]) -> str:
    """A curve a key; the range and the advice are the first's."""
    metric, series = metric_of(keys[0]), {key: records.series(key) for key in keys}
    bounds = healthy_range(records, metric)
    marks = [float(event.to) for event in records.rollbacks]
    picture = svg(lambda ax: draw_curves(ax, series, bounds, marks), (3.5, 1.9))
    line = ", ".join(f"{key} {number(values[-1])}" for key, (_, values) in series.items())
    state = "" if bounds is None else f" · {verdict(is_within(records.present(keys[0]), bounds))}"
    if is_too_early(records, keys[0]):
        state = f" · {TOO_EARLY}"
    advice = "" if metric is None else f"{metric.meaning[0].upper()}{metric.meaning[1:]}. Healthy: {metric.healthy}."
    return (
        f"<div><h3>{escape(title)}</h3><small>{escape(line)}{state}</small>{image(picture, 'svg+xml', title)}"
        f'<p class="faint">{escape(advice)}</p></div>'
    )


def events(records: Records) -> str:
    """Rollbacks, cuts, starts that failed."""
    lines = [f"step {event.start}: back to step {event.to}; {event.reason}" for event in records.rollbacks]
    for key, what in (("health/lr_scale", "learning rate"), ("health/step_scale", "step size")):
        steps, values = records.series(key)
        changed = np.flatnonzero(np.diff(values)) + 1
        lines += [f"step {steps[i]:.0f}: {what} × {number(values[i])}" for i in changed]
    attempts = records.attempts
    if attempts.reason or attempts.starts != 1:
        reason = f"; the last ended with: {attempts.reason}" if attempts.reason else ""
        lines.append(f"{attempts.starts} starts from step {attempts.step}{reason}")
    if not lines:
        return '<h2>Events</h2><p class="faint">No rollback, no cut, no start that failed.</p>'
    return f"<h2>Events</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def numbers(records: Records) -> str:
    """Last, smallest, median and largest value of every metric."""
    rows = []
    for key in records.keys:
        values, metric = records.series(key)[1], metric_of(key)
        of = {"last": values[-1], "smallest": values.min(), "median": np.median(values), "largest": values.max()}
        cells = [cell(number(value), "n", key=key, of=name) for name, value in of.items()]
        rows.append([cell(key), *cells, cell(metric.meaning if metric else "", "faint")])
    if not rows:
        return ""
    return (
        "<h2>Numbers</h2><details><summary>all metrics</summary>"
        f"{table('metric|#last|#smallest|#median|#largest|', rows)}</details>"
    )
