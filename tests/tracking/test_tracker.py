"""Records, panels, progress, and the real W&B client."""

import io
import json
import logging
import math
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from wandb_reader import history, records
from wandb_server import KEY, StandIn

from ebm.config import load_config
from ebm.inference.images import grid, pictures, side_by_side
from ebm.runtime.stopping import Watchdog
from ebm.tracking import Progress, Tracker
from ebm.tracking.tracker import Alerts, Records
from ebm.tracking.wandb_run import WandbRun


@pytest.fixture(autouse=True)
def own_wandb_home(tmp_path, monkeypatch):
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()  # it remembers the settings it first saw


def config(tmp_path, *overrides: str):
    (tmp_path / "run").mkdir(exist_ok=True)
    return load_config(None, [f"run.dir={tmp_path / 'run'}", "tracking.wandb_timeout=60", *overrides])


def said_in_time(shown, text: str, seconds: float = 60) -> bool:
    """Whether W&B's thread says `text`."""
    end, said = time.monotonic() + seconds, ""
    while text not in said and time.monotonic() < end:
        said += shown()
        time.sleep(0.05)
    return text in said


def test_records_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = Records(path, 0)
    for step in range(1, 31):
        records.append({"step": step, "x": float("nan") if step == 3 else step / 2})
    records.close()
    with path.open("a") as file:
        file.write('{"step": 31, "x"')  # torn by a crash
    Records(path, 20).close()
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in kept] == list(range(1, 21))
    assert kept[2]["x"] == "NaN" and kept[3]["x"] == 2.0
    Records(path, 100).close()
    assert len(path.read_text().splitlines()) == 20


@pytest.mark.parametrize("torn", [b'{"step": 3, "x\n', b"\0" * 20, b"\0" * 20 + b"\n", b'{"step": 3}'])
def test_what_a_crash_leaves_is_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn)
    Records(path, 10).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    before = path.stat().st_ino
    Records(path, 10).close()
    assert path.stat().st_ino == before and [p.name for p in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_progress_lines(shown):
    progress = Progress(1000, 100)
    time.sleep(0.05)
    metrics = {
        "train/loss": -0.000012345,
        "energy/auc": 0.61,
        "energy/gap": 30.08,
        "health/warning": 0.2,
        "optim/lr": 1.0,
    }
    progress.update(200, metrics)
    line = shown()
    assert line.startswith("step 200/1000  ") and "it/s  left 0:00:0" in line
    assert line.rstrip().endswith("  loss -1.23e-05  gap 30.1  auc 0.61  warning 0.2")
    slow = Progress(1000, 100)
    slow._started -= 90
    slow.update(125, {})
    assert re.search(r"  3\.[67]\d? s/step  left 0:5\d:", shown())


def test_grids_show_every_image_and_any_channels():
    white_and_black = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8)])
    picture = grid(white_and_black, min_pixels=16)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert (picture == 255).sum() == (picture == 0).sum() == 3 * 8 * 8
    assert grid(torch.zeros(5, 3, 8, 8)).shape[2] == grid(torch.zeros(5, 2, 8, 8)).shape[2] == 3


def test_colours_survive_and_small_images_are_enlarged():
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(25, 3, 36, 36)
    for images in (red, torch.cat([red, red[:, :1]], dim=1)):  # a fourth channel is left out
        assert (grid(images).reshape(-1, 3) == [255, 0, 0]).all(axis=1).any()
    assert min(grid(red).shape[:2]) >= 256 and grid(torch.zeros(1, 1, 8, 8)).shape == (256, 256, 3)
    sheet = side_by_side({"one": grid(red), "two": grid(red)})
    assert sheet.width > 2 * grid(red).shape[1] and sheet.height > grid(red).shape[0]


def test_an_offline_run_and_its_resumption(tmp_path, shown):
    """Without a login: everything is in the .wandb file, on the axis `step`, and a resumed run keeps its id."""
    settings = config(tmp_path, "data.trace=true")
    tracker = Tracker(settings, tmp_path / "run", 0)
    for step in range(1, 31):
        tracker.log(step, {"train/loss": step / 10, "energy/auc": 0.5})
        tracker.trace(step, [[0, "a"]], [[0, 1, False]])
    tracker.panels(30, {"samples/fresh": torch.zeros(4, 1, 8, 8), "samples/data": torch.ones(4, 1, 8, 8)})
    tracker.histograms(30, {"energy/pos": torch.randn(32), "energy/neg": torch.randn(32)})
    tracker.close(0)
    assert "python -m ebm sync" in shown()
    assert Image.open(tmp_path / "run/samples/step_00000030.png").size[0] > 500

    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    rows = history(file)
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 31))
    assert [r["train/loss"] for r in rows if "train/loss" in r] == [s / 10 for s in range(1, 31)]
    axes = [(r.metric.name or r.metric.glob_name, r.metric.step_metric) for r in records(file) if r.HasField("metric")]
    assert ("*", "step") in axes
    last = {key.split("/_type")[0] for row in rows if row["step"] == 30 for key in row}
    for key in ("samples/fresh", "samples/data", "energy/pos", "energy/neg"):
        assert any(k.startswith(key) for k in last), (key, last)

    identity = (tmp_path / "run/wandb_id").read_text()
    tracker = Tracker(settings, tmp_path / "run", 20)
    tracker.log(21, {"train/loss": 0.0, "energy/auc": 0.5})
    tracker.close(0)
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all(f.name == f"run-{identity}.wandb" for f in files)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 22))


