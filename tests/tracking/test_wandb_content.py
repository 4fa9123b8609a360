"""What teams compare runs by in W&B: read back from the files of real runs that logged offline."""

import json
import sys
from pathlib import Path

import pytest
from runs import command, finish
from wandb_reader import history, records

from ebm.__main__ import parse
from ebm.commands import evaluate
from ebm.commands.sync import is_closed, parts_of
from ebm.config import load_config
from ebm.data import load_manifest
from ebm.errors import ConfigError
from ebm.runtime.checkpoint import read_tensors
from ebm.runtime.run_directory import reserved
from ebm.tracking import Tracker
from ebm.tracking.delivery import add_evaluation, best_frechet
from ebm.tracking.wandb_run import SUMMARIES, send_evaluation

CHECKPOINT = "checkpoints/step_00000030"


@pytest.fixture(autouse=True, scope="module")
def own_wandb_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        for name in ("WANDB_MODE", "WANDB_NOTES", "WANDB_JOB_TYPE", "WANDB_TAGS"):
            patch.delenv(name, raising=False)
        patch.setenv("SLURM_JOB_ID", "4711")
        yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    """A conditional run of 30 steps, without DONE's directory being changed by the tests below, except for W&B's."""
    folder = tmp_path_factory.mktemp("logged")
    settings = {
        "train__steps": 30,
        "tracking__samples_every": 15,
        "energy__num_classes": 10,
        "buffer__reinit_prob": 0.05,
    }
    settings |= {"tracking__wandb": "offline", "tracking__artifacts": "final", "tracking__tags": "[digits,try]"}
    settings |= {"tracking__notes": "a note", "tracking__job_type": "training", "tracking__sample_steps": 2}
    finish(command(1, folder / "run", digits, **settings), folder / "log")
    return folder / "run"


def part(run_dir: Path, number: int = -1) -> Path:
    """The file of an offline part, by default the newest one."""
    (file,) = parts_of(run_dir / "wandb")[number].glob("*.wandb")
    return file


def config_of(file: Path) -> dict:
    """The W&B config at the end of a part."""
    found = {}
    for record in records(file):
        updates = record.config.update if record.HasField("config") else record.run.config.update
        found |= {item.key: json.loads(item.value_json) for item in updates if item.key}
    return found


def summary_of(file: Path) -> dict:
    """What the client wrote as summaries, as {key or (key, ...): value}."""
    items = [item for record in records(file) if record.HasField("summary") for item in record.summary.update]
    return {item.key or tuple(item.nested_key): json.loads(item.value_json) for item in items}


def test_config_notes_and_where_it_ran(run, digits):
    (begun,) = [record.run for record in records(part(run, 0)) if record.HasField("run")]
    assert (begun.notes, begun.job_type, set(begun.tags)) == ("a note", "training", {"digits", "try"})
    config = config_of(part(run, 0))
    assert config["train"]["steps"] == 30 and config["energy"]["num_classes"] == 10
    facts = config["environment"]
    weights = read_tensors(run / CHECKPOINT, "ema")
    assert facts["parameters"] == sum(w.numel() for name, w in weights.items() if not name.endswith(("._u", "._v")))
    manifest = load_manifest(str(digits))
    assert (facts["world_size"], facts["nodes"], facts["device"], facts["precision"]) == (1, 1, "CPU", "no")
    assert facts["slurm_job"] == "4711" and facts["flops_per_step"] > 2 * 64 * facts["parameters"]
    assert (facts["data"], facts["data_identity"]) == (str(manifest.title), manifest.identity)


def test_metrics_summaries_and_panels(run):
    rows = history(part(run, 0))
    metrics = {row["step"]: row for row in rows if "train/loss" in row}
    assert list(metrics) == list(range(1, 31))
    assert all(row["perf/images_per_s"] > 0 for row in metrics.values())
    for key in ("fresh/spread", "fresh/auc", "heldout/auc", "heldout/energy_mean"):
        assert [step for step, row in metrics.items() if key in row] == [15, 30], key
    defined = [record.metric for record in records(part(run, 0)) if record.HasField("metric")]
    kept = {metric.name: metric.summary for metric in defined if metric.name in SUMMARIES}
    assert set(kept) == set(SUMMARIES)
    assert kept["health/warning"].max and kept["health/warning"].last and kept["frechet/fresh_ratio"].min
    worst = max(metrics.values(), key=lambda row: row["health/warning"])
    summary = summary_of(part(run, 0))
    assert (summary["worst/warning"], summary["worst/step"]) == (worst["health/warning"], worst["step"])
    shown = {key.split("/_type")[0]: row for row in rows for key in row if key.endswith("/_type")}
    panels = {"samples/fresh", "samples/buffer", "samples/data", *(f"samples/class_{y}" for y in range(10))}
    assert panels | {"energy/pos", "energy/neg", "energy/fresh", "energy/heldout"} == set(shown)
    caption = "step 30: 2 steps from noise, averaged weights"
    assert shown["samples/fresh"]["samples/fresh/caption"] == caption
    assert (
        shown["samples/class_3"]["samples/class_3/caption"] == "step 30: class 3, 2 steps from noise, averaged weights"
    )
    artifacts = [record.artifact for record in records(part(run, 0)) if record.HasField("artifact")]
    assert sorted(artifact.type for artifact in artifacts) == ["checkpoint", "model", "samples"]
    (model,) = [artifact for artifact in artifacts if artifact.type == "model"]
    assert {entry.path for entry in model.manifest.contents} == {"ema.safetensors", "config.yaml", "metrics.json"}
    assert json.loads(model.metadata)["step"] == 30 and set(model.aliases) == {"latest", "step_00000030"}


