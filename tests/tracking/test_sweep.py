"""W&B's environment and its sweeps, by the real client and its agent, without a server; read back from its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from runs import ROOT, environment
from wandb_reader import history, records

from ebm.config import load_config
from ebm.tracking import Tracker, delivery

NAMES = ("PROJECT", "NAME", "DIR", "RUN_ID", "ENTITY", "TAGS", "DISABLED", "MODE", "RUN_GROUP", "SWEEP_ID", "API_KEY")


@pytest.fixture(autouse=True)
def own_wandb_home(tmp_path, monkeypatch):
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    for name in NAMES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    yield
    if sys.modules.get("wandb"):
        sys.modules["wandb"].teardown()


def track(tmp_path: Path, *overrides: str, first: int = 1) -> None:
    """Logs three rows of a run."""
    config = load_config(None, [f"run.dir={tmp_path / 'run'}", "tracking.wandb_timeout=60", *overrides])
    (tmp_path / "run").mkdir(exist_ok=True)
    tracker = Tracker(config, tmp_path / "run", first - 1)
    for step in range(first, first + 3):
        tracker.log(step, {"train/loss": 0.0})
    tracker.close(0)
    sys.modules["wandb"].teardown()


def run_record(file: Path):
    return next(record.run for record in records(file) if record.HasField("run"))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def test_the_environment_wins_over_the_defaults_and_the_config_over_both(tmp_path, monkeypatch):
    given = {"PROJECT": "theirs", "NAME": "nice", "RUN_ID": "abc123", "TAGS": "x,y", "MODE": "offline"}
    for name, value in (given | {"DIR": tmp_path / "scratch", "ENTITY": "team"}).items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    track(tmp_path)
    (file,) = files(tmp_path / "scratch")
    run = run_record(file)
    assert (run.run_id, run.project, run.display_name, set(run.tags)) == ("abc123", "theirs", "nice", {"x", "y"})
    assert run.entity == "team" and not files(tmp_path / "run")
    assert (tmp_path / "run" / "wandb_id").read_text() == "abc123"
    for name in given:
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    monkeypatch.setenv("WANDB_PROJECT", "another")
    track(tmp_path, first=4)  # resumed: what was obtained stays
    resumed = run_record(max(files(tmp_path / "scratch"), key=os.path.getmtime))
    assert (resumed.run_id, resumed.project) == ("abc123", "theirs")
    step = (tmp_path / "run" / "wandb_step").read_text()
    assert step == "abc123 6\n"
    track(tmp_path, "tracking.project=ours", "tracking.name=mine", "tracking.entity=us", first=7)
    chosen = max(files(tmp_path / "scratch"), key=os.path.getmtime)
    assert (run_record(chosen).project, run_record(chosen).display_name) == ("ours", "mine")
    assert [row["step"] for row in history(chosen)] == list(range(1, 10))  # nothing was delivered to that project


@pytest.mark.parametrize(
    ("setting", "variables", "mode"),
    [
        ("auto", {"WANDB_DISABLED": "true"}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_DISABLED": "true"}, "offline"),
        ("disabled", {"WANDB_MODE": "online"}, "disabled"),
        ("auto", {}, None),
    ],
)
def test_modes(setting, variables, mode):
    tracking = load_config(None, [f"tracking.wandb={setting}"]).tracking
    assert delivery.mode_of(tracking, variables) == mode


def test_a_damaged_record_begins_anew(tmp_path, caplog):
    (tmp_path / "wandb_run.json").write_text('{"project": 3}')
    assert delivery.obtained(tmp_path) is None and "can't be read" in caplog.text
    assert delivery.run_id(tmp_path, {"WANDB_RUN_ID": "../x"}) != "../x" and "is no W&B id" in caplog.text


AGENT = """
import json, os, queue, signal, sys, time
from pathlib import Path
from wandb.wandb_agent import Agent

os.environ["WANDB_SWEEP_ID"] = "sw33p"
agent = Agent(None, queue.Queue(), "sw33p")  # as `wandb agent` does, it sets WANDB_DIR
agent._sweep_command = json.loads(sys.argv[1])

def start(trial, **args):
    args = {"train.steps": 8, "checkpoint.every": 2, "train.log_every": 1, "sampler.num_steps": 1} | args
    command = {"run_id": trial, "program": "train.py", "args": {key: {"value": value} for key, value in args.items()}}
    agent._command_run(command)
    return agent._run_processes[trial]

def steps(trial):
    file = Path(f"runs/digits-sw33p/{trial}/metrics.jsonl")
    return len(file.read_text().splitlines()) if file.exists() else 0

for trial, lr in (("one", 0.001), ("two", 0.002), ("three", 0.003)):
    args = {"optim.lr": lr, "buffer.size": 256, "tracking.sample_steps": 2, "data.workers": 0}
    process = start(trial, **args, **({"train.steps": 500} if trial == "two" else {}))
    if trial == "two":
        folder = Path(f"runs/digits-sw33p/{trial}/wandb")  # the client takes some seconds to begin its file
        while not any(f.stat().st_size > 2000 for f in folder.glob("*/*.wandb")) and process.poll() is None:
            time.sleep(0.01)
        for child in psutil.Process(process._popen.pid).children(recursive=True):
            child.kill()
        process._popen.kill()
        process.wait()
        process = start(trial, **args, **{"train.steps": 500})
    assert process.wait() == 0, trial
"""


@pytest.mark.slow
def test_a_sweep_of_three_trials_one_of_them_resumed(tmp_path):
    """By launch/sweep.yaml's own command: each trial is a directory and one W&B run, with every row."""
    command = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())["command"]
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    done = subprocess.run(
        [sys.executable, "-c", "import psutil\n" + AGENT, json.dumps(command)], cwd=tmp_path, text=True, check=False,
        env=environment(WANDB_PROJECT="sweeps"), capture_output=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    for trial, steps in (("one", 8), ("two", 500), ("three", 8)):
        run_dir = tmp_path / "runs" / "digits-sw33p" / trial
        assert (run_dir / "DONE").exists() and (run_dir / "wandb_id").read_text() == trial
        parts = files(run_dir)
        assert len(parts) == (2 if trial == "two" else 1)
        rows = {row["step"] for part in parts for row in history(part) if "train/loss" in row}
        assert rows == set(range(1, steps + 1))
        first = [run_record(part) for part in parts]
        assert {(run.run_id, run.project, run.sweep_id) for run in first} == {(trial, "sweeps", "sw33p")}
    assert load_config(run_dir / "config.yaml").optim.lr == 0.003
