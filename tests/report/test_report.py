"""python -m ebm report: a page of its own, with the numbers of the run, whatever state the run is in."""

import base64
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from made_runs import VECTORS, make_run
from PIL import Image
from runs import ROOT, command, environment, finish, records

from ebm.__main__ import main as ebm
from ebm.commands.report import energies_of
from ebm.config import load_config, to_yaml
from ebm.data.shards import ensure_shards, write_shards
from ebm.data.sources import open_source
from ebm.inference.run import open_run
from ebm.report import METRICS, metric_of
from ebm.report.page import MAX_POINTS, number, thinned
from ebm.training.divergence import drift

VOID = {"img", "meta", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of it: pictures, values of cells, verdicts, whatever would be loaded."""

    def __init__(self, path):
        super().__init__()
        self.open, self.loaded, self.pictures, self.values, self.verdicts = [], [], [], {}, {}
        self.text, self._cell, self._row = "", None, None
        self.feed(path.read_text())
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "iframe", "link", "object", "base")
        self.loaded += [v for k, v in attributes.items() if k in ("src", "href", "srcset", "data") and v]
        if tag == "img":
            self.pictures.append(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "data-of" in attributes:
            self._cell = attributes["data-key"], attributes["data-of"]
        if "data-verdict" in attributes:
            self._row = attributes["data-verdict"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "td":
            self._cell = None
        if tag == "tr":
            self._row = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self.values[self._cell] = data
        if self._row is not None and data in ("in range", "out of range"):
            self.verdicts[self._row] = data


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained")
    for split in ("train", "test"):
        ensure_shards(str(path / split), "digits", split)
    settings = {"evaluate__shards": path / "test", "tracking__samples_every": 10}
    finish(command(1, path / "run", path / "train", train__steps=30, **settings), path / "log")
    return path / "run"


def write_run(path, rows, **files):
    """A run directory without a run: config, lines of metrics, other files."""
    path.mkdir()
    settings = ["tracking.wandb=disabled", f"run.dir={path}", "data.shards=/nowhere", "train.steps=100"]
    (path / "config.yaml").write_text(to_yaml(load_config(None, settings)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def report(path, *options) -> Page:
    assert ebm(["report", str(path), *options]) == 0
    return Page(path / "report.html")


def test_it_needs_nothing_else_and_has_the_runs_numbers(trained):
    page = report(trained)
    assert page.loaded and all(re.match(r"data:image/(png|svg\+xml);base64,", source) for source in page.loaded)
    assert (
        "url(" not in (trained / "report.html").read_text() and "@import" not in (trained / "report.html").read_text()
    )
    lines = records(trained / "metrics.jsonl")
    of = {"last": lambda v: v[-1], "smallest": min, "median": np.median, "largest": max}
    expected = {
        (key, name): number(float(f([line[key] for line in lines if key in line])))
        for key in {key for line in lines for key in line} - {"step"}
        for name, f in of.items()
    }
    assert page.values == expected
    for fact in ("done", "held out", "chains", "Averaged weights of step 30", "energy/auc"):
        assert fact in page.text, fact
    now = np.median([line["energy/auc"] for line in lines[-20:]])
    assert page.verdicts["energy/auc"] == ("in range" if 0.2 <= now <= 0.9 else "out of range")
    assert page.verdicts["health/rollbacks"] == "in range"


def test_its_pictures_are_pictures(trained):
    page = report(trained)
    kinds = {"png": 0, "svg+xml": 0}
    for picture in page.pictures:
        kind, content = re.match(r"data:image/([a-z+]+);base64,(.*)", picture["src"]).groups()
        kinds[kind] += 1
        content = base64.b64decode(content)
        if kind == "png":
            assert Image.open(BytesIO(content)).width > 100
        else:
            tree = ET.fromstring(content)
            links = [v for e in tree.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert tree.tag.endswith("svg") and all(link.startswith("#") for link in links)
    steps = [picture["alt"] for picture in page.pictures if picture["alt"].startswith("samples")]
    assert steps == ["samples, step 30", "samples, step 20", "samples, step 10"]
    drawn = len(set(records(trained / "metrics.jsonl")[0]))
    assert kinds["png"] == 3 and 10 <= kinds["svg+xml"] <= drawn


def test_a_checkpoint_of_the_run_gives_its_energies(trained):
    assert ebm(["report", str(trained / "checkpoints/step_00000020"), "--energies", "50"]) == 0
    page = Page(trained / "report.html")
    assert "Averaged weights of step 20" in page.text and "training50" in page.text.replace(" ", "")


def test_an_unfinished_run_with_a_torn_line_a_rollback_and_nothing_else(tmp_path):
    rows = [{"step": s, "train/loss": 1.0 / s, "health/rollbacks": 1, "health/lr_scale": 1 if s < 5 else 0.1,
             "own/number": s * 2, "sampler/grad_norm": "NaN" if s == 9 else 0.5} for s in range(1, 10)]  # fmt: skip
    past = [{"from": 7, "to": 4, "rollbacks": 1, "reason": "step 7: <b>chains</b> at the bounds", "divergence": {}}]
    run = write_run(
        tmp_path / "run", rows, rollbacks=past, attempts={"step": 4, "starts": 3, "reason": "killed & <gone>"}
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/lo')
    page = report(run)
    assert "unfinished, step 9 of 100" in page.text and "1 damaged line(s)" in page.text
    assert "step 7: back to step 4; step 7: <b>chains</b> at the bounds" in page.text  # as text: no tag was opened
    assert "3 starts from step 4; the last ended with: killed & <gone>" in page.text
    assert "step 5: learning rate × 0.1" in page.text and "holds no valid checkpoint yet" in page.text
    assert page.values["train/loss", "last"] == number(1 / 9) and page.values["own/number", "largest"] == "18"
    assert page.values["sampler/grad_norm", "last"] == "nan" and page.verdicts["health/rollbacks"] == "out of range"
    assert "own/number" in [picture["alt"] for picture in page.pictures]


@pytest.mark.parametrize(("step", "verdict"), [(25, None), (26, "out of range")])
def test_fresh_chains_are_judged_once_the_run_is_long_enough(tmp_path, step, verdict):
    """A panel's metrics are those of the newest lines, or of the newest panel where these have none."""
    rows = [{"step": s, "train/loss": 0.0} for s in range(1, step)] + [{"step": step, "fresh/spread": 0.02}]
    rows[0]["fresh/spread"] = 1.0
    page = report(write_run(tmp_path / "run", rows), "--energies", "0")
    assert page.verdicts.get("fresh/spread") == verdict
    assert ("too early to judge" in page.text) == (verdict is None)
    late = write_run(tmp_path / "late", [*rows, *({"step": step + s, "train/loss": 0.0} for s in range(1, 40))])
    assert report(late, "--energies", "0").verdicts["fresh/spread"] == "out of range"


def test_a_name_that_is_markup_stays_a_name(tmp_path):
    name = "<script>alert(1)</script>\"'&"
    run = write_run(tmp_path / "run", [{"step": 1, name: 2.0}])
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("name: null", f"name: {json.dumps(name)}")
    )
    page = report(run, "--energies", "0")
    assert page.text.count(name) >= 2 and page.values[name, "last"] == "2"


