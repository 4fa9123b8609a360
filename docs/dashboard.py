"""Draws docs/dashboard.png: the panels of `ebm dashboard RUN`, three in a row, with what W&B's client wrote for the
run in RUN/wandb.

python docs/dashboard.py RUN
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from wandb_reader import history  # noqa: E402

from ebm.commands.dashboard import place_of, specification, titled  # noqa: E402
from ebm.commands.sync import files_of, parts_of  # noqa: E402
from ebm.report.page import FIGURE_STYLE  # noqa: E402

COLUMNS = 3
COLORS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")


def main() -> int:
    run_dir = Path(sys.argv[1])
    parts = parts_of(run_dir / "wandb")
    rows = [row for part in parts for file in files_of(part) for row in history(file)]
    files = [part / "files" for part in parts]
    sections = specification(place_of(str(run_dir)))["sections"]
    heights = [-(-len(section["panels"]) // COLUMNS) for section in sections]
    with rc_context(FIGURE_STYLE | {"axes.titlesize": 8, "legend.fontsize": 6, "font.size": 7}):
        figure = Figure(figsize=(11, 1.75 * sum(heights) + 0.4 * len(heights)), layout="constrained")
        parts_of_page = figure.subfigures(len(sections), 1, height_ratios=[h + 0.23 for h in heights])
        for section, part in zip(sections, parts_of_page, strict=True):
            draw_section(section, part, rows, files)
        out = ROOT / "docs" / "dashboard.png"
        figure.savefig(out, dpi=80, facecolor="white")
    image = Image.open(out).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(out, optimize=True)
    print(out)
    return 0


def draw_section(section: dict[str, Any], figure: SubFigure, rows: list[dict], files: list[Path]) -> None:
    figure.suptitle(f"{section['name']}  {len(section['panels'])}", x=0.005, ha="left", fontsize=10, fontweight="bold")
    number = -(-len(section["panels"]) // COLUMNS)
    places = figure.subplots(number, min(COLUMNS, len(section["panels"])), squeeze=False).flat
    for panel in section["panels"]:
        ax = next(places)
        ax.set_title(titled(panel), loc="left")
        if panel["kind"] == "line":
            draw_lines(ax, panel["keys"], rows)
        else:
            draw_media(ax, panel["keys"], rows, files)
    for ax in places:
        ax.set_axis_off()


def draw_lines(ax: Axes, keys: tuple[str, ...], rows: list[dict]) -> None:
    """The curves over the steps; what was logged once is a point."""
    for key, color in zip(keys, COLORS, strict=False):
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if points:
            ax.plot(*zip(*points, strict=True), color=color, marker="o" if len(points) == 1 else None, lw=1, label=key)
    if ax.has_data():
        ax.legend(loc="best", frameon=False)
    else:
        ax.text(0.5, 0.5, "nothing was logged", ha="center", transform=ax.transAxes)
        ax.set_axis_off()


def draw_media(ax: Axes, keys: tuple[str, ...], rows: list[dict], files: list[Path]) -> None:
    """The newest pictures side by side, or the newest histograms."""
    newest = {key: fields(rows, key) for key in keys}
    places = [file / value["path"] for value in newest.values() if "path" in value for file in files]
    pictures = [np.asarray(Image.open(place).convert("RGB")) for place in places if place.is_file()]
    if pictures:
        ax.imshow(np.concatenate([np.pad(p, ((0, 0), (4, 4), (0, 0)), constant_values=255) for p in pictures], 1))
        ax.set_axis_off()
        return
    for (key, value), color in zip(newest.items(), COLORS, strict=False):
        if "bins" in value:
            ax.stairs(value["values"], value["bins"], color=color, label=key)
    ax.legend(loc="best", frameon=False)


def fields(rows: list[dict], key: str) -> dict[str, Any]:
    """The newest value of each field of a picture or a histogram, which W&B's file keeps as KEY/FIELD."""
    return {
        name.removeprefix(f"{key}/"): value for row in rows for name, value in row.items() if name.startswith(f"{key}/")
    }


if __name__ == "__main__":
    sys.exit(main())
