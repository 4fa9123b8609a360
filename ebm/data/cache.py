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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from ebm.data.transfer import WEB, Access, TransferError, fetch, scheme_of
from ebm.errors import ConfigError, DataError
from ebm.runtime.files import locked

WHOLE, PART, LOCK = ".tar", ".part", "lock"
OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")  # other files in the directory are never removed
ABANDONED = 3600.0  # seconds after which an unchanged .part has no writer, on a file system without locks


def default_directory() -> Path:
    return Path(tempfile.gettempdir(), f"ebm-shards-{os.getuid()}")


@dataclass(frozen=True)
class ShardCache:
    """Up to `bytes` of shards below `directory`; the least recently used are removed first. A reader keeps a shard that
    is removed while it reads, as with any open file."""

    directory: Path
    bytes: int

    def prepare(self, largest: int) -> None:
        """Makes the directory. Raises ConfigError where a shard of `largest` bytes has no room, and where someone else
        could put files there."""
        if largest > self.bytes:
            raise ConfigError(
                f"data.cache_bytes={self.bytes} is below the largest shard, {largest} bytes; give room for two a stream"
            )
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            named, found = self.directory.lstat(), self.directory.stat()
        except OSError as error:
            raise ConfigError(f"data.cache_dir={self.directory}: {error}; choose another directory") from error
        if named.st_uid != os.getuid() or found.st_uid != os.getuid():
            what = "is a link of another user" if stat.S_ISLNK(named.st_mode) else "belongs to another user"
            raise ConfigError(f"data.cache_dir={self.directory}: {what}; choose another directory")
        if found.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
            raise ConfigError(
                f"data.cache_dir={self.directory}: others can write to it; run `chmod go-w {self.directory}`, or "
                "choose another directory"
            )

    def open(self, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """Returns the open shard, from the cache or written by `fetch`, which raises where it can't get it."""
        whole, part = self.directory / (sha256 + WHOLE), self.directory / (sha256 + PART)
        try:
            while True:
                found = _open_whole(whole, size)
                if found is not None:
                    return found
                with locked(part) as file:
                    if not _is(part, file):
                        continue  # another process fetched it or gave it up while this one waited
                    try:
                        if whole.exists():
                            part.unlink()
                            continue
                        self._reserve(file, size)
                        fetch(file)
                        file.flush()
                        os.fsync(file.fileno())
                        found = open(part, "rb")  # noqa: SIM115 - before the rename, after which others may remove it
                        self._publish(part, whole)
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

    def _publish(self, part: Path, whole: Path) -> None:
        with locked(self.directory / LOCK):  # a process that counts the bytes must not see the shard under both names
            try:
                os.replace(part, whole)
            except FileNotFoundError:
                if not whole.exists():  # without locks, another process may have fetched and renamed the same bytes
                    raise

    def _reserve(self, file: BinaryIO, size: int) -> None:
        """Makes room for `size` bytes and takes it; waits while other processes fill all of the cache."""
        while True:
            with locked(self.directory / LOCK):
                if self._make_room(size, keep=os.fstat(file.fileno()).st_ino):
                    os.ftruncate(file.fileno(), size)
                    return
            time.sleep(0.05)

    def _make_room(self, size: int, keep: int) -> bool:
        """Removes abandoned parts, then shards used longest ago, until `size` bytes fit. Returns whether they do."""
        shards, used = [], 0
        for path in self.directory.iterdir():
            if not OURS.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                if found.st_ino == keep:
                    continue
                if path.suffix == PART:
                    with _without_writer(path) as abandoned:
                        if abandoned:
                            path.unlink(missing_ok=True)
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


def _open_whole(path: Path, size: int) -> BinaryIO | None:
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:  # the disk lost a part of it
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


@contextmanager
def _without_writer(part: Path) -> Iterator[bool]:
    """Whether no process writes a .part; if so, none can begin to until the context ends."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks: only the age can tell
            yield time.time() - os.fstat(file.fileno()).st_mtime > ABANDONED
            return
        yield True


def verified(body: Iterator[bytes], size: int, sha256: str, file: BinaryIO | None = None) -> None:
    """Reads a body to its end and writes it to `file`. Raises TransferError where it differs from the manifest."""
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


@dataclass(frozen=True)
class Remote:
    """A directory of shards with a URL. `url` ends with a slash."""

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
        """Returns the open shard, verified, through the cache. Raises DataError naming its URL."""

        def receive(file: BinaryIO) -> None:
            fetch(self.url_of(name), self.access, lambda body: verified(body, size, sha256, file))

        return self.cache.open(sha256, size, receive)

    def verify(self, name: str, size: int, sha256: str) -> None:
        """Fetches a shard without keeping it. Raises DataError where it differs from the manifest."""
        fetch(self.url_of(name), self.access, lambda body: verified(body, size, sha256))


class Wanted(NamedTuple):
    """A shard as the manifest has it: the arguments of `Remote.open`."""

    name: str
    size: int
    sha256: str


@dataclass
class Prefetch:
    """Fetches shards into the cache ahead of time, one after the other in a thread, each once. Where that fails, the
    reader tries again and reports why. Can be pickled before its first call."""

    wanted: "queue.SimpleQueue[Wanted] | None" = field(default=None, compare=False)

    def __call__(self, remote: Remote, shards: Iterable[Wanted]) -> None:
        if self.wanted is None:
            self.wanted = queue.SimpleQueue()
            once = replace(remote, access=replace(remote.access, retries=0))
            threading.Thread(target=_fetch_all, args=(once, self.wanted), daemon=True).start()
        for shard in shards:
            self.wanted.put(shard)


def _fetch_all(remote: Remote, wanted: "queue.SimpleQueue[Wanted]") -> None:
    while True:
        try:
            remote.open(*wanted.get()).close()
        except DataError:  # the reader meets it again, with its retries
            continue