@pytest.mark.parametrize("content", ["", "\0\0\n", "[]\n", '{"x": 1}\n', '{"step": "NaN"}\n'])
def test_a_run_without_a_line_of_metrics(tmp_path, content):
    run = write_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(content)
    (run / "samples").mkdir()
    (run / "samples/step_00000010.png").write_bytes(b"no picture")
    for name in ("rollbacks", "attempts"):
        (run / f"{name}.json").write_text('{"torn')
    page = report(run)
    assert "no line of metrics yet" in page.text and "None yet" in page.text and not page.pictures


def test_errors(tmp_path, capsys, trained):
    assert ebm(["report", str(tmp_path)]) == 4 and "no run directory" in capsys.readouterr().err
    assert ebm(["report", str(trained), "--energies", "-1"]) == 2 and "--energies -1" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert ebm(["report", str(trained), "--out", str(tmp_path / "file" / "x.html")]) == 2
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    assert ebm(["report", str(tmp_path)]) == 2 and "nonsense" in capsys.readouterr().err


def test_many_points_are_thinned_and_no_spike_is_lost():
    steps, values = np.arange(50_000.0), np.zeros(50_000)
    values[[123, 40_001]] = 7.0, -7.0
    kept, shown = thinned(steps, values)
    assert len(kept) <= MAX_POINTS + 2 and (np.diff(kept) > 0).all()
    assert dict(zip(kept, shown, strict=True))[123.0] == 7.0 and shown.min() == -7.0
    assert thinned(steps[:10], values[:10])[0] is not None


WRONG = ("[[1], {}, 3]", '{"step": "x", "starts": [], "values": 7, "lengths": {}}', "[" * 5000, "null",
         '"text"', "1e999", '[{"from": "a", "to": null}, {"from": 1, "to": 2, "reason": {"a": []}}]',
         '{"step": 1, "values": {"a": [], "b": true, "length/1": "x", "c": 1e308}, "lengths": [1, "2", -3, null]}',
         '{"step": -1, "starts": true, "reason": 5}', '{"step": 1, "starts": 1e3, "reason": null}')  # fmt: skip