def test_disabled(tmp_path):
    tracker = Tracker(config(tmp_path, "tracking.wandb=disabled"), tmp_path / "run", 0)
    tracker.log(1, {"train/loss": 0.0})
    tracker.close(0)
    assert not (tmp_path / "run/wandb").exists()


def test_a_server_that_fails_leaves_the_run_offline(tmp_path, monkeypatch, shown):
    server = StandIn("fails")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker(config(tmp_path, "tracking.wandb_timeout=15"), tmp_path / "run", 0)
    tracker.log(1, {"train/loss": 1.0})  # goes on at once; the thread tries to connect, and keeps the call till then
    tracker.close(0)
    server.close()
    assert "logging offline instead" in shown()
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert [r["train/loss"] for r in history(file)] == [1.0]


@pytest.mark.parametrize(
    ("host", "env", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": KEY}, "online"),
        (None, {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("api.wandb.ai", {}, "online"),
        ("api.wandb.ai", {"WANDB_BASE_URL": "http://localhost:8080"}, "offline"),
        ("localhost:8080", {"WANDB_BASE_URL": "http://localhost:8080"}, "online"),
    ],
)
def test_auto_is_online_with_a_login(tmp_path, monkeypatch, host, env, mode):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if host:
        (tmp_path / "home" / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    monkeypatch.setattr(WandbRun, "_start", lambda self: None)  # the choice alone, no connection
    assert WandbRun(config(tmp_path), tmp_path / "run", 0).mode == mode


@pytest.mark.parametrize("absent", [True, False])
def test_training_goes_on_without_the_client(tmp_path, monkeypatch, shown, absent):
    if absent:
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker(config(tmp_path), tmp_path / "run", 0)
    assert ("W&B can't be used" in shown()) == absent
    tracker.log(1, {"train/loss": 0.0})
    tracker.close(0)
    assert not (tmp_path / "run/wandb").exists() and (tmp_path / "run/metrics.jsonl").read_text()


def test_what_w_and_b_refuses_is_said_once(tmp_path, shown):
    tracker = Tracker(config(tmp_path, "tracking.wandb=offline"), tmp_path / "run", 0)
    for step in (1, 2, 3):
        tracker.histograms(step, {"energy/pos": torch.tensor([0.0, float("nan")])})
    tracker.close(0)
    said = shown()
    assert said.count("not finite") == 1 and "3 calls failed" in said


def test_a_server_that_dies_holds_the_end_of_a_run_no_longer_than_the_timeout(tmp_path, monkeypatch, shown):
    server = StandIn()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker(config(tmp_path, "tracking.wandb_timeout=10"), tmp_path / "run", 0)
    assert said_in_time(shown, "W&B: http")
    tracker.log(1, {"train/loss": 1.0})
    server.close()
    tracker.log(2, {"train/loss": 2.0})
    began = time.monotonic()
    tracker.close(0)
    said = shown()
    assert time.monotonic() - began < 15
    assert "did not finish in 10 s" in said and "/wandb/run-*" in said
    (file,) = (tmp_path / "run/wandb").glob("run-*/*.wandb")
    assert [row["train/loss"] for row in history(file)] == [1.0, 2.0]


def test_records_rewind_to_a_step_wherever_they_are(tmp_path):
    """Durable, written, or in memory only for want of room."""
    for flushed_at in (0, 3, 7, 10):
        records = Records(tmp_path / f"{flushed_at}.jsonl", 0)
        for step in range(1, 11):
            records.append({"step": step})
            if step == flushed_at:
                assert records.flush()
        records.rewind(5)
        records.append({"step": 6, "again": True})
        records.close()
        lines = [json.loads(line) for line in (tmp_path / f"{flushed_at}.jsonl").read_text().splitlines()]
        assert lines == [{"step": step} for step in range(1, 6)] + [{"step": 6, "again": True}]


def logged_steps(run_dir) -> list[int]:
    (file,) = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))[-1:]
    return [row["step"] for row in history(file)]


def test_what_a_killed_start_did_not_hand_over_comes_with_the_next(tmp_path):
    """Lines of metrics up to the checkpoint, from the first that W&B may not have; as they were, a NaN included."""
    settings, run_dir = config(tmp_path, "tracking.wandb=offline"), tmp_path / "run"
    tracker = Tracker(config(tmp_path, "tracking.wandb=disabled"), run_dir, 0)
    for step in range(1, 31):
        tracker.log(step, {"train/loss": float("nan") if step == 18 else float(step), "energy/auc": 0.5})
    tracker.close(0)
    Tracker(settings, run_dir, 20).close(1)
    assert logged_steps(run_dir) == list(range(1, 21))
    identity = (run_dir / "wandb_id").read_text()
    assert (run_dir / "wandb_step").read_text() == f"{identity} 20\n"
    (run_dir / "wandb_step").write_text(f"{identity} 15\n")
    time.sleep(1)  # the directory is named by the second
    tracker = Tracker(settings, run_dir, 20)
    tracker.log(21, {"train/loss": 21.0, "energy/auc": 0.5})
    tracker.close(0)
    assert logged_steps(run_dir) == list(range(16, 22))
    (file,) = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))[-1:]
    assert [math.isnan(row["train/loss"]) for row in history(file)] == [row["step"] == 18 for row in history(file)]
    assert (run_dir / "wandb_step").read_text() == f"{identity} 21\n"
    time.sleep(1)
    tracker = Tracker(settings, run_dir, 21)
    tracker.rewind(12)  # what is logged from here on is another branch's
    tracker.close(1)
    assert (run_dir / "wandb_step").read_text() == f"{identity} 12\n"


