"""What a run directory keeps of its starts: environment.json says where, with what versions and by what command each
was made; config_history.json says what changed in the config and the data, and at which step."""

import json
import logging
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ebm import __version__
from ebm.runtime.distributed import World
from ebm.runtime.files import read_json, replace

log = logging.getLogger(__name__)


STARTS = "environment.json"
MAX_STARTS = 200  # the first is kept, and the newest
MAX_COMMAND = 4000  # characters
PACKAGES = ("torchvision", "accelerate", "webdataset", "safetensors", "numpy", "wandb")
CHECKOUT = Path(__file__).parent.parent.parent


class Start(BaseModel):
    """One start of a run."""

    model_config = ConfigDict(strict=True)
    time: str  # UTC, ISO 8601
    step: int  # that it began at
    host: str
    device: str
    ranks: int
    threads: int
    command: list[str]
    commit: str | None  # of the checkout the package runs from, "+" behind it where files differ; None: no checkout
    versions: dict[str, str]


def record_start(run_dir: Path, world: World, step: int) -> None:
    """Append this start. Versions other than the last start's are logged. Raises nothing."""
    file = run_dir / STARTS
    try:
        starts, this = read_starts(file), this_start(world, step)
        if starts and (changed := differences(starts[-1], this)):
            log.warning(f"resumed in another environment than the start before: {'; '.join(changed)}")
        kept = [*starts, this] if len(starts) < MAX_STARTS else [starts[0], *starts[-MAX_STARTS + 2 :], this]
        replace(file, json.dumps([start.model_dump() for start in kept], indent=1).encode())
    except OSError as error:
        log.warning(f"{file} can't be written ({error.strerror or error})")


def read_starts(file: Path) -> list[Start]:
    """Returns the starts recorded so far. A file of another kind counts as none, and is logged."""
    if not file.exists():
        return []
    try:
        values: Any = read_json(file)
        if not isinstance(values, list):
            raise ValueError(f"must be a list, found {type(values).__name__}")
        return [Start.model_validate(value) for value in values]
    except (OSError, ValueError, ValidationError) as error:
        log.warning(f"{file} can't be read and begins anew ({str(error).splitlines()[0]})")
        return []


def this_start(world: World, step: int) -> Start:
    return Start(
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        step=step,
        host=socket.gethostname(),
        device=world.device_name,
        ranks=world.size,
        threads=torch.get_num_threads(),
        command=_shortened(sys.argv),
        commit=_commit(),
        versions=_versions(),
    )


def differences(before: Start, now: Start) -> list[str]:
    """Returns what differs between two starts and may change the numbers: versions, commit, kind of device."""
    found = []
    for name in sorted(before.versions.keys() | now.versions.keys()):
        old, new = before.versions.get(name, "none"), now.versions.get(name, "none")
        if old != new:
            found.append(f"{name} {old} -> {new}")
    if before.commit != now.commit:
        found.append(f"commit {before.commit} -> {now.commit}")
    if before.device != now.device:
        found.append(f"device {before.device} -> {now.device}")
    return found


def _versions() -> dict[str, str]:
    versions = {"ebm": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions


def _shortened(arguments: list[str]) -> list[str]:
    kept: list[str] = []
    left = MAX_COMMAND
    for argument in arguments:
        if left <= 0:
            return [*kept, "..."]
        kept.append(argument[:left])
        left -= len(argument)
    return kept


def _commit() -> str | None:
    """Returns the commit of the checkout that this package runs from."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of another user
        return None


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


CHANGES = "config_history.json"


class Change(BaseModel):
    """What differs from `step` on: for each key the value before and the value from then on."""

    model_config = ConfigDict(extra="forbid")
    time: str  # UTC, ISO 8601
    step: int
    changed: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in self.changed.items())


def read_changes(run_dir: Path) -> list[Change]:
    """The changes so far. Raises OSError or ValueError where the file can't be read."""
    file = run_dir / CHANGES
    return TypeAdapter(list[Change]).validate_python(read_json(file)) if file.exists() else []


def record_change(run_dir: Path, step: int, changed: Mapping[str, tuple[Any, Any]]) -> Change:
    """Append a change, and log it. A file that can't be read is kept beside the new one. Raises OSError."""
    file = run_dir / CHANGES
    try:
        before = read_changes(run_dir)
    except ValueError as error:
        aside = file.with_suffix(".unreadable.json")
        log.warning(f"{file} can't be read ({str(error).splitlines()[0]}); it is kept as {aside.name}")
        file.rename(aside)
        before = []
    this = Change(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), step=step, changed=dict(changed))
    replace(file, json.dumps([change.model_dump(mode="json") for change in [*before, this]], indent=1).encode())
    log.info(f"from step {step} on: {this}")
    return this
