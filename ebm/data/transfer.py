"""Transfers: http(s) by the standard library, object stores through fsspec, with time limits and retries.

Each body is received in a thread of its own, because some calls that can hang (name lookup, TLS, a library's own loop)
accept no time limit. The reader gives up when one MiB takes too long and leaves the thread to end by itself.
"""

import http.client
import queue
import re
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar
from urllib.error import URLError
from urllib.parse import urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from ebm.config import DataConfig
from ebm.errors import ConfigError, DataError

WEB = ("http", "https")
URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
PIECE = 1 << 20  # bytes; each must arrive within the timeout
MAX_REDIRECTS = 5
MAX_WAIT = 30.0  # seconds between two tries
WORTH_ANOTHER_TRY = (408, 425, 429)  # of the client's errors; all of the server's are
T = TypeVar("T")
Arrival = bytes | Exception | None  # a piece, what went wrong, or the end


@dataclass(frozen=True)
class Access:
    """How shards on other machines are read, and where they are kept. The fields are those of DataConfig; `wait` is the
    pause in seconds before the first retry, doubled for each further one."""

    schemes: tuple[str, ...] = DataConfig.model_fields["schemes"].default
    cache_dir: str | None = DataConfig.model_fields["cache_dir"].default
    cache_bytes: int = DataConfig.model_fields["cache_bytes"].default
    retries: int = DataConfig.model_fields["retries"].default
    timeout: float = DataConfig.model_fields["timeout"].default
    wait: float = 1.0

    @classmethod
    def of(cls, config: DataConfig) -> "Access":
        names = ("schemes", "cache_dir", "cache_bytes", "retries", "timeout")
        return cls(**{name: getattr(config, name) for name in names})


class TransferError(Exception):
    """One try failed. `final`: another try would fail in the same way."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason)
        self.final = final


def scheme_of(place: str) -> str | None:
    """The lower-case scheme of a URL; None for a path."""
    match = URL.match(place)
    return match[1].lower() if match else None


def check_url(url: str, access: Access) -> None:
    """Raises ConfigError unless `url` is a plain URL with an allowed scheme."""
    scheme, parts = scheme_of(url), urlsplit(url)
    if scheme not in WEB and scheme not in access.schemes:
        raise ConfigError(
            f"{url}: shards may be local files or have an http or https URL; for an object store that you trust, list "
            "its scheme, such as data.schemes=[s3]"
        )
    if "@" in parts.netloc or parts.query or parts.fragment or "::" in url:
        raise ConfigError(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}: must be a plain URL, without user, "
            "password, ?query, #fragment or ::; give credentials as the store's own library takes them"
        )


def fetch(url: str, access: Access, receive: Callable[[Iterator[bytes]], T]) -> T:
    """Returns `receive(body)`, where `body` yields the bytes at `url` in pieces. Each try starts a new body.

    `receive` raises TransferError where the body is not as expected. Raises DataError naming URL, reason and remedy.
    """
    reason, tries = "", 0
    while tries <= access.retries:
        if tries:
            time.sleep(min(access.wait * 2 ** (tries - 1), MAX_WAIT))
        tries += 1
        try:
            with closing(pieces(url, access)) as body:
                return receive(body)
        except TransferError as error:
            reason = str(error)
            if error.final:
                break
    times = f" ({tries} tries; more with data.retries, more patience with data.timeout)" if tries > 1 else ""
    raise DataError(f"{url}: {reason}{times}. Check the URL, the server and the network, then run the command again")


def pieces(url: str, access: Access) -> Generator[bytes, None, None]:
    """Yields the body at a URL. Raises TransferError, also where one MiB or the end takes longer than the timeout."""
    arrived: queue.Queue[Arrival] = queue.Queue(maxsize=8)
    left = threading.Event()

    def put(item: Arrival) -> None:
        while not left.is_set():
            try:
                arrived.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def pump() -> None:
        try:
            with closing(_open(url, access.timeout)) as body:
                for piece in body:
                    put(piece)
                    if left.is_set():
                        return
            put(None)
        except Exception as error:  # raised again in the reader's thread
            put(error)

    threading.Thread(target=pump, daemon=True).start()
    try:
        yield from _timely(arrived, access.timeout)
    finally:
        left.set()


def _timely(arrived: "queue.Queue[Arrival]", timeout: float) -> Iterator[bytes]:
    """Yields the pieces. Raises what the receiving thread ran into, and TransferError where a MiB is overdue."""
    received, due, deadline = 0, PIECE, time.monotonic() + timeout
    while True:
        try:
            item = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TransferError(f"stalled after {received} bytes: no more than that in {timeout:g} s") from None
        if item is None:
            return
        if isinstance(item, TransferError):
            raise item
        if isinstance(item, Exception):
            raise _failure(item) from item
        received += len(item)
        if received >= due:
            due, deadline = received + PIECE, time.monotonic() + timeout
        before = time.monotonic()
        yield item
        deadline += time.monotonic() - before  # the time that the reader took is not the sender's delay


def _failure(error: Exception) -> TransferError:
    """A certificate that does not check is final: a retry would see the same one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = f"the server's certificate can't be verified ({cause.verify_message}); if you trust the server, "
            return TransferError(reason + "name the file of its authority in SSL_CERT_FILE", final=True)
        reason_of = cause.reason if isinstance(cause, URLError) else None  # urllib keeps the cause there
        cause = reason_of if isinstance(reason_of, BaseException) else cause.__cause__ or cause.__context__
    return TransferError(f"{type(error).__name__}: {error}".rstrip(": "))


def _open(url: str, timeout: float) -> Generator[bytes, None, None]:
    return _web_body(url, timeout) if scheme_of(url) in WEB else _store_body(url)


def _web_body(url: str, timeout: float) -> Generator[bytes, None, None]:
    with _response(url, 2 * timeout) as response:  # ends a thread whose reader gave up earlier
        missing = response.length  # None where the server does not say
        while missing != 0:
            piece = response.read1(PIECE if missing is None else min(PIECE, missing))
            if not piece:
                if missing:
                    raise TransferError(f"the connection ended {missing} bytes early")
                return
            missing = None if missing is None else missing - len(piece)
            yield piece


def _response(url: str, timeout: float) -> http.client.HTTPResponse:
    """The response after redirects, which may lead to http and https alone, and never from https to http."""
    opener = OpenerDirector()  # urllib's default one also opens files and ftp
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    for _ in range(MAX_REDIRECTS + 1):
        request = Request(url, headers={"User-Agent": "ebm", "Accept-Encoding": "identity"})
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
        if response.status == 200:
            return response
        response.close()
        target = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or target is None:
            final = response.status < 500 and response.status not in WORTH_ANOTHER_TRY
            raise TransferError(f"HTTP {response.status} {response.reason}"[:200], final)
        before, url = scheme_of(url), urljoin(url, target)
        if scheme_of(url) not in WEB or (before, scheme_of(url)) == ("https", "http"):
            raise TransferError(f"redirects to {url[:200]!r}, which is not followed", final=True)
    raise TransferError(f"redirects more than {MAX_REDIRECTS} times", final=True)


def _store_body(url: str) -> Generator[bytes, None, None]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url)
        with store.open(path, "rb", block_size=8 * PIECE) as file:
            while piece := file.read(PIECE):
                yield piece
    except ImportError as error:
        raise TransferError(f"{error}; install the package that fsspec names", final=True) from error
    except (FileNotFoundError, PermissionError) as error:
        raise TransferError(f"{type(error).__name__}: {error}", final=True) from error
