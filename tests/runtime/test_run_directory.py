"""A run directory that others write to, remove, or fill with what is not ours."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from runs import ROOT, Run, command, environment, last_step, records

from ebm.config import load_config, to_yaml
from ebm.errors import ConfigError
from ebm.runtime import history
from ebm.runtime.distributed import World
from ebm.runtime.files import try_lock
from ebm.runtime.run_directory import RunDirectory


@pytest.fixture
def config(tmp_path):
    return lambda *settings: load_config(None, [f"run.dir={tmp_path / 'run'}", *settings])


@pytest.fixture
def opened(config):
    """Opens the run directory as rank 0 does, again and again."""
    before = []

    def open_it(*settings: str) -> RunDirectory:
        for run in before:
            run._locked.close()
        wanted = config(*settings)
        before[:] = [RunDirectory(wanted, World(wanted.train))]
        return before[0]

    return open_it


def alone(run_dir, digits, **settings) -> list[str]:
    """The arguments of `python train.py`, which keeps its own exit code."""
    arguments = command(1, run_dir, digits, **settings)
    return [sys.executable, *arguments[arguments.index(str(ROOT / "train.py")) :]]


def test_the_config_is_checked_under_the_lock(tmp_path, config, shown):
    """Two jobs that begin together with different configs: the second waits for the first, and is refused by its
    config, and not only by what stood there before."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (run_dir / "lock").open("w") as lock:
        assert try_lock(lock.fileno())
        refused = []

        def second():
            try:
                RunDirectory(config("optim.lr=0.5"), World(config().train))
            except ConfigError as error:
                refused.append(str(error))

        job = threading.Thread(target=second)
        job.start()
        time.sleep(0.5)
        (run_dir / "config.yaml").write_text(to_yaml(config("optim.lr=0.25")))
        (run_dir / "checkpoints/step_00000010").mkdir(parents=True)
    job.join(30)
    assert len(refused) == 1 and "optim.lr: 0.25 there, 0.5 now" in refused[0]
    assert "optim:\n  lr: 0.25" in (run_dir / "config.yaml").read_text()


