"""Files that survive a full, read-only or failing disk: JSON lines, and files written whole."""

import json
import logging
import math
import os
from contextlib import suppress
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from ebm.runtime.files import open_own, replace, sync_directory

log = logging.getLogger(__name__)


class Outage:
    """Logs once that `what` can't be written, and once that it can again."""

    def __init__(self, what: str):
        self._what, self.on = what, False

    def begin(self, error: OSError) -> None:
        if not self.on:
            log.warning(f"{self._what} can't be written ({error.strerror or error}); training goes on and tries again")
        self.on = True

    def end(self, kept: int) -> None:
        if self.on:
            log.info(f"{self._what} can be written again, with {kept} kept back till now")
        self.on = False


class Records:
    """An append-only file of JSON lines, each with its "step". JSON knows no NaN: such a number is the string "NaN",
    "Infinity" or "-Infinity".

    A file that is removed meanwhile begins anew, with what is not on the disk yet.

    A line that can't be written stays in memory, in order, and is tried again with the next one, at `flush` and at
    `close`; the file never keeps a part of it. Lines also stay in memory until `flush` has made them durable: call it
    now and then."""

    def __init__(self, path: Path, keep_until: int):
        """Open `path`. Records after step `keep_until`, and a line that a crash left torn, are cut off."""
        self._path, self._outage = path, Outage(str(path))
        self._file = open_own(path, os.O_RDWR | os.O_CREAT)
        self._end = self._durable = self._cut(keep_until)  # bytes written, and bytes on the disk for good
        sync_directory(path.parent)
        self._lines: list[bytes] = []  # from `_durable` on
        self._written = 0  # how many of these are in the file

    def _cut(self, keep_until: int) -> int:
        with self._path.open("rb") as lines:
            kept = sum(len(line) for line in takewhile(lambda line: step_of(line) <= keep_until, lines))
        os.ftruncate(self._file, kept)
        return kept

    def rewind(self, step: int) -> None:
        """Remove the records after `step`."""
        self._end = self._cut(step)
        self._durable = min(self._durable, self._end)
        self._lines = [line for line in self._lines if step_of(line) <= step]
        ends = accumulate((len(line) for line in self._lines), initial=self._durable)
        self._written = sum(end <= self._end for end in list(ends)[1:])

    @property
    def pending(self) -> int:
        """How many records are in memory only."""
        return len(self._lines) - self._written

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n"
        self._lines.append(line.encode())
        self._write(new=1)

    def flush(self) -> bool:
        """Sync the file. Returns whether every record is on the disk for good."""
        if not self._write():
            return False
        try:
            os.fsync(self._file)
        except OSError as error:
            # The system forgets what it failed to write and reports it once: all since the last fsync is suspect.
            self._end, self._written = self._durable, 0
            self._outage.begin(error)
            return False
        self._durable, self._written = self._end, 0
        self._lines.clear()
        return True

    def close(self) -> None:
        self.flush()
        if self.pending:
            log.warning(f"{self.pending} records are lost: {self._path} could not be written to the end")
        os.close(self._file)

    def _write(self, new: int = 0) -> bool:
        kept_back = self.pending - new
        try:
            if os.fstat(self._file).st_nlink == 0:
                self._begin_anew()
            while self.pending:
                line = self._lines[self._written]
                _write_at(self._file, line, self._end)
                self._end += len(line)
                self._written += 1
        except OSError as error:
            with suppress(OSError):  # the next try writes over what stays
                os.ftruncate(self._file, self._end)
            self._outage.begin(error)
            return False
        self._outage.end(kept_back)
        return True

    def _begin_anew(self) -> None:
        """Go on in a new file. Raises OSError if the directory is gone too."""
        file = open_own(self._path, os.O_RDWR | os.O_CREAT)
        log.warning(f"{self._path} was removed; the records before are lost, and those that follow are in a new file")
        os.close(self._file)
        self._file, self._end, self._durable, self._written = file, 0, 0, 0


class WholeFiles:
    """Files written whole or not at all; what can't be written stays in memory for `retry`."""

    def __init__(self, what: str):
        self._what, self._outage = what, Outage(what)
        self._waiting: dict[Path, bytes] = {}

    def write(self, path: Path, content: bytes) -> None:
        self._waiting[path] = content
        self.retry(new=1)

    def retry(self, new: int = 0) -> None:
        kept_back = len(self._waiting) - new
        try:
            for path in list(self._waiting):
                replace(path, self._waiting[path])
                del self._waiting[path]
        except OSError as error:
            self._outage.begin(error)
        else:
            self._outage.end(kept_back)

    def close(self) -> None:
        self.retry()
        if self._waiting:
            log.warning(f"{self._what}: {len(self._waiting)} files are lost, they could not be written to the end")


def _write_at(file: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):  # a disk that fills up takes a part first, and fails then
        done += os.pwrite(file, content[done:], offset + done)


def step_of(line: bytes) -> float:
    """Returns the step of a record. It is infinite if the line is none: torn by a crash, or not of our making."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