@pytest.mark.parametrize("content", WRONG)
def test_records_of_wrong_types_are_passed_over(tmp_path, content):
    """(They ended the report with a traceback.)"""
    run = write_run(tmp_path / "run", [{"step": 1, "train/loss": 2.0}])
    for name in ("rollbacks", "attempts", "evaluation"):
        (run / f"{name}.json").write_text(content)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(content + "\n")
    assert report(run, "--energies", "0").values["train/loss", "last"] == "2"


def test_pictures_that_are_none(tmp_path):
    """Of the formats that Pillow knows some start programs, and a small file may hold a picture of gigabytes."""
    run = write_run(tmp_path / "run", [{"step": 1}])
    (run / "samples").mkdir()
    Image.new("L", (9, 9)).save(run / "samples/step_00000001.png", format="eps")
    Image.new("L", (9, 9)).save(run / "samples/step_00000002.png", format="gif")
    Image.new("1", (20_000, 20_000)).save(run / "samples/step_00000003.png")
    Image.new("1", (9_000, 9_000)).save(run / "samples/step_00000004.png")
    assert not [p for p in report(run, "--energies", "0").pictures if p["alt"].startswith("samples")]


def test_energies_of_vectors_are_those_of_the_vectors(tmp_path):
    """(They went through the scaling of images, from 256 levels to [-1, 1].)"""
    x = 3 + torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "x.npy", x.numpy())
    write_shards(open_source(f"npy:{tmp_path}/x.npy"), tmp_path / "shards", progress=False)
    settings = [*VECTORS, "data.shape=[2]", "sampler.bounds=null", f"data.shards={tmp_path}/shards"]
    run = make_run(tmp_path / "run", *settings, "loss.negatives=noise")
    energies, note = energies_of(run, 1000)
    assert note == "Averaged weights of step 1" and list(energies) == ["training"]
    np.testing.assert_allclose(energies["training"], open_run(run).energy(x).numpy(), rtol=1e-5)


def test_shards_are_opened_with_the_runs_access(tmp_path):
    """(Without data.schemes, retries and the rest of the config.)"""
    import fsspec

    ensure_shards(str(tmp_path / "shards"), "digits", "test")
    files = fsspec.filesystem("memory")
    for file in (tmp_path / "shards").iterdir():
        files.pipe(f"/set/{file.name}", file.read_bytes())
    settings = [
        "data.shards=memory://set",
        "data.schemes=[memory]",
        "data.source=null",
        f"data.cache_dir={tmp_path}/cache",
    ]
    run = make_run(tmp_path / "run", *settings, "loss.negatives=noise", "energy.features=[4,8]", "evaluate.shards=null")
    energies, note = energies_of(run, 100)
    assert len(energies["training"]) == 100, note


@pytest.mark.parametrize("sampler", [
    ["sampler.kind=hmc", "sampler.step_size=0.1"], ["sampler.kind=mala", "sampler.step_size=0.02"],
    ["sampler.step_size=10", "sampler.step_size_end=1", "sampler.schedule=linear"],
], ids=["hmc", "mala", "schedule"])  # fmt: skip
def test_the_healthy_gradient_is_that_of_the_drifts_limit(sampler):
    """(For HMC the report's was 20 times off, and it knew of no schedule.)"""
    config = load_config(None, sampler)
    _, high = metric_of("sampler/grad_norm").bounds(config, {})
    assert drift(high, config.sampler, config.data.shape) == pytest.approx(config.health.max_drift)


# docs/monitoring.md


def documented() -> list[tuple[str, ...]]:
    """(key, meaning, unit, healthy) of each row of its table."""
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", (ROOT / "docs/monitoring.md").read_text(), re.MULTILINE)
    return [(key, *(cell.strip() for cell in rest.split(" | "))) for key, rest in rows]


def test_every_metric_that_a_run_writes_is_documented_and_no_other(trained):
    assert documented() == [(m.key, m.meaning, m.unit, m.healthy) for m in METRICS]
    written = {key for line in records(trained / "metrics.jsonl") for key in line}
    names = {m.key for m in METRICS if not m.key.endswith("*")} - {"perf/gpu_memory_gb", "perf/mfu"}  # of GPUs
    patterns = {m.key[:-1] for m in METRICS if m.key.endswith("*")}
    assert names <= written, f"documented, but not written: {names - written}"
    assert all(any(key.startswith(p) for p in patterns) for key in written - names), written - names
    assert metric_of("loss/kl").key == "loss/*" and metric_of("sampler/acceptance_mean").key == "sampler/acceptance*"
    assert metric_of("sampler/saturated").key == "sampler/saturated" and metric_of("own/number") is None


def test_the_pictures_of_the_docs_are_there():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "docs/monitoring.md").read_text()):
        assert Image.open(ROOT / "docs" / name).width > 600


def test_training_does_not_load_what_only_reports_need():
    code = "import sys, ebm.training.loop; assert not {'matplotlib', 'wandb', 'ebm.report'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment())
