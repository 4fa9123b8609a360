"""ebm sync RUN [RUN ...] [--every SECONDS]

Uploads what runs logged offline, from a machine that reaches W&B. A run logs into one file after the other
(`tracking.offline_part`), all under one id; those that are closed are uploaded once, in order, and the one being
written when it is closed: the command can be run again and again while the run goes on.
"""

import argparse
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebm.errors import ConfigError, UserError
from ebm.runtime.files import NO_LOCKS, open_own, try_lock
from ebm.runtime.process import show_error
from ebm.runtime.run_directory import is_training
from ebm.tracking.delivery import CLOSED, folders_of, part_number, run_id

QUIET = 120.0  # seconds; a file being written gets the machine's load every 15
BLOCK, HEADER, FULL, LAST = 1 << 15, 7, 1, 4  # of a .wandb file
MAX_EVERY = 1e6
SETTLED = 5.0  # seconds; the client's service writes a closed file to its end
# A server that does not answer is given up on after some minutes, not never.
PATIENCE = {"WANDB_X_GRAPHQL_RETRY_MAX": "5", "WANDB_X_FILE_STREAM_RETRY_MAX": "5", "WANDB_ERROR_REPORTING": "false"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="go on until all runs are done and uploaded")


def run(arguments: argparse.Namespace) -> int:
    runs = [Path(path) for path in arguments.runs]
    for path in runs:
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path}: no run directory (it has no config.yaml); give the run.dir of a training run")
    if arguments.every is not None and not 0 < arguments.every < MAX_EVERY:
        raise ConfigError(f"--every {arguments.every}: must be above 0 and below {MAX_EVERY:g} seconds")
    while True:
        waiting, problem = 0, None
        for path in runs:
            try:
                waiting += not (sync(path) and (path / "DONE").exists())
            except UserError as error:
                waiting, problem = waiting + 1, error
                show_error(error)
        if arguments.every is None or not waiting:
            return 0 if problem is None else problem.exit_code
        time.sleep(arguments.every)


def sync(run_dir: Path) -> bool:
    """Upload the closed files of a run. Returns whether none is left. Raises UserError if the upload fails."""
    folders = folders_of(run_dir)
    if not folders:
        print(f"{run_dir}: nothing was logged to W&B")
    left = [name for folder in folders for name in sync_folder(folder, run_dir)]
    if not left and (run_dir / "DONE").exists():
        shutil.rmtree(run_dir / "wandb" / "artifacts", ignore_errors=True)  # what they had to outlive is over
    return not left


def sync_folder(folder: Path, run_dir: Path) -> list[str]:
    """Upload the closed files of a run in one directory, which runs may share if it is not the run's own. Returns the
    names of parts that are still written to."""
    own = "*" if folder == run_dir / "wandb" else run_id(run_dir, {})
    with alone(folder / "sync.lock"):
        parts = [part for part in parts_of(folder, own) if not all(marker(file).exists() for file in files_of(part))]
        now, training = clock(folder), is_training(run_dir)
        newest = newest_of_each_id(parts_of(folder, own))
        closed = [part for part in parts if is_closed(part, now, part in newest, training)]
        ready = [part for part in closed if holds_records(part)]
        if ready:
            time.sleep(max(0.0, SETTLED - min(now - written(part) for part in ready)))
            upload(ready)
    left = [part.name for part in parts if part not in closed]
    print(f"{run_dir}: {len(ready)} files uploaded" + "".join(f"; {name} is still written to" for name in left))
    return left


def parts_of(folder: Path, of: str = "*") -> list[Path]:
    """Returns the directories of the offline parts of the run with the id `of`, in the order of their beginnings."""
    parts = [path for path in folder.glob(f"offline-run-*-{of}") if not path.is_symlink() and files_of(path)]
    return sorted(parts, key=lambda part: (part_number(part), part.name))


def files_of(part: Path) -> list[Path]:
    """Returns the .wandb files of a part. A link is none of ours."""
    return [file for file in part.glob("run-*.wandb") if file.is_file() and not file.is_symlink()]


def holds_records(part: Path) -> bool:
    """Returns whether there is anything to upload. W&B's command fails at the file of a start that was killed before
    its first record."""
    return any(whole_records(file.read_bytes()) > HEADER for file in files_of(part))


def marker(file: Path) -> Path:
    """Returns the path of the file that W&B's client leaves beside one that it has uploaded."""
    return file.with_suffix(".wandb.synced")


def newest_of_each_id(parts: list[Path]) -> set[Path]:
    """Returns the last part of each W&B id, which its run writes to. A part's name is offline-run-DATE_TIME-ID."""
    return set({part.name.rpartition("-")[2]: part for part in parts}.values())


def is_closed(part: Path, now: float, is_newest: bool, training: bool) -> bool:
    """Returns whether nobody writes to a part any more. W&B's client would upload a file under way once, and never its
    rest.

    A training closes its parts. What a killed one left is closed when the next start, which waits for the end of the
    one before, has begun another; or when it was not written to for long, and no training is under way that may be
    suspended."""
    begun_after = not is_newest and part_number(part) > 0
    quiet = now - written(part) > QUIET and not (training and is_newest)
    return (part / CLOSED).exists() or begun_after or quiet


def written(part: Path) -> float:
    """Returns when a part's file was last written to."""
    return max(file.stat().st_mtime for file in files_of(part))


def clock(folder: Path) -> float:
    """Returns the time on the file system's clock."""
    probe = folder / f"clock.{os.getpid()}"
    probe.unlink(missing_ok=True)
    os.close(open_own(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def upload(parts: list[Path]) -> None:
    """Upload with W&B's own command. Its exit code is 0 even if it failed, so its markers tell."""
    for file in (file for part in parts if not (part / CLOSED).exists() for file in files_of(part)):
        with open(open_own(file, os.O_RDWR), "r+b") as stream:
            stream.truncate(whole_records(stream.read()))
    command = [sys.executable, "-m", "wandb", "sync", *map(str, parts)]
    subprocess.run(command, env=PATIENCE | os.environ, check=False)
    missing = [part for part in parts if not all(marker(file).exists() for file in files_of(part))]
    if missing:
        raise UserError(
            f"{missing[0]}: not uploaded ({len(missing)} of {len(parts)} files); after `wandb login`, where W&B can be "
            "reached, run the same command again: what is uploaded already is not uploaded twice"
        )


def whole_records(data: bytes) -> int:
    """Returns the length of a .wandb file up to the end of its last whole record. A killed client leaves half of one,
    which W&B's command takes for a run that goes on. The file is a header and LevelDB's log: blocks of 32 KiB, and in
    them pieces of records, (crc32, length, kind) and content, that never cross a block."""
    at = end = HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        at += HEADER + length
        if kind == 0 or at > len(data):
            break
        if kind in (FULL, LAST):
            end = at
    return min(end, len(data))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep out a second sync of the run, which would upload everything twice."""
    try:
        file = open_own(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    with open(file, "r+b") as lock:
        try:
            if not try_lock(lock.fileno()):
                raise UserError(f"{path.parent}: another sync is at it; wait for its end")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{path}: {error}") from error
        yield
