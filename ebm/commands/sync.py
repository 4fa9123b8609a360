"""python -m ebm sync RUN [RUN ...] [--every SECONDS]

Uploads what runs logged offline, from a machine that reaches W&B. A run logs into one file after the other
(`tracking.offline_part`), all under one id; those that are closed are uploaded once, in order, and the one being
written when it is closed: the command can be run again and again while the run goes on.
"""

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from ebm.errors import ConfigError, UserError

QUIET = 120.0  # seconds; a file being written gets the machine's load every 15
BLOCK, HEADER, FULL, LAST = 1 << 15, 7, 1, 4  # of a .wandb file
SETTLED = 5.0  # seconds; the client's service writes a closed file to its end
# A server that does not answer is given up on after some minutes, not never.
PATIENCE = {"WANDB_X_GRAPHQL_RETRY_MAX": "5", "WANDB_X_FILE_STREAM_RETRY_MAX": "5", "WANDB_ERROR_REPORTING": "false"}


def add_arguments(parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="go on until all runs are done and uploaded")


def run(arguments) -> int:
    runs = [Path(path) for path in arguments.runs]
    for path in runs:
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path}: no run directory (it has no config.yaml); give the run.dir of a training run")
    if arguments.every is not None and arguments.every <= 0:
        raise ConfigError(f"--every {arguments.every}: must be above 0 seconds")
    while True:
        waiting, problem = 0, None
        for path in runs:
            try:
                waiting += not (sync(path) and (path / "DONE").exists())
            except UserError as error:
                waiting, problem = waiting + 1, error
                print(f"error: {error}", file=sys.stderr)
        if arguments.every is None or not waiting:
            return 0 if problem is None else problem.exit_code
        time.sleep(arguments.every)


def sync(run_dir: Path) -> bool:
    """Upload the closed files of a run. Whether none is left. Raises UserError where the upload fails."""
    folder = run_dir / "wandb"
    if not folder.is_dir():
        print(f"{run_dir}: nothing was logged to W&B")
        return True
    with alone(folder / "sync.lock"):
        parts = sorted(path.parent for path in folder.glob("offline-run-*/run-*.wandb") if not marker(path).exists())
        newest, now = newest_of_each_id(folder), clock(folder)
        ready = [part for part in parts if is_closed(part, now, is_newest=part in newest)]
        if ready:
            time.sleep(max(0.0, SETTLED - min(now - written(part) for part in ready)))
            upload(ready)
        left = [part.name for part in parts if part not in ready]
        if not left and (run_dir / "DONE").exists():
            shutil.rmtree(folder / "artifacts", ignore_errors=True)  # what they had to outlive is over
    print(f"{run_dir}: {len(ready)} files uploaded" + "".join(f"; {name} is still written to" for name in left))
    return not left


def marker(file: Path) -> Path:
    """What W&B's client leaves beside a file that it has uploaded."""
    return file.with_suffix(".wandb.synced")


def newest_of_each_id(folder: Path) -> set[Path]:
    """A run writes to the newest of its files; the name is offline-run-DATE_TIME-ID."""
    return set({part.name.rpartition("-")[2]: part for part in sorted(folder.glob("offline-run-*"))}.values())


def is_closed(part: Path, now: float, is_newest: bool) -> bool:
    """Whether nobody writes to it any more. W&B's client would upload a file under way once, and never its rest."""
    return not is_newest or (part / "closed").exists() or now - written(part) > QUIET


def written(part: Path) -> float:
    """When its file was last written to."""
    return max(file.stat().st_mtime for file in part.glob("run-*.wandb"))


def clock(folder: Path) -> float:
    """The time on the file system's clock."""
    probe = folder / f"clock.{os.getpid()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def upload(parts: list[Path]) -> None:
    """With W&B's own command; its exit code is 0 also where it failed, so its markers tell."""
    for file in (file for part in parts if not (part / "closed").exists() for file in part.glob("run-*.wandb")):
        os.truncate(file, whole_records(file.read_bytes()))
    command = [sys.executable, "-m", "wandb", "sync", *map(str, parts)]
    subprocess.run(command, env=PATIENCE | os.environ, check=False)
    missing = [part for part in parts if not all(marker(file).exists() for file in part.glob("run-*.wandb"))]
    if missing:
        raise UserError(
            f"{missing[0]}: not uploaded ({len(missing)} of {len(parts)} files); after `wandb login`, where W&B can be "
            "reached, run the same command again: what is uploaded already is not uploaded twice"
        )


def whole_records(data: bytes) -> int:
    """Bytes of a .wandb file up to the end of its last whole record. A client that is killed leaves half of one, which
    W&B's command takes for a run that goes on. The file is a header and LevelDB's log: blocks of 32 KiB, and in them
    pieces of records, (crc32, length, kind) and content, that never cross a block."""
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
def alone(path: Path):
    """Two at once would upload everything twice."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path.parent}: another sync is at it; wait for its end") from error
        except OSError:  # a file system without locks
            pass
        yield
