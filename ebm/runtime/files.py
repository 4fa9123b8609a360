"""Files that are there whole or not at all, and locks between processes. No function here follows a link that stands
where one of our files should be: what it points to is not ours to change."""

import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)

MAX_JSON = 1 << 24  # bytes; a hundred thousand streams need less
QUIET_WAIT = 5.0  # seconds that a lock is waited for before the log says so
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without them
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES)  # of directories, on some


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, for good: a power cut afterwards does not lose it. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with suppress(FileNotFoundError):  # of a killed process with this number; or a link, which must not be followed
            temporary.unlink()
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):  # a full disk has better use for the room
            temporary.unlink()
        raise
    sync_directory(path.parent)


def read_json(file: Path) -> Any:
    """Returns the value in a JSON file of at most MAX_JSON bytes. Raises OSError or ValueError."""
    if not file.is_file():
        raise FileNotFoundError("is missing, or is no plain file")
    with file.open("rb") as stream:
        text = stream.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise ValueError(f"larger than {MAX_JSON} bytes")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def remove_leftovers(directory: Path, name: str) -> None:
    """Remove the temporary files that a killed `replace` left in `directory`, for files whose name matches the pattern
    `name`."""
    ours = re.compile(rf"(?:{name})\.\d+\.tmp")
    with suppress(OSError):  # this only tidies
        for entry in list(os.scandir(directory)):
            if ours.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a file that is no link; other programs do not inherit it. Raises OSError."""
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, which is not followed; remove it", str(path)) from error
        raise


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut, if the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def try_lock(file: int) -> bool:
    """Returns whether an open file could be locked; another process may have it. Raises OSError if the file system has
    no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Wait until no other process has the file locked, and keep it locked within the block. Makes the file if there is
    none. If the file system has no locks, the block runs without."""
    with open(open_own(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        try:
            _wait_for_lock(file.fileno(), path)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield file


def _wait_for_lock(file: int, path: Path) -> None:
    end = time.monotonic() + QUIET_WAIT
    while not try_lock(file):
        if time.monotonic() > end:
            log.warning(f"{path} is locked by another process; waiting for its end (`fuser {path}` shows which)")
            fcntl.flock(file, fcntl.LOCK_EX)
            return
        time.sleep(0.02)
