"""The dashboard's specification, and what wandb-workspaces makes of it, without a server."""

import json

import pytest
from made_runs import make_run
from wandb_server import StandIn

from ebm.__main__ import main
from ebm.commands.dashboard import titled
from ebm.report.page import CHARTS, healthy_range
from ebm.report.records import metric_of, read
from ebm.tracking.wandb_run import SUMMARIES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A class-conditional run with two lines of metrics that belongs to a team's project."""
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    settings = ("energy.num_classes=10", "loss.negatives=noise", "tracking.project=digits", "tracking.entity=team")
    run = make_run(folder, *settings)
    rows = [{"step": step, "data/saturated": 0.25, "fresh/spread": 1.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def specification(place: str, tmp_path) -> dict:
    assert main(["dashboard", place, "--out", str(tmp_path / "d.json")]) == 0
    text = (tmp_path / "d.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    return json.loads(text)


def test_the_specification_of_a_run(run, tmp_path):
    spec = specification(str(run), tmp_path)
    assert (spec["entity"], spec["project"], spec["x"]) == ("team", "digits", "step")
    sections = {section["name"]: section["panels"] for section in spec["sections"]}
    assert list(sections) == ["Health", "Samples", "Energies and training", "Evaluation", "Speed"]
    lines = {panel["title"]: panel for panels in sections.values() for panel in panels if panel["kind"] == "line"}
    assert {title: tuple(lines[title]["keys"]) for title, _ in CHARTS} == dict(CHARTS)
    records = read(run)
    for title, keys in CHARTS:
        bounds = healthy_range(records, metric_of(keys[0]))
        shown = lines[title]["healthy"]
        assert shown == (None if bounds is None else list(bounds)), title
    assert lines["Spread of fresh chains"]["healthy"] == [0.5, 2.0]
    assert lines["Pixels of fresh chains at a bound"]["healthy"] == [0.0, 0.5]  # .25 above the data's
    assert lines["Spread of fresh chains"] in sections["Health"] and lines["Seconds a step"] in sections["Speed"]
    media = [key for panel in sections["Samples"] for key in panel["keys"]]
    assert media == ["samples/fresh", "samples/buffer", "samples/data", *(f"samples/class_{y}" for y in range(10))]
    keys = {key for panel in lines.values() for key in panel["keys"]}
    assert set(SUMMARIES) <= keys and "summary:best/frechet_ratio" in spec["columns"]


def test_the_specification_of_a_project(tmp_path):
    spec = specification("team/photographs", tmp_path)
    assert (spec["entity"], spec["project"]) == ("team", "photographs")
    ranges = {p["title"]: p["healthy"] for section in spec["sections"] for p in section["panels"]}
    assert ranges["Pixels at a bound"] is None  # which is relative to a run's data
    assert ranges["Worst sign of divergence"] == [0.0, 1.0]
    assert specification("photographs", tmp_path)["entity"] is None


@pytest.mark.parametrize("place", ["a/b/c", "team/", ""])
def test_what_is_neither_a_run_nor_a_project(place, tmp_path, capsys):
    assert main(["dashboard", place, "--out", str(tmp_path / "d.json")]) == 2
    assert main(["dashboard", str(tmp_path), "--out", str(tmp_path / "d.json")]) == 2
    assert "nor a W&B project" in capsys.readouterr().err


def test_without_the_package_the_remedy_is_said(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    assert main(["dashboard", "team/project"]) == 2
    said = capsys.readouterr().err
    assert "ebm[dashboard]" in said and "--out FILE.json" in said


def test_workspace_and_report_reach_the_server(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    server = StandIn()
    for name, value in (server.environment | {"WANDB_CONFIG_DIR": tmp_path, "NETRC": tmp_path / "netrc"}).items():
        monkeypatch.setenv(name, str(value))
    code = main(["dashboard", str(run)])
    said = capsys.readouterr()
    server.close()
    assert code == 0, said.err
    print(server.views.keys())
    spec = specification(str(run), tmp_path)
    for view in map(json.dumps, server.views.values()):
        for section in spec["sections"]:
            assert section["name"] in view
            assert all(f'"{key}"' in view for panel in section["panels"] for key in panel["keys"])
        assert "Spread of fresh chains (healthy: 0.5 to 2)" in view
    assert titled({"title": "Steps", "healthy": [0.0, 0.0]}) == "Steps (healthy: 0)"
