"""Shards with a URL: a bounded cache on the node, the directory they come from, and fetching ahead of time."""

import fcntl
import hashlib
import os
import queue
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from ebm.data.transfer import WEB, Access, TransferError, fetch, scheme_of
from ebm.errors import ConfigError, DataError
from ebm.runtime.files import locked

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


@dataclass(frozen=True)
class Remote:
    """`url`: of the directory, with a slash at its end."""

    url: str
    access: Access

    def __str__(self) -> str:
        return self.url

    @property
    def cache(self) -> ShardCache:
        directory = self.access.cache_dir
        return ShardCache(default_directory() if directory is None else Path(directory), self.access.cache_bytes)

    def url_of(self, name: str) -> str:
        return self.url + (quote(name) if scheme_of(self.url) in WEB else name)

    def open(self, name: str, size: int, sha256: str) -> BinaryIO:
        """The whole shard, verified, from the cache or into it. Raises DataError naming its URL."""

        def receive(file: BinaryIO) -> None:
            fetch(self.url_of(name), self.access, lambda body: verified(body, size, sha256, file))

        return self.cache.open(sha256, size, receive)

    def verify(self, name: str, size: int, sha256: str) -> None:
        """Fetch a shard without keeping it. Raises DataError where it is not what the manifest says."""
        fetch(self.url_of(name), self.access, lambda body: verified(body, size, sha256))


@dataclass
class Prefetch:
    """Shards asked for ahead of time, one after the other in a thread, once: the reader that then misses one tries
    again, and says why. Pickles as long as it has not begun."""

    wanted: queue.SimpleQueue | None = field(default=None, compare=False)

    def __call__(self, manifest, shards: Iterable[int]) -> None:
        if self.wanted is None:
            self.wanted = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(manifest,), daemon=True).start()
        for shard in shards:
            self.wanted.put(shard)

    def _run(self, manifest) -> None:
        once = replace(manifest.directory, access=replace(manifest.directory.access, retries=0))
        manifest = manifest.model_copy(update={"directory": once})
        while True:
            try:
                manifest.open(manifest.shards[self.wanted.get()]).close()
            except DataError:
                continue
