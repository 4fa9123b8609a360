"""A disk that is full, or read-only, in a real run of two ranks: the run goes on, and nothing is lost."""

import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from runs import Run, command, final_hashes, finish, records

from ebm.data.shards import ensure_shards
from ebm.runtime import checkpoint

PLACES = int(os.environ.get("EBM_PLACES", "6"))  # the acceptance figure is measured with 20
SETTINGS = {"train__steps": 100_000, "checkpoint__every": 10, "sampler__num_steps": 5, "optim__decay_start": 1.0}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; it needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)])


def test_full_disk(small_disk, tmp_path):
    """Filled up to different places of a save, again and again in one run: each time the checkpoint before stays and
    the next is whole; in the end the run is the same, bit for bit, as on a disk with room."""
    ensure_shards(str(tmp_path / "digits"), "digits", "train")
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    run = Run(command(2, run_dir, tmp_path / "digits", **SETTINGS), tmp_path / "log")
    assert run.until_step(run_dir, 15)
    size = sum(file.stat().st_size for file in newest(run_dir).iterdir())
    for place in range(PLACES):
        failures = said(run, "could not be written")
        with suppress(OSError), ballast.open("wb") as file:  # the run may take the last of the room meanwhile
            free = shutil.disk_usage(small_disk).free
            file.write(b"\0" * max(0, free - size * place // PLACES))
        wait(run, lambda before=failures: said(run, "could not be written") > before)
        kept = newest(run_dir)
        assert checkpoint.problem_of(kept) is None
        ballast.unlink()
        wait(run, lambda before=kept: newest(run_dir) != before)
    (run_dir / "STOP").touch()
    run.wait()
    steps = [record["step"] for record in records(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and newest(run_dir).name == f"step_{steps[-1]:08d}"
    assert [record["step"] for record in records(run_dir / "trace.jsonl")] == steps
    assert not list((run_dir / "checkpoints").glob("*.tmp"))
    whole = SETTINGS | {"train__steps": steps[-1], "checkpoint__every": 1000}
    finish(command(2, tmp_path / "whole", tmp_path / "digits", **whole), tmp_path / "log")
    assert final_hashes(run_dir) == final_hashes(tmp_path / "whole")


@pytest.mark.slow
def test_read_only_disk(small_disk, tmp_path):
    ensure_shards(str(tmp_path / "digits"), "digits", "train")
    run_dir = small_disk / "run"
    run = Run(command(2, run_dir, tmp_path / "digits", **SETTINGS), tmp_path / "log")
    assert run.until_step(run_dir, 15)
    target = str(run_dir / "checkpoints")
    subprocess.run(["mount", "--bind", target, target], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        wait(run, lambda: said(run, "Read-only file system"))
        kept = newest(run_dir)
    finally:
        subprocess.run(["umount", "-l", target], check=True)
    wait(run, lambda: newest(run_dir) != kept)
    (run_dir / "STOP").touch()
    run.wait()
    steps = [record["step"] for record in records(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and newest(run_dir).name == f"step_{steps[-1]:08d}"


def newest(run_dir: Path) -> Path:
    return checkpoint.checkpoints(run_dir / "checkpoints")[-1]


def said(run: Run, text: str) -> int:
    return run.log.read_text().count(text)


def wait(run: Run, condition, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert run.process.poll() is None, run.log.read_text()[-3000:]
        if time.monotonic() > end:
            run.kill()
            raise AssertionError(run.log.read_text()[-3000:])
        time.sleep(0.01)