def test_evaluations_go_to_the_same_run(run, capsys):
    """By the command: a closed part of the run's own id, with the values at the checkpoint's step."""
    before = parts_of(run / "wandb")
    arguments = parse(["evaluate", str(run), "--metrics", "energy", "--num", "8", "--steps", "2", "--log"])
    assert evaluate.run(arguments) == 0
    assert f"python -m ebm sync {run}" in capsys.readouterr().out
    (new,) = [path for path in parts_of(run / "wandb") if path not in before]
    assert is_closed(new, 0.0, is_newest=True, training=False) and new.name.endswith((run / "wandb_id").read_text())
    (row,) = history(part(run))
    values = json.loads((run / "evaluation.json").read_text())["values"]
    assert row["step"] == 30 and {key: row[key] for key in values} == values and "energy/heldout" in " ".join(values)
    assert config_of(part(run))["environment"]["slurm_job"] == "4711"  # as the training had it
    with reserved(run), pytest.raises(ConfigError, match="is being trained"):
        evaluate.run(arguments)


def test_the_best_evaluation_and_its_model(run):
    settings = {"num": 2000, "steps": 200, "weights": "ema"}
    assert best_frechet(run) is None
    for step, ratio, own in ((10, 1.2, {"num": 50}), (20, 2.0, {}), (30, 1.5, {}), (40, 1.7, {})):
        values = {"frechet/fresh_ratio": ratio}
        add_evaluation(run, {"step": step, "settings": settings | own, "values": values})
    with (run / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 3}\n{"torn')
    assert best_frechet(run) == (1.5, 30)  # of those with the newest one's settings
    config = load_config(run / "config.yaml")
    send_evaluation(config, run, run / CHECKPOINT, {"frechet/fresh_ratio": 1.5, "density/verdict": "walk"}, 30)
    (row,) = history(part(run))
    assert (row["step"], row["frechet/fresh_ratio"]) == (30, 1.5) and "density/verdict" not in row
    summary = summary_of(part(run))
    assert (summary["best/frechet_ratio"], summary["best/step"]) == (1.5, 30) and "worst/warning" in summary
    (model,) = [record.artifact for record in records(part(run)) if record.HasField("artifact")]
    assert model.type == "model" and set(model.aliases) == {"latest", "best", "step_00000030"}
    assert json.loads(model.metadata) == {"step": 30, "frechet/fresh_ratio": 1.5}
    off = load_config(run / "config.yaml", ["tracking.wandb=disabled"])
    with pytest.raises(ConfigError, match=r"--log: .*tracking\.wandb"):
        send_evaluation(off, run, run / CHECKPOINT, {}, 30)


def test_a_resumed_run_keeps_its_worst_warning(tmp_path):
    """W&B takes the summaries of a run's last part for those of the whole run."""
    (tmp_path / "run").mkdir()
    config = load_config(None, [f"run.dir={tmp_path / 'run'}", "tracking.wandb=offline", "tracking.wandb_timeout=60"])
    for first, warnings in ((1, [0.2, 3.0, 0.4]), (4, [0.1, 0.5])):
        tracker = Tracker(config, tmp_path / "run", first - 1, {"world_size": 1})
        for step, warning in enumerate(warnings, first):
            tracker.log(step, {"train/loss": 0.0, "health/warning": warning})
        tracker.close(0)
    parts = [next(path.glob("*.wandb")) for path in parts_of(tmp_path / "run" / "wandb")]
    assert len(parts) == 2 and parts[0].name == parts[1].name
    for file in parts:
        summary = summary_of(file)
        assert (summary["worst/warning"], summary["worst/step"]) == (3.0, 2)


def test_tensorboard(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    settings = [f"run.dir={tmp_path / 'run'}", "tracking.wandb=disabled", "tracking.tensorboard=true"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ConfigError, match=r"tracking\.tensorboard=true needs .*ebm\[tensorboard\]"):
            Tracker(load_config(None, settings), tmp_path / "run", 0)
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 6), (4, 5)):  # killed after step 6, and resumed at step 3
        tracker = Tracker(load_config(None, settings), tmp_path / "run", first - 1)
        for step in range(first, last + 1):
            tracker.log(step, {"train/loss": float(10 * first + step)})
        tracker.panels(last, {"samples/fresh": torch.zeros(4, 1, 8, 8)})
        tracker.histograms(last, {"energy/pos": torch.randn(8), "energy/neg": torch.tensor([float("nan")])})
        tracker.close(0)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 11), (2, 12), (3, 13), (4, 44), (5, 45)]
    assert events.Tags()["images"] == ["samples/fresh"] and events.Tags()["histograms"] == ["energy/pos"]