def sent_by(tracking) -> tuple[Alerts, list]:
    sent = []
    return Alerts(tracking, lambda *alert: sent.append(alert)), sent


def test_alerts_on_divergence_and_slow_steps_once_in_a_while(tmp_path):
    tracking = config(tmp_path, "tracking.alert_every=1000").tracking
    alerts, sent = sent_by(tracking)
    for step in range(30):  # a panel now and then makes one line slow, which is nothing
        alerts.read(step, {"health/warning": 0.9, "perf/step_s": 2.0 if step % 5 == 0 else 0.1})
    assert not sent
    for step in range(30, 40):
        alerts.read(step, {"health/warning": 1.5, "perf/step_s": 0.5})
    assert [(title, text.split(":")[0], level) for title, text, level in sent] == [
        ("training may diverge", "step 30", "WARN"), ("steps are slow", "step 32", "WARN")]  # fmt: skip
    assert "0.5 s a step, 5.0 times" in sent[1][1]
    again, sent = sent_by(tracking.model_copy(update={"alert_every": 0.05}))
    for _ in range(2):
        again.event("rolled back", "a", "ERROR")
        again.event("rolled back", "b", "ERROR")
        time.sleep(0.1)
    assert [text for _, text, _ in sent] == ["a", "a"]
    none, sent = sent_by(tracking.model_copy(update={"alerts": False}))
    none.event("rolled back", "a")
    assert not sent


def test_a_stall_is_an_alert_before_it_is_the_end():
    heard, at = threading.Event(), []
    with Watchdog(60.0, 0) as dog:
        dog.on_stall(0.2, lambda seconds: (at.append(seconds), heard.set()))
        for _ in range(20):
            time.sleep(0.02)
            dog.beat()
        assert not at
        assert heard.wait(20) and at == [0.2]
        dog.beat()
        heard.clear()
        assert heard.wait(20)  # and again in the next one


def test_alerts_reach_w_and_b(tmp_path, shown):
    tracker = Tracker(config(tmp_path, "tracking.wandb=offline", "tracking.alert_every=60"), tmp_path / "run", 0)
    for step in (1, 2):
        tracker.log(step, {"train/loss": 1.0, "health/warning": 3.0})
    tracker.stalled(300.0)
    tracker.alert("rolled back", "to step 0", "ERROR")
    tracker.close(1)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    alerts = [r.alert for r in records(file) if r.HasField("alert")]
    assert [(a.title, a.level, a.wait_duration) for a in alerts] == [
        ("training may diverge", "WARN", 60_000), ("no step", "ERROR", 60_000), ("rolled back", "ERROR", 60_000),
    ]  # fmt: skip
    assert "no step in 300 s, the last line of metrics is step 2's" in alerts[1].text
    assert shown().count("training may diverge: step 1") == 1


