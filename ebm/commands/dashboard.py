"""ebm dashboard RUN|[ENTITY/]PROJECT [--out FILE.json]

Builds a W&B workspace and a report for a project of runs: health with its ranges, samples, energies, evaluation, speed.
By the package wandb-workspaces, with a login to W&B; `--out` writes the specification instead, and needs neither.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ebm.config import load_config
from ebm.errors import ConfigError, UserError
from ebm.report.page import CHARTS, healthy_range, number
from ebm.report.records import Metric, Records, metric_of, read
from ebm.runtime.files import replace
from ebm.tracking.delivery import DEFAULT_PROJECT, obtained

PANELS = ("samples/fresh", "samples/buffer", "samples/data")
HISTOGRAMS = ("energy/pos", "energy/neg", "energy/fresh", "energy/heldout")
EVALUATION = (  # what `ebm evaluate --log` sends, by title
    ("Fréchet distance in floors", ("frechet/fresh_ratio", "frechet/persistent_ratio")),
    ("AUROC against flipped images", ("ood/flipped_auroc",)),
    ("Accuracy of the energy as a classifier", ("accuracy/heldout",)),
    ("Share of Metropolis tests accepted", ("density/acceptance",)),
)
# Columns of the table of runs, as W&B calls them.
COLUMNS = (
    "summary:best/frechet_ratio", "summary:best/step", "summary:worst/warning", "summary:worst/step",
    "config:environment.world_size", "config:environment.device", "config:environment.parameters",
    "config:environment.flops_per_step", "config:environment.slurm_job", "config:environment.data",
)  # fmt: skip
SECTIONS = ("Health", "Samples", "Energies and training", "Evaluation", "Speed")


class Panel(NamedTuple):
    """A chart over the steps, or pictures and histograms ("media")."""

    title: str
    kind: str  # line or media
    keys: tuple[str, ...]
    healthy: tuple[float, float] | None = None
    about: str = ""


class Place(NamedTuple):
    """The W&B project, and a run whose config and data say what is healthy in it."""

    entity: str | None
    project: str
    run: Records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("place", metavar="RUN|[ENTITY/]PROJECT", help="run directory, or a W&B project")
    parser.add_argument("--out", metavar="FILE.json", help="write the specification to this file; nothing is sent")


def run(arguments: argparse.Namespace) -> int:
    place = place_of(arguments.place)
    spec = specification(place)
    if arguments.out:
        out = Path(arguments.out)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            replace(out, (json.dumps(spec, indent=1, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"--out {out}: {error}; choose a file that can be written") from error
        panels = sum(len(section["panels"]) for section in spec["sections"])
        print(f"{len(spec['sections'])} sections, {panels} panels for the project {place.project} -> {out}")
        return 0
    for name, url in send(spec).items():
        print(f"{name}: {url}")
    return 0


def place_of(text: str) -> Place:
    """A run directory's project, or the one that is named. Raises ConfigError, or DataError for a damaged run."""
    path = Path(text)
    if (path / "config.yaml").is_file():
        records, before = read(path), obtained(path)
        tracking = records.config.tracking
        project = tracking.project or (before.project if before is not None else DEFAULT_PROJECT)
        return Place(tracking.entity or (before.entity if before is not None else None), project, records)
    entity, slash, project = text.rpartition("/")
    if path.exists() or not project or "/" in entity or (slash and not entity):
        raise ConfigError(f"{text}: is no run directory (it has no config.yaml), nor a W&B project; give one of these")
    return Place(entity or None, project, Records(Path(), load_config(None), [], 0))


def specification(place: Place) -> dict[str, Any]:
    """The workspace and the report as plain values, for JSON."""
    panels: dict[str, list[Panel]] = {name: [] for name in SECTIONS}
    for panel in charts(place.run):
        panels[section_of(panel)].append(panel)
    panels["Samples"].append(Panel("Fresh chains, persistent chains, data", "media", PANELS))
    if classes := place.run.config.energy.num_classes:
        keys = tuple(f"samples/class_{y}" for y in range(min(classes, 16)))
        panels["Samples"].append(Panel("Fresh chains by class", "media", keys))
    panels["Energies and training"].append(Panel("Energies", "media", HISTOGRAMS))
    panels["Evaluation"] += [Panel(title, "line", keys) for title, keys in EVALUATION]
    sections = [
        {"name": name, "about": about(name), "panels": [panel._asdict() for panel in own]}
        for name, own in panels.items()
    ]
    return {
        "entity": place.entity,
        "project": place.project,
        "name": "Energy-based models",
        "x": "step",
        "columns": list(COLUMNS),
        "sections": sections,
    }


