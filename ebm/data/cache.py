"""A directory of shards from afar, shared by the processes of a node: bounded, and whole or not there.

A shard is kept as SHA256.tar. While it comes in it is SHA256.part, which has its final size from the start, so that the
bound counts it, and which its writer holds a lock on: others wait for it instead of fetching the same again. A writer
that was killed leaves a .part without a lock, which is never taken for a shard and is removed by whoever needs room.
"""

import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ebm.data.transfer import TransferError
from ebm.errors import ConfigError, DataError
from ebm.files import locked

WHOLE, PART, LOCK = ".tar", ".part", "lock"
OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")  # files beside them are never removed


def default_directory() -> Path:
    return Path(tempfile.gettempdir(), f"ebm-shards-{os.getuid()}")


@dataclass(frozen=True)
class ShardCache:
    """Up to `bytes` of shards below `directory`; the least recently used go first. A shard that is removed while it is
    read stays readable to its reader, as files do."""

    directory: Path
    bytes: int

    def prepare(self, largest: int) -> None:
        """Make the directory. Raises ConfigError where a shard of `largest` bytes has no room or it is not ours."""
        if largest > self.bytes:
            raise ConfigError(
                f"data.cache_bytes={self.bytes} is below the largest shard, {largest} bytes; give room for two a stream"
            )
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.stat()
        except OSError as error:
            raise ConfigError(f"data.cache_dir={self.directory}: {error}; choose another directory") from error
        if found.st_uid != os.getuid() or found.st_mode & stat.S_IWOTH:
            raise ConfigError(f"data.cache_dir={self.directory}: others can write to it; choose another directory")

    def open(self, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """The whole shard, from the cache, or written by `fetch`, which raises where it can't be had or verified."""
        whole, part = self.directory / (sha256 + WHOLE), self.directory / (sha256 + PART)
        try:
            while True:
                found = _open_whole(whole, size)
                if found is not None:
                    return found
                with locked(part) as file:
                    if not _is(part, file):
                        continue  # another process fetched it, or gave it up, while this one waited
                    try:
                        if whole.exists():
                            part.unlink()
                            continue
                        self._reserve(file, size)
                        fetch(file)
                        file.flush()
                        os.fsync(file.fileno())
                        found = open(part, "rb")  # noqa: SIM115 - once it has its name, others may remove it
                        with locked(self.directory / LOCK):  # whoever counts must not miss it under both names
                            os.replace(part, whole)
                        return found
                    except BaseException:
                        part.unlink(missing_ok=True)
                        raise
        except OSError as error:
            raise DataError(
                f"data.cache_dir={self.directory}: {error}; make room, lower data.cache_bytes={self.bytes}, or choose "
                "another directory"
            ) from error

    def discard(self, sha256: str) -> None:
        (self.directory / (sha256 + WHOLE)).unlink(missing_ok=True)

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Make room for `size` bytes and take it; waits where all that is there is on its way in."""
        while True:
            with locked(self.directory / LOCK):
                if self._make_room(size, keep=os.fstat(file.fileno()).st_ino):
                    os.ftruncate(file.fileno(), size)
                    return
            time.sleep(0.05)

    def _make_room(self, size: int, keep: int) -> bool:
        shards, used = [], 0
        for path in self.directory.iterdir():
            if not OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                if found.st_ino == keep or (path.suffix == PART and _abandoned(path)):
                    continue
                used += found.st_size
                if path.suffix == WHOLE:
                    shards.append((found.st_mtime_ns, found.st_size, path))
        for _, freed, path in sorted(shards):
            if used + size <= self.bytes:
                break
            path.unlink(missing_ok=True)
            used -= freed
        return used + size <= self.bytes


def verified(body: Iterator[bytes], size: int, sha256: str, file: BinaryIO | None = None) -> None:
    """Read a body to its end, and write it to `file`. Raises TransferError where it is not what the manifest says."""
    digest, received = hashlib.sha256(), 0
    if file is not None:
        file.seek(0)
    for piece in body:
        received += len(piece)
        if received > size:
            raise TransferError(f"has more than the {size} bytes that the manifest says")
        digest.update(piece)
        if file is not None:
            file.write(piece)
    if received != size:
        raise TransferError(f"ended after {received} of {size} bytes")
    if digest.hexdigest() != sha256:
        raise TransferError(f"sha256 is {digest.hexdigest()}, the manifest says {sha256}: changed, there or on its way")


def _open_whole(path: Path, size: int) -> BinaryIO | None:
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:  # damage on the disk
        file.close()
        path.unlink(missing_ok=True)
        return None
    with suppress(FileNotFoundError):
        os.utime(path)
    return file


def _is(path: Path, file: BinaryIO) -> bool:
    """Whether `path` still names the open file."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def _abandoned(part: Path) -> bool:
    """Remove a .part that no process writes."""
    with open(part, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        part.unlink(missing_ok=True)
        return True
