"""A run that is stopped, killed and resumed is one W&B run with one continuous axis, offline and once uploaded.

Whole runs under `accelerate launch` with the real client; its files are read back, and uploaded by `python -m ebm sync`
to a server on this machine that keeps what it gets."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from runs import ROOT, Run, command, environment, finish, records
from wandb_reader import history
from wandb_reader import records as wandb_records
from wandb_server import StandIn

from ebm.commands.sync import HEADER, QUIET, files_of, is_closed, parts_of, whole_records
from ebm.tracking.delivery import number_part

# A busy machine is slow now and then: not to be alerted of here.
SETTINGS = {
    "data__trace": "false", "tracking__wandb": "offline", "checkpoint__every": 50, "tracking__slow_factor": 1000,
}  # fmt: skip

FAULTY = {"train__steps": 60, "checkpoint__every": 20, "health__every": 5, "health__patience": 2}
ONE_RECORD = b":W&B\xe7\xcf\x00" + struct.pack("<IHB", 0, 3, 1) + bytes(3)
HALF_A_RECORD = b":W&B\xe7\xcf\x00" + struct.pack("<IHB", 0, 20, 1) + bytes(3)
NAN = '{"kind": "nan_weight", "rank": 0, "step": 43}'


@pytest.fixture
def server():
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def homes(tmp_path):
    return {f"WANDB_{name}_DIR": str(tmp_path / "home") for name in ("CONFIG", "CACHE", "DATA")}


def parts(run_dir: Path) -> list[Path]:
    """The run's W&B files, in the order in which they were begun."""
    return [file for part in parts_of(run_dir / "wandb") for file in files_of(part)]


def metric_rows(run_dir: Path) -> list[dict]:
    """The lines of metrics that W&B's files have, one after the other."""
    rows = [row for file in parts(run_dir) for row in history(file)]
    return [plain(row) for row in rows if "train/loss" in row]


def plain(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("_")}


