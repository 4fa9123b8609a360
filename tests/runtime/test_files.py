"""Files that are whole or not there, locks, and what a process shows of its log."""

import errno
import fcntl
import logging
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ebm.config import TrainConfig
from ebm.errors import DataError, printable
from ebm.runtime import checkpoint, files
from ebm.runtime.checkpoint import Saver
from ebm.runtime.distributed import World
from ebm.runtime.files import locked, replace
from ebm.runtime.process import configure_logging, leave_code


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    replace(path, b"one")
    replace(path, b"two")
    assert path.read_bytes() == b"two"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(path, b"three")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["config.yaml"]


def test_one_at_a_time(tmp_path):
    inside, seen = [], []

    def work(number: int) -> None:
        with locked(tmp_path / "lock"):
            inside.append(number)
            seen.append(len(inside))
            threading.Event().wait(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 8


@pytest.mark.parametrize(("code", "goes_on"), [(errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code, goes_on):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if goes_on:
        with locked(tmp_path / "lock"):
            pass
    else:
        with pytest.raises(OSError, match=os.strerror(code)), locked(tmp_path / "lock"):
            pass


def test_a_lock_that_is_long_waited_for_is_named(tmp_path, monkeypatch, shown):
    monkeypatch.setattr(files, "QUIET_WAIT", 0.1)
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path / "lock"):
            entered.set()

    with locked(tmp_path / "lock"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.5)
        assert not entered.is_set() and f"{tmp_path}/lock is locked by another process" in shown()
    waiting.join(10)
    assert entered.is_set()


def test_a_link_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (tmp_path / "lock").symlink_to(outside)
    with pytest.raises(OSError, match="is a link"), locked(tmp_path / "lock"):
        pass
    (tmp_path / f"a.json.{os.getpid()}.tmp").symlink_to(outside)
    (tmp_path / "a.json").symlink_to(outside)
    replace(tmp_path / "a.json", b"ours")
    assert outside.read_bytes() == b"precious" and not (tmp_path / "a.json").is_symlink()


def test_what_is_replaced_survives_a_power_cut(tmp_path, monkeypatch):
    """Its directory reaches the disk after the rename."""
    events, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(file) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        real_fsync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), real_replace(*paths)))
    replace(tmp_path / "rollbacks.json", b"[]")
    assert events == ["file", "rename", "directory"]


@pytest.mark.parametrize(("code", "goes_on"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_can_not_sync_directories(tmp_path, monkeypatch, code, goes_on):
    real = os.fsync

    def fsync(file) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(code, os.strerror(code))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    if goes_on:
        replace(tmp_path / "a", b"a")
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            replace(tmp_path / "a", b"a")


MANY_RANKS = """
import sys
from pathlib import Path
from ebm.runtime.process import leave_code
run = Path(sys.argv[1])
print(sum(not leave_code(75, run) for _ in range(500)))
"""


@pytest.mark.parametrize("for_scripts", ["", "exit_code"])
def test_every_rank_finds_the_code_that_all_of_them_leave(tmp_path, monkeypatch, for_scripts):
    """All write the one file; a rank that found it cut short by another ended with 75, and was started again. The
    batch script asks for the code in that very file."""
    monkeypatch.setenv("EBM_EXIT_FILE", for_scripts and str(tmp_path / for_scripts))
    command = [sys.executable, "-c", MANY_RANKS, str(tmp_path)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["0\n"] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["exit_code"]


def test_a_code_for_a_script_goes_where_the_script_said(tmp_path, monkeypatch):
    """Into the very file, which may be a device or behind a link."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    monkeypatch.setenv("EBM_EXIT_FILE", str(tmp_path / "link"))
    assert not leave_code(75)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "75\n"


def test_control_characters_do_not_reach_a_terminal(shown):
    """A text of others reaches the terminal without its control characters."""
    logging.getLogger("ebm.data").warning("key 'a\x1b[2J\u009b31m\rb' \N{LATIN SMALL LETTER E WITH ACUTE}\tz\nnext")
    assert shown() == "key 'a\\x1b[2J\\x9b31m\\rb' \N{LATIN SMALL LETTER E WITH ACUTE}\tz\nnext\n"
    # A byte of a name that is no UTF-8. Not logged here: pytest-xdist can't carry a report that holds it.
    assert printable("a\udcff") == "a\\udcff"


def test_ranks_beside_the_first_show_warnings_alone(capsys, monkeypatch, shown):
    log = logging.getLogger("ebm.training")
    for rank, debug, expected in (
        (0, "", "i\nw\n"),
        (3, "", "rank 3: w\n"),
        (3, "debug", "rank 3: d\nrank 3: i\nrank 3: w\n"),
    ):
        monkeypatch.setenv("EBM_LOG", debug)
        configure_logging(rank)
        log.debug("d"), log.info("i"), log.warning("w")
        assert shown() == expected
    monkeypatch.delenv("EBM_LOG")
    configure_logging()
    log.info("i"), log.warning("w")
    assert capsys.readouterr() == ("", "w\n")


def test_an_error_while_pruning_ends_nothing(tmp_path, monkeypatch, shown):
    """A disk that is not tidy is said, and the new checkpoint stands."""
    world = World(TrainConfig())
    with Saver(tmp_path, world) as saver:
        for step in (1, 2):
            state = {"step": step, "good": True}
            saver.start(step, {"model": {"w": torch.zeros(2)}}, state)
            with monkeypatch.context() as failing:
                failing.setattr(Path, "rename", lambda *_: os.close(-1))  # an OSError
                assert saver.finish(keep=1) == tmp_path / f"step_{step:08d}"
    assert "can't be removed" in shown() and len(checkpoint.checkpoints(tmp_path)) == 2


def test_a_checkpoint_that_its_run_pruned_meanwhile(tmp_path):
    with pytest.raises(DataError, match="its run, which goes on, pruned it; use a newer checkpoint"):
        checkpoint.read_tensors(tmp_path / "step_00000010", "ema")
    (tmp_path / "step_00000010").mkdir()
    with pytest.raises(DataError, match=r"ema\.safetensors"):
        checkpoint.read_tensors(tmp_path / "step_00000010", "ema")
