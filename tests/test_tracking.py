"""Records, panels, progress, and the real W&B client."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from wandb_reader import history

from ebm.config import load_config
from ebm.figures import grid
from ebm.tracking import Progress, Records, Tracker


@pytest.fixture(autouse=True)
def own_wandb_home(tmp_path, monkeypatch):
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def config(tmp_path, *overrides: str):
    (tmp_path / "run").mkdir(exist_ok=True)
    return load_config(None, [f"run.dir={tmp_path / 'run'}", "tracking.wandb_timeout=60", *overrides])


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


def test_progress_lines(capsys):
    progress = Progress(1000, 100)
    time.sleep(0.05)
    progress.update(200, {"train/loss": -0.0123, "energy/auc": 0.61, "energy/gap": 0.03, "optim/lr": 1.0})
    line = capsys.readouterr().out
    assert line.startswith("step 200/1000  ") and "it/s  left 0:00:0" in line
    assert "loss -0.0123" in line and "auc 0.6100" in line and "lr" not in line


def test_grids_show_every_image_and_any_channels():
    white_and_black = torch.stack([torch.ones(1, 8, 8), -torch.ones(1, 8, 8)])
    picture = grid(white_and_black, min_pixels=16)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert (picture == 255).sum() == (picture == 0).sum() == 3 * 8 * 8
    assert grid(torch.zeros(5, 3, 8, 8)).shape[2] == grid(torch.zeros(5, 2, 8, 8)).shape[2] == 3


def test_an_offline_run_and_its_resumption(tmp_path, capsys):
    """Without a login: everything is in the .wandb file, on the axis `step`, and a resumed run keeps its id."""
    settings = config(tmp_path, "data.trace=true")
    tracker = Tracker(settings, tmp_path / "run", 0)
    for step in range(1, 31):
        tracker.log(step, {"train/loss": step / 10, "energy/auc": 0.5})
        tracker.trace(step, [[0, "a"]], [[0, 1, False]])
    tracker.panels(30, {"samples/fresh": torch.zeros(4, 1, 8, 8), "samples/data": torch.ones(4, 1, 8, 8)})
    tracker.histograms(30, {"energy/pos": torch.randn(32), "energy/neg": torch.randn(32)})
    tracker.close(0)
    assert "wandb sync" in capsys.readouterr().out
    assert Image.open(tmp_path / "run/samples/step_00000030.png").size[0] > 500

    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    rows = history(file)
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 31))
    assert [r["train/loss"] for r in rows if "train/loss" in r] == [s / 10 for s in range(1, 31)]
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


def test_an_unreachable_server_leaves_the_run_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    tracker = Tracker(config(tmp_path, "tracking.wandb_timeout=15"), tmp_path / "run", 0)
    assert "logging offline instead" in capsys.readouterr().out
    tracker.log(1, {"train/loss": 1.0})
    tracker.close(0)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert [r["train/loss"] for r in history(file)] == [1.0]
