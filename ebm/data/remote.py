"""A directory of shards with a URL: what it takes to read it as if it were here."""

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from ebm.data.cache import ShardCache, default_directory, verified
from ebm.data.transfer import WEB, Access, fetch, scheme_of
from ebm.errors import DataError


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