def charts(records: Records) -> Iterable[Panel]:
    """The charts of the report page, with the healthy range of each."""
    for title, keys in CHARTS:
        metric = metric_of(keys[0])
        healthy = healthy_range(records, metric)
        yield Panel(title, "line", keys, None if healthy is None or math.isinf(healthy[1]) else healthy, advice(metric))


def advice(metric: Metric | None) -> str:
    return "" if metric is None else f"{metric.meaning[0].upper()}{metric.meaning[1:]}. Healthy: {metric.healthy}."


def section_of(panel: Panel) -> str:
    metric = metric_of(panel.keys[0])
    if panel.keys[0].startswith("perf/"):
        return "Speed"
    return "Health" if metric is not None and metric.bounds is not None else "Energies and training"


def about(section: str) -> str:
    """A sentence for the report."""
    return {
        "Health": "Look first at health/warning, the worst sign of divergence as a share of its limit, then at the "
        "AUCs: do chains reach the data?",
        "Samples": "Fresh chains start from noise and show what the energy has learned; it was trained on persistent "
        "ones.",
        "Energies and training": "Neither a level loss nor a falling one is a sign of quality: data and chains should "
        "keep the same energy.",
        "Evaluation": "What `ebm evaluate RUN --log` measured. 1 is the distance between training and held-out data.",
        "Speed": "Where the share of time waiting for data is above .1, raise data.workers.",
    }[section]


def titled(panel: dict[str, Any]) -> str:
    """The title with the healthy range: a chart of W&B's has no place of its own for it."""
    if panel["healthy"] is None:
        return str(panel["title"])
    low, high = (number(value) for value in panel["healthy"])
    return f"{panel['title']} (healthy: {low if low == high else f'{low} to {high}'})"


def build(spec: dict[str, Any]) -> tuple[Any, Any]:
    """The workspace and the report as objects of wandb-workspaces. Raises ConfigError where it is not installed."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(
            f"a dashboard needs the package wandb-workspaces ({error}): pip install 'ebm[dashboard]'; or write its "
            "specification with --out FILE.json"
        ) from error

    def panel(values: dict[str, Any]) -> Any:
        if values["kind"] == "media":
            return wr.MediaBrowser(title=values["title"], media_keys=list(values["keys"]))
        return wr.LinePlot(title=titled(values), x=spec["x"], y=list(values["keys"]))

    report = wr.Report(project=spec["project"], title=spec["name"], description=f"Runs of {spec['project']}",
                       **({"entity": spec["entity"]} if spec["entity"] else {}))  # fmt: skip
    place = {"entity": report.entity, "project": spec["project"]}  # without one, the user's own
    workspace = ws.Workspace(
        **place,
        name=spec["name"],
        sections=[
            ws.Section(name=section["name"], panels=[panel(p) for p in section["panels"]], is_open=True)
            for section in spec["sections"]
        ],
        runset_settings=ws.RunsetSettings(pinned_columns=["run:displayName", *spec["columns"]]),
    )
    blocks: list[Any] = []
    for section in spec["sections"]:
        blocks += [wr.H2(section["name"]), wr.P(section["about"])]
        lines = [f"**{titled(p)}** {p['about']}" for p in section["panels"] if p["healthy"] is not None]
        blocks += [wr.MarkdownBlock("\n\n".join(lines))] * bool(lines)
        blocks.append(wr.PanelGrid(runsets=[wr.Runset(**place)], panels=[panel(p) for p in section["panels"]]))
    report.blocks = blocks
    return workspace, report


def send(spec: dict[str, Any]) -> dict[str, str]:
    """Save workspace and report in W&B; their addresses by name. Raises UserError."""
    try:
        workspace, report = build(spec)
        workspace.save()
        report.save()
    except UserError:
        raise
    except Exception as error:  # the client raises many kinds: without a login, a server, the right to write
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"W&B can't be written to ({first}); after `wandb login`, where it can be reached, run the same command "
            "again, with ENTITY/PROJECT for a team's project; or write the specification with --out FILE.json"
        ) from error
    return {"workspace": workspace.url, "report": report.url}
