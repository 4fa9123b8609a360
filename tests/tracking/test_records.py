"""metrics.jsonl, trace.jsonl and sample pictures on disks that are full, read-only or failing."""

import errno
import json
import os
import resource
import subprocess
from contextlib import contextmanager

import pytest
import torch

from ebm.config import load_config
from ebm.errors import UserError
from ebm.tracking import Tracker
from ebm.tracking.tracker import Records, WholeFiles, replace


@contextmanager
def files_end_at(size: int):
    """No file of this process grows beyond `size` bytes: a write takes what fits, the next one is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(path, options: str = "size=64k"):
    path.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs root: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def line(step: int) -> bytes:
    return json.dumps({"step": step, "x": step / 2}).encode() + b"\n"


def lines(count: int) -> bytes:
    return b"".join(line(step) for step in range(1, count + 1))


def append(records: Records, *steps: int) -> None:
    for step in steps:
        records.append({"step": step, "x": step / 2})


@pytest.mark.parametrize("torn_stays", [False, True])
def test_a_disk_that_fills_up_at_any_byte(tmp_path, monkeypatch, shown, torn_stays):
    """Whatever byte is the last that fits, the file has whole lines, and each line once when there is room again."""
    for size in range(len(lines(2)), len(lines(4))):
        path = tmp_path / f"{size}.jsonl"
        records = Records(path, 0)
        append(records, 1, 2)
        fits = 2 if size < len(lines(3)) else 3
        with files_end_at(size), monkeypatch.context() as failing:
            if torn_stays:
                failing.setattr(os, "ftruncate", lambda *_: os.close(-1))  # an OSError
            append(records, 3, 4)
            assert records.pending == 4 - fits and not records.flush()
            assert path.read_bytes()[: len(lines(fits))] == lines(fits)
            assert torn_stays or path.stat().st_size == len(lines(fits))
        append(records, 5)
        assert path.read_bytes() == lines(5) and records.pending == 0 and records.flush()
        records.close()
        said = shown().splitlines()
        assert len(said) == 2 and f"can be written again, with {4 - fits} kept back" in said[1]


def test_the_end_of_a_run_says_what_is_lost(tmp_path, shown):
    records = Records(tmp_path / "metrics.jsonl", 0)
    append(records, 1)
    with files_end_at(len(lines(1)) + 3):
        append(records, 2, 3)
        records.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines(1) and records.pending == 2
    said = shown().splitlines()
    assert len(said) == 2 and said[1].startswith("2 records are lost") and "metrics.jsonl" in said[1]


def test_what_the_system_could_not_write_behind_is_written_again(tmp_path, monkeypatch):
    """An fsync that fails reports pages that were taken and then dropped (a network disk over its quota)."""
    path = tmp_path / "metrics.jsonl"
    records = Records(path, 0)
    append(records, 1)
    assert records.flush()
    append(records, 2, 3)

    def dropped(file):
        os.pwrite(file, b"\0" * len(lines(3)[len(lines(1)) :]), len(lines(1)))
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", dropped)
        assert not records.flush() and records.pending == 2
    append(records, 4)
    assert records.flush() and path.read_bytes() == lines(4)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, shown):
    path, content = tmp_path / "a.png", bytes(range(64))
    files = WholeFiles("samples")
    replace(path, b"before")
    for size in range(len(content)):
        with files_end_at(size):
            files.write(path, content)
        assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["a.png"]
    assert len(shown().splitlines()) == 1
    files.retry()
    assert path.read_bytes() == content and len(shown().splitlines()) == 1


def tracker(run_dir, step: int = 0) -> Tracker:
    settings = [f"run.dir={run_dir}", "data.trace=true", "tracking.wandb=disabled"]
    return Tracker(load_config(None, settings), run_dir, step)


def test_a_full_disk_loses_nothing(tmp_path, shown):
    run_dir = tmp_path / "run"
    with small_disk(run_dir):
        tracked = tracker(run_dir)
        fill = run_dir / "fill"
        for step in range(1, 21):
            if step == 8:
                fill.write_bytes(b"x" * (os.statvfs(run_dir).f_bavail * os.statvfs(run_dir).f_bsize))
            if step == 15:
                assert not tracked.flush() and tracked.pending
                fill.unlink()
            tracked.log(step, {"train/loss": float(step)} | {f"padding/{i}": 1.0 for i in range(50)})
            tracked.trace(step, [[0, "key" * 300]], [[0, 1, False]])
            if step % 10 == 0:
                tracked.panels(step, {"samples/fresh": torch.zeros(4, 1, 8, 8)})
        assert tracked.flush() and not tracked.pending
        tracked.close(0)
        said = shown()
        for name in ("metrics.jsonl", "trace.jsonl"):
            steps = [json.loads(text)["step"] for text in (run_dir / name).read_text().splitlines()]
            assert steps == list(range(1, 21))
            assert said.count(f"{name} can't be written (No space left") == 1
            assert said.count(f"{name} can be written again") == 1
        assert len(list((run_dir / "samples").glob("step_*.png"))) == 2


def test_a_run_is_cut_back_without_room(tmp_path):
    run_dir = tmp_path / "run"
    with small_disk(run_dir):
        (run_dir / "samples").mkdir()
        (run_dir / "trace.jsonl").touch()
        (run_dir / "metrics.jsonl").write_bytes(lines(30))
        with pytest.raises(OSError, match="No space left"):
            (run_dir / "fill").write_bytes(b"x" * 100_000)
        tracker(run_dir, 20).close(0)
        assert (run_dir / "metrics.jsonl").read_bytes() == lines(20)


def test_a_read_only_disk_at_the_start(tmp_path):
    with small_disk(tmp_path / "run", "ro"), pytest.raises(UserError, match=r"Read-only.*make it writable") as caught:
        tracker(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)
