"""Draws docs/architecture.svg, the packages of ebm/ and what imports what, from the import statements alone.

python docs/architecture.py

A package stands one row below the lowest package that imports it. An arrow is as wide as there are import statements
(one or two, up to six, more). BASE is imported nearly everywhere and has no arrows. tests/test_docs.py draws the
picture again and compares.
"""

import ast
from collections import Counter, defaultdict
from functools import cache
from itertools import pairwise
from math import fsum
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
BASE = ("config", "streams", "errors")
WIDTH, MARGIN, GAP, BOX, HEIGHT, ROW = 1120, 20, 14, 186, 86, 138
BASE_HEIGHT = 50
COLOURS = ("#4269d0", "#c2703d", "#3ca951", "#9c6bde", "#d6336c", "#2a9d9d", "#7a6a58", "#b08900")
STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; text-anchor: middle; fill: #1f2933 }
  .name { font-size: 15px; font-weight: bold } .file { font-size: 11px; fill: #52606d }
  .note { font-size: 12px; fill: #52606d; text-anchor: start }
  rect { fill: #f4f6f8; stroke: #9aa5b1; rx: 6px } .page { fill: #ffffff; stroke: none } path { fill: none }
"""


class Place(NamedTuple):
    """Where a box or the bend of an arrow stands: left edge, top and width in pixels."""

    x: float
    y: float
    width: float


def import_counts(package: Path) -> Counter[tuple[str, str]]:
    """How many import statements in one part of ebm/ name another; parts are the folders and files at its top."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            others = {name.split(".")[1] for name in names if name.startswith("ebm.")}
            counts.update((own, other) for other in others - {own})
    return Counter({pair: n for pair, n in counts.items() if all((package / p).is_dir() or p in BASE for p in pair)})


def rows_of(edges: list[tuple[str, str]]) -> dict[str, int]:
    """The row of each package, 0 at the top: one below the lowest package that imports it."""
    above = defaultdict(set)
    for upper, lower in edges:
        above[lower].add(upper)

    @cache
    def row(name: str) -> int:
        return 1 + max((row(upper) for upper in above[name]), default=-1)

    return {name: row(name) for name in sorted({name for edge in edges for name in edge})}


def route_of(upper: str, lower: str, rows: dict[str, int]) -> list[tuple[str, int]]:
    """The stations of an arrow: its ends, and a bend in every row between."""
    bends = [(f"{upper} to {lower}", row) for row in range(rows[upper] + 1, rows[lower])]
    return [(upper, rows[upper]), *bends, (lower, rows[lower])]


def order_rows(routes: list[list[tuple[str, int]]], number: int) -> list[list[str]]:
    """The stations of each row from left to right, by repeatedly moving each to the mean of its neighbours."""
    order = [sorted({name for route in routes for name, row in route if row == level}) for level in range(number)]
    beside = defaultdict(set)
    for route in routes:
        for one, other in pairwise(route):
            beside[one].add(other)
            beside[other].add(one)
    for sweep in range(12):
        levels = range(number) if sweep % 2 == 0 else range(number - 1, -1, -1)
        for level in levels:
            at = {
                (name, row): (i + 0.5) / len(names) for row, names in enumerate(order) for i, name in enumerate(names)
            }
            means = {name: [at[other] for other in beside[name, level]] for name in order[level]}
            order[level].sort(key=lambda name, means=means: (fsum(means[name]) / len(means[name]), name))
    return order


def places_of(order: list[list[str]]) -> dict[tuple[str, int], Place]:
    places = {}
    for row, names in enumerate(order):
        widths = [0 if " to " in name else BOX for name in names]
        space = (WIDTH - 2 * MARGIN - sum(widths)) / (len(names) + 1)
        x = MARGIN + space
        for name, width in zip(names, widths, strict=True):
            places[name, row] = Place(x, MARGIN + 30 + row * ROW, width)
            x += width + space
    return places


def arrow(route: list[tuple[str, int]], places: dict, port: float, colour: str, count: int) -> str:
    """A curve from the bottom of the first box, through the bends, to the top of the last; `port` in [0, 1] is its
    place along the first box."""
    stations = [places[station] for station in route]
    first, last = stations[0], stations[-1]
    x, y = first.x + port * first.width, first.y + HEIGHT
    path = [f"M{x:.0f},{y:.0f}"]
    for station in stations[1:]:
        end, top = station.x + station.width / 2, station.y
        if station is last:
            top -= 6  # the head of the arrow
            near = abs(x - end) < station.width * 3
            end += (x - end) * 0.12 if near else (1 if x > end else -1) * station.width * 0.36
        half = (station.y - y) / 2
        path.append(f"C{x:.0f},{y + half:.0f} {end:.0f},{station.y - half:.0f} {end:.0f},{top:.0f}")
        x, y = end, station.y
        if station is not last:
            y += HEIGHT
            path.append(f"L{x:.0f},{y:.0f}")
    width = 1.2 if count <= 2 else 2.4 if count <= 6 else 4
    return f'<path d="{" ".join(path)}" stroke="{colour}" stroke-width="{width}" marker-end="url(#{colour[1:]})"/>'


def box(name: str, place: Place, files: list[str], height: int = HEIGHT) -> str:
    middle = place.x + place.width / 2
    lines = wrap(", ".join(files), int(place.width / 6.4))
    texts = [
        f'<text class="file" x="{middle:.0f}" y="{place.y + 37 + 13 * i:.0f}">{line}</text>'
        for i, line in enumerate(lines)
    ]
    return "\n".join([
        f'<rect x="{place.x:.0f}" y="{place.y:.0f}" width="{place.width:.0f}" height="{height}"/>',
        f'<text class="name" x="{middle:.0f}" y="{place.y + 20:.0f}">{name}</text>', *texts])  # fmt: skip


def files_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")


def draw(package: Path) -> str:
    """The picture of a package, as the text of an SVG file."""
    counts = import_counts(package)
    edges = sorted(pair for pair in counts if not set(pair) & set(BASE))
    rows = rows_of(edges)
    routes = {edge: route_of(*edge, rows) for edge in edges}
    order = order_rows(list(routes.values()), max(rows.values()) + 1)
    places = places_of(order)
    uppers = sorted({upper for upper, _ in edges}, key=lambda name: (rows[name], name))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(uppers)}
    lines = []
    for upper in sorted(colours):
        own = sorted((pair for pair in edges if pair[0] == upper), key=lambda pair: places[routes[pair][1]].x)
        for i, pair in enumerate(own):
            lines.append(arrow(routes[pair], places, (i + 1) / (len(own) + 1), colours[upper], counts[pair]))
    lines += [box(name, places[name, row], files_of(package / name)) for name, row in rows.items()]
    bottom = MARGIN + 30 + len(order) * ROW
    share = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
    for i, name in enumerate(BASE):
        files = files_of(package / name)
        place = Place(MARGIN + i * (share + GAP), bottom, share)
        lines.append(box(name if files else f"{name}.py", place, files, BASE_HEIGHT))
    markers = "".join(
        f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="2" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0,0 L8,4 L0,8 z" style="fill:{c}"/></marker>'
        for c in sorted(set(colours.values()))
    )
    note = "Arrows point from a package to those that it imports. Nearly all packages import the bottom row."
    height = bottom + BASE_HEIGHT + MARGIN
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{STYLE}</style>", f"<defs>{markers}</defs>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="note" x="{MARGIN}" y="{MARGIN + 8}">{note}</text>', *lines, "</svg>", ""])  # fmt: skip


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw(ROOT / "ebm"))
