"""Files that are whole or not there; locks."""

import errno
import fcntl
import os
import threading

import pytest

from ebm.runtime.files import locked, replace


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