def test_only_files_of_ours_are_removed(tmp_path, opened):
    run_dir = tmp_path / "run"
    (run_dir / "samples").mkdir(parents=True)
    (run_dir / "checkpoints").mkdir()
    users = ["notes.tmp", "config.yaml.tmp", "a.12.tmp", "samples/mine.png.12.tmp", "samples/x.tmp"]
    users += ["checkpoints/step_mine.tmp", "checkpoints/step_00000010.backup.tmp"]
    ours = ["config.yaml.12.tmp", "attempts.json.3.tmp", "DONE.77.tmp", "samples/step_00000010.png.12.tmp"]
    for name in (*users, *ours):
        (run_dir / name).write_text("x")
    for name in ("step_00000010.tmp", "step_00000010.gone.tmp"):
        (run_dir / "checkpoints" / name).mkdir()
    (run_dir / "outside").write_text("x")
    (run_dir / "rollbacks.json.5.tmp").symlink_to(run_dir / "outside")
    opened()
    assert all((run_dir / name).read_text() == "x" for name in (*users, "outside"))
    assert not any((run_dir / name).exists() for name in ours)
    assert not list((run_dir / "checkpoints").glob("step_00000010.*tmp/")) and (run_dir / "outside").exists()


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl"])
def test_links_are_not_followed(digits, tmp_path, name):
    """A file outside that a link in the run directory leads to is neither emptied nor written to."""
    outside = tmp_path / "outside"
    outside.write_text("precious\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(outside)
    done = subprocess.run(alone(tmp_path / "run", digits, train__steps=2), capture_output=True, text=True,
                          env=environment(), cwd=tmp_path)  # fmt: skip
    assert done.returncode in (1, 2) and "is a link" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert outside.read_text() == "precious\n"


@pytest.mark.parametrize("name", ["", " ", "a\tb"])
def test_a_directory_without_a_name(name):
    with pytest.raises(ConfigError, match=r"run\.dir"):
        load_config(None, [f"run.dir='{name}'"])


def test_a_run_directory_that_is_removed_ends_the_run(digits, tmp_path):
    run_dir = tmp_path / "run"
    run = Run(alone(run_dir, digits, train__steps=40, checkpoint__every=1000), tmp_path / "log")
    assert run.until_step(run_dir, 3)
    while run_dir.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
    assert run.wait(120) == 4
    said = run.log.read_text()
    assert "done:" not in said and "No such file or directory" in said and not run_dir.exists()


def test_a_removed_file_of_records_begins_anew(digits, tmp_path):
    run_dir = tmp_path / "run"
    run = Run(alone(run_dir, digits, train__steps=40, checkpoint__every=5), tmp_path / "log")
    assert run.until_step(run_dir, 7)
    (run_dir / "metrics.jsonl").unlink()
    assert run.wait(120) == 0 and "metrics.jsonl was removed" in run.log.read_text()
    steps = [record["step"] for record in records(run_dir / "metrics.jsonl")]
    assert steps == list(range(steps[0], 41)) and last_step(run_dir) == 40


WRONG = ["[]", "7", "null", '"x"', "{}", '{"step": "3"}', '[{"to": 1}]', "[[]]", "{", "\udcff", "[" * 100_000]
ROLLBACK = {"from": 5, "to": 3, "rollbacks": 1, "reason": "x", "divergence": {}}


@pytest.mark.parametrize("text", WRONG)
def test_records_of_another_kind(tmp_path, opened, shown, text):
    """attempts.json and environment.json begin anew, and say so; rollbacks.json is refused: the run depends on it."""
    run = opened()
    for name in ("attempts.json", "environment.json"):
        (run.path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    run.failed("no reason")
    run.begin(0, 1)
    run.failed("a reason")
    assert json.loads((run.path / "attempts.json").read_text())["reason"] == "a reason"
    assert len(json.loads((run.path / "environment.json").read_text())) == 1
    (run.path / "rollbacks.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    if text == "[]":
        assert run.resume_point() == (None, None)
        return
    with pytest.raises(ConfigError, match=r"rollbacks\.json"):
        run.resume_point()


def test_rollbacks_of_wrong_types(opened):
    run = opened()
    for key, value in (("from", "5"), ("to", -1), ("rollbacks", 1.5), ("reason", None), ("divergence", [])):
        (run.path / "rollbacks.json").write_text(json.dumps([ROLLBACK | {key: value}]))
        with pytest.raises(ConfigError, match=r"rollbacks\.json"):
            run.resume_point()
    (run.path / "rollbacks.json").write_text(json.dumps([ROLLBACK]))
    assert run.resume_point() == (None, None)


def test_every_start_is_recorded(tmp_path, shown):
    world = SimpleNamespace(size=2, device_name="CPU")
    for step in range(3):
        history.record_start(tmp_path, world, step)
    assert shown() == ""
    file = tmp_path / history.STARTS
    known = history.read_starts(file)
    assert [start.step for start in known] == [0, 1, 2] and known[0].ranks == 2 and known[0].command == sys.argv
    assert {"torch", "python", "ebm", "accelerate"} <= set(known[0].versions)
    older = known[-1].model_copy(update={"versions": known[-1].versions | {"torch": "2.0"}})
    file.write_text(json.dumps([older.model_dump()] * history.MAX_STARTS))
    history.record_start(tmp_path, world, 7)
    torch_now = known[0].versions["torch"]
    assert f"resumed in another environment than the start before: torch 2.0 -> {torch_now}" in shown()
    assert len(history.read_starts(file)) == history.MAX_STARTS and history.read_starts(file)[-1].step == 7


def test_a_reader_that_goes_away_ends_nothing(digits, tmp_path):
    """`python train.py | head -1`, and a log on a full disk: exit code 0, and the run is done."""
    run = subprocess.Popen(alone(tmp_path / "a", digits, train__steps=5), stdout=subprocess.PIPE, env=environment(),
                           stderr=subprocess.DEVNULL, cwd=tmp_path)  # fmt: skip
    run.stdout.readline()
    run.stdout.close()
    with open("/dev/full", "w") as full:
        other = subprocess.run(alone(tmp_path / "b", digits, train__steps=5), stdout=full, stderr=full,
                               env=environment(), cwd=tmp_path)  # fmt: skip
    assert run.wait(120) == other.returncode == 0
    assert (tmp_path / "a/DONE").exists() and (tmp_path / "b/DONE").exists()


def test_a_terminal_that_closes_stops_the_run(digits, tmp_path):
    """SIGHUP, as of a lost ssh: a checkpoint, and exit code 75."""
    run_dir = tmp_path / "run"
    run = Run(alone(run_dir, digits, train__steps=100_000, checkpoint__every=1000), tmp_path / "log")
    assert run.until_step(run_dir, 3)
    os.kill(run.process.pid, signal.SIGHUP)
    assert run.wait(60) == 75
    assert "SIGHUP" in run.log.read_text()
    assert (run_dir / f"checkpoints/step_{last_step(run_dir):08d}/manifest.json").exists()