def make_checkpoint(run_dir, step: int):
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    for name in ("manifest.json", "model.safetensors", "ema.safetensors"):
        (path / name).write_bytes(f"{name} {step}".encode() * 1000)
    (run_dir / "config.yaml").write_text("run: {}\n")
    return path


@pytest.mark.parametrize(("which", "steps"), [("none", []), ("final", [30]), ("all", [10, 20, 30])])
def test_checkpoints_and_samples_as_artifacts(tmp_path, which, steps):
    """What W&B is to upload is there, unchanged, when the run has long pruned its checkpoints."""
    run_dir = tmp_path / "run"
    settings = config(tmp_path, "tracking.wandb=offline", f"tracking.artifacts={which}", "train.steps=30")
    tracker = Tracker(settings, run_dir, 0)
    tracker.panels(20, {"samples/fresh": torch.zeros(4, 1, 8, 8)})
    made = [make_checkpoint(run_dir, step) for step in (10, 20, 30)]
    for path in made:
        tracker.log(int(path.name[5:]), {"train/loss": 0.5, "energy/auc": float("nan")})
        tracker.checkpoint(path)
    tracker.close(0)
    for file in (file for path in made for file in path.iterdir()):
        file.unlink()
    (file,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    artifacts = [r.artifact for r in records(file) if r.HasField("artifact")]
    held = {entry.path: entry.local_path for a in artifacts for entry in a.manifest.contents if a.type == "samples"}
    assert bool(held) == (which != "none")
    for path, local in held.items():
        assert Path(local).read_bytes() == (run_dir / "samples" / path).read_bytes()
    checkpoints = [a for a in artifacts if a.type == "checkpoint"]
    assert [set(a.aliases) for a in checkpoints] == [{"latest", f"step_{step:08d}"} for step in steps]
    for artifact, step in zip(checkpoints, steps, strict=True):
        files = {entry.path: entry for entry in artifact.manifest.contents}
        assert set(files) == {"manifest.json", "model.safetensors", "ema.safetensors"}
        for name, entry in files.items():
            assert Path(entry.local_path).read_bytes() == f"{name} {step}".encode() * 1000
    models = [a for a in artifacts if a.type == "model"]
    assert [set(a.aliases) for a in models] == [{"latest", f"step_{step:08d}"} for step in steps]
    for artifact, step in zip(models, steps, strict=True):
        files = {entry.path: Path(entry.local_path).read_text() for entry in artifact.manifest.contents}
        assert set(files) == {"ema.safetensors", "config.yaml", "metrics.json"}
        assert files["ema.safetensors"] == f"ema.safetensors {step}" * 1000 and files["config.yaml"] == "run: {}\n"
        assert json.loads(files["metrics.json"]) == json.loads(artifact.metadata) == {"step": step, "train/loss": 0.5}


def test_artifacts_are_bounded(tmp_path, shown):
    run_dir = tmp_path / "run"
    settings = config(tmp_path, "tracking.wandb=offline", "tracking.artifacts=all", "tracking.artifacts_gb=8e-5")
    tracker = Tracker(settings, run_dir, 0)
    for step in (10, 20, 30):
        tracker.checkpoint(make_checkpoint(run_dir, step))
    tracker.close(0)
    held = {path.name for path in (run_dir / "wandb/artifacts").iterdir()}
    assert held == {"step_00000010", "model_step_00000010"}
    said = shown()
    assert said.count("step_00000020 is left out") == 1 and "tracking.artifacts_gb" in said


def test_pictures_of_vectors_share_a_scale():
    near, far = torch.zeros(50, 2), torch.full((50, 2), 4.0)
    apart, alone = pictures({"near": near, "far": far}), pictures({"near": near})
    assert set(apart) == {"near", "far"} and apart["near"].shape == apart["far"].shape
    assert (apart["near"] != apart["far"]).any() and (apart["near"] != alone["near"]).any()
    assert pictures({"line": torch.zeros(3, 1)})["line"].shape == apart["near"].shape


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_of_the_log_stand_above_the_bar(monkeypatch, shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    progress = Progress(100, 0)
    progress.update(10, {"train/loss": 0.5})
    logging.getLogger("ebm.training").info("diverging")
    progress.close()
    before, _, after = terminal.getvalue().partition("diverging\n")
    assert before.endswith("\r") and "10/100" in before and "10/100" in after  # the bar is cleared, and drawn again


def test_a_user_without_a_home_logs_offline(tmp_path, monkeypatch):
    """A container whose user stands in no passwd file."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(WandbRun, "_start", lambda self: None)  # the choice alone, no connection
    assert WandbRun(config(tmp_path), tmp_path / "run", 0).mode == "offline"