def sync(server: StandIn, homes: dict, *arguments: str, expect: int = 0) -> str:
    call = [sys.executable, "-m", "ebm", "sync", *arguments]
    env = environment(**homes, **server.environment)
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_requeued_run_is_one_run(digits, server, homes, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = command(1, run_dir, digits, train__steps=260, tracking__group="sweep", **SETTINGS)
    run = Run(arguments, log, **homes)
    assert run.until_step(run_dir, 70)
    (run_dir / "STOP").touch()
    run.wait()
    run = Run(arguments, log, **homes)
    assert run.until_step(run_dir, 130)
    run.process.send_signal(signal.SIGTERM)
    run.wait()
    run = Run(arguments, log, **homes)
    assert run.until_step(run_dir, 210)
    run.kill()
    finish(arguments, log, **homes)

    identity = (run_dir / "wandb_id").read_text()
    assert {file.name for file in parts(run_dir)} == {f"run-{identity}.wandb"}
    assert len(parts(run_dir)) >= 3  # a start that is killed at once may not have one
    rows, true = metric_rows(run_dir), records(run_dir / "metrics.jsonl")
    assert {row["step"]: row for row in rows} == {row["step"]: row for row in true}  # the last row of a step counts
    assert sorted(row["step"] for row in true) == list(range(1, 261))
    every = [record for file in parts(run_dir) for record in wandb_records(file)]
    assert {r.run.run_group for r in every if r.HasField("run")} == {"sweep"}
    assert sum(r.HasField("preempting") for r in every) == 2  # the two starts that were asked to stop
    assert any(item.key == "proc.memory.rssMB" for r in every if r.HasField("stats") for item in r.stats.item)

    whole = next(file for file in parts(run_dir) if (file.parent / "closed").exists())
    end = whole.stat().st_size
    cut_anywhere(whole, tmp_path)
    (whole.parent / "closed").unlink()  # as if its client had been killed, with half a record at the end
    with whole.open("ab") as file:
        file.write(struct.pack("<IHB", 0, 20, 1) + bytes(3))
    for name, content in ("20010101_000000", b""), ("20010101_000001", whole.read_bytes()[:HEADER]):  # killed at once
        empty = whole.parent.with_name(f"offline-run-{name}-{identity}") / whole.name
        empty.parent.mkdir()
        empty.write_bytes(content)
        os.utime(empty, (0, 0))
    full = [file for file in parts(run_dir) if any(wandb_records(file))]
    said = sync(server, homes, str(run_dir))
    assert whole.stat().st_size == end
    uploaded = server.history(identity)
    assert list(server.runs) == [identity] and f"{run_dir}: {len(full)} files uploaded\n" in said
    assert [plain(row) for row in uploaded if "train/loss" in row] == rows
    assert all(a["_step"] < b["_step"] for a, b in pairwise(uploaded))
    sync(server, homes, str(run_dir))
    assert server.history(identity) == uploaded


def cut_anywhere(file: Path, tmp_path: Path) -> None:
    """Whatever is left of a file, its whole records are found, and all of them."""
    data, short, before = file.read_bytes(), tmp_path / "short.wandb", 0
    every = list(wandb_records(file))
    assert whole_records(data) == len(data)
    for length in range(0, len(data), 1009):
        short.write_bytes(data[: whole_records(data[:length])])
        found = list(wandb_records(short))
        assert found == every[: len(found)] and len(found) >= before
        assert len(whole_bytes := short.read_bytes()) <= length and whole_records(whole_bytes) == len(whole_bytes)
        before = len(found)
    assert before > len(every) / 2


@pytest.mark.slow
def test_it_is_uploaded_part_by_part_while_it_goes_on(digits, server, homes, tmp_path):
    run_dir = tmp_path / "run"
    settings = SETTINGS | {"train__steps": 1200, "tracking__offline_part": 2}
    run = Run(command(1, run_dir, digits, **settings), tmp_path / "log", **homes)
    sizes, seen = [], 1
    while run.process.poll() is None:
        if len(parts(run_dir)) > seen:
            seen = len(parts(run_dir))
            os.killpg(run.process.pid, signal.SIGSTOP)  # an upload can take longer than the run that is left
            sync(server, homes, str(run_dir))
            sizes.append(sum(map(len, (server.history(name) for name in server.runs))))
            os.killpg(run.process.pid, signal.SIGCONT)
        time.sleep(0.1)
    assert run.wait() == 0
    assert sum(r.HasField("preempting") for p in parts(run_dir) for r in wandb_records(p)) == len(parts(run_dir)) - 1
    assert "still written to" not in sync(server, homes, str(run_dir))
    (identity,) = server.runs
    steps = [row["step"] for row in server.history(identity) if "train/loss" in row]
    assert steps == list(range(1, 1201))
    assert len(parts(run_dir)) > 2 and len(set(sizes)) > 1  # it did arrive in parts


def test_divergence_is_an_alert_and_the_last_checkpoint_an_artifact(digits, server, homes, tmp_path):
    run_dir = tmp_path / "run"
    settings = SETTINGS | FAULTY | {"tracking__artifacts": "final", "tracking__samples_every": 50}
    finish(command(1, run_dir, digits, script="tests/faulty.py", **settings), tmp_path / "log", EBM_FAULT=NAN, **homes)
    texts = alerts(run_dir)
    assert "not finite" in texts["rolled back"] and "back to step 40" in texts["rolled back"]
    sync(server, homes, str(run_dir), "--every", "1")  # it is done, so once is enough
    assert set(server.alerts) == {"training may diverge", "rolled back"} == set(texts)
    identity = (run_dir / "wandb_id").read_text()
    made = {"checkpoint": run_dir / "checkpoints/step_00000060", "samples": run_dir / "samples"}
    files = [(kind, file) for kind, path in made.items() for file in path.iterdir()]
    true = {f"{kind}-{identity}/{file.name}": file.read_bytes() for kind, file in files}
    for file in (made["checkpoint"] / "ema.safetensors", run_dir / "config.yaml"):
        true[f"model-{identity}/{file.name}"] = file.read_bytes()
    last = json.loads(server.artifacts.pop(f"model-{identity}/metrics.json"))
    assert last == records(run_dir / "metrics.jsonl")[-1]
    assert server.artifacts == true
    assert not (run_dir / "wandb/artifacts").exists()


def test_the_end_by_divergence_is_an_alert(digits, homes, tmp_path):
    settings = SETTINGS | FAULTY | {"health__ladder": "false"}
    arguments = command(1, tmp_path / "run", digits, script="tests/faulty.py", **settings)
    finish(arguments, tmp_path / "log", 1, EBM_FAULT=NAN, **homes)
    assert "training diverged at step 45" in alerts(tmp_path / "run")["the run ended"]


def alerts(run_dir: Path) -> dict[str, str]:
    """Text by title."""
    every = (record for file in parts(run_dir) for record in wandb_records(file))
    return {record.alert.title: record.alert.text for record in every if record.HasField("alert")}


def test_what_can_not_be_uploaded_stays(homes, tmp_path):
    run_dir = tmp_path / "run"
    part = run_dir / "wandb/offline-run-20260101_000000-abc"
    part.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    (part / "run-abc.wandb").write_bytes(ONE_RECORD)
    (part / "closed").touch()
    failing = StandIn("fails")
    said = sync(failing, homes | {"WANDB_X_GRAPHQL_RETRY_MAX": "0"}, str(run_dir), expect=1)
    failing.close()
    assert "not uploaded (1 of 1 files)" in said and "wandb login" in said


def part_of(run_dir: Path, begun: str, content: bytes = ONE_RECORD) -> Path:
    """An offline part, as a training begins it at a local time."""
    part = run_dir / "wandb" / f"offline-run-{begun}-abc"
    part.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    (part / "run-abc.wandb").write_bytes(content)
    number_part(part)
    return part


def test_the_file_under_way_waits(tmp_path):
    part = part_of(tmp_path, "20260101_000000")
    now = (part / "run-abc.wandb").stat().st_mtime
    assert not is_closed(part, now, True, False) and is_closed(part, now, False, False)
    assert is_closed(part, now + QUIET + 1, True, False)
    assert not is_closed(part, now + QUIET + 1, True, True)  # a training that is suspended
    (part / "closed").touch()
    assert is_closed(part, now, True, True)
    (part / "closed").unlink()
    (part / "part").unlink()  # of a version that did not number them: the name alone says nothing
    assert not is_closed(part, now, False, False)


def test_the_file_under_way_is_not_cut_when_local_time_went_back(homes, tmp_path):
    """In autumn the clock shows an hour twice: the part that is written to has the smaller name."""
    before = part_of(tmp_path, "20261025_025900")
    (before / "closed").touch()
    under_way = part_of(tmp_path, "20261025_020100", HALF_A_RECORD)
    assert parts_of(tmp_path / "wandb") == [before, under_way]
    failing = StandIn("fails")
    said = sync(failing, homes | {"WANDB_X_GRAPHQL_RETRY_MAX": "0"}, str(tmp_path), expect=1)
    failing.close()
    assert "not uploaded (1 of 1 files)" in said and str(before) in said
    assert (under_way / "run-abc.wandb").read_bytes() == HALF_A_RECORD


def test_links_are_not_followed(homes, server, tmp_path):
    """What a link leads to is not the run's: it is neither cut nor emptied."""
    outside = tmp_path / "outside"
    outside.write_bytes(HALF_A_RECORD)
    part = part_of(tmp_path / "run", "20260101_000000")
    (part / "run-abc.wandb").unlink()
    (part / "run-abc.wandb").symlink_to(outside)
    (part / "closed").touch()
    assert "0 files uploaded" in sync(server, homes, str(tmp_path / "run"))
    lock = tmp_path / "run/wandb/sync.lock"
    lock.unlink()
    lock.symlink_to(outside)
    assert "is a link" in sync(server, homes, str(tmp_path / "run"), expect=1)
    assert outside.read_bytes() == HALF_A_RECORD


@pytest.mark.parametrize(("arguments", "code"), [(["nowhere"], 2), ([".", "--every", "0"], 2)])
def test_bad_usage(homes, tmp_path, capsys, monkeypatch, arguments, code):
    from ebm.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["sync", *arguments]) == code
    assert arguments[0] in capsys.readouterr().err
    (tmp_path / "config.yaml").touch()
    assert main(["sync", str(tmp_path)]) == 0
