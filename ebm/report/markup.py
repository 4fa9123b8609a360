"""Pieces of HTML; whatever comes from a run is escaped."""

import base64
import html
import math

IN_RANGE, OUT_OF_RANGE = "in range", "out of range"

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
.grid img, .panels img { width: 100%; display: block; margin: 4px 0 2px; }
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


def escape(text) -> str:
    return html.escape(str(text))


def number(value: float) -> str:
    """Four digits of a value; a count as it is."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def image(content: bytes, kind: str, alt: str) -> str:
    """A picture in the page itself; `kind` is png or svg+xml."""
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def cell(text, style: str = "", **data: str) -> str:
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
