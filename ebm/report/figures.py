"""The figures of a report: matplotlib without a display, as SVG."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLOURS = ("#2f6db3", "#d9822b", "#4f9d69")
INK, FAINT, BAND, MARK = "#333333", "#d9d9d9", "#e4f2e7", "#c0392b"
STYLE: dict[str, Any] = {
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


def svg(draw: Callable[[Axes], None], size: tuple[float, float]) -> bytes:
    """A figure of `size` inches that `draw(ax)` has drawn."""
    return _saved(draw, size, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)


def pixels(draw: Callable[[Axes], None], size: tuple[float, float]) -> np.ndarray:
    """The same as a picture of 100 pixels an inch, uint8 (height, width, 3)."""
    with Image.open(io.BytesIO(_saved(draw, size, format="png", dpi=100)), formats=("PNG",)) as picture:
        return np.asarray(picture.convert("RGB"))


def _saved(draw: Callable[[Axes], None], size: tuple[float, float], **options: Any) -> bytes:
    with rc_context(STYLE):  # type: ignore[arg-type]  # keys are checked by matplotlib when they are set
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.BytesIO()
        figure.savefig(file, **options)
        return file.getvalue()
