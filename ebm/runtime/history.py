"""RUN/config_history.json: what changed in a run's config and data, and at which step."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ebm.runtime.files import read_json, replace

log = logging.getLogger(__name__)

FILE_NAME = "config_history.json"


class Change(BaseModel):
    """What differs from `step` on: for each key the value before and the value from then on."""

    model_config = ConfigDict(extra="forbid")
    time: str  # UTC, ISO 8601
    step: int
    changed: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        return ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in self.changed.items())


def read(run_dir: Path) -> list[Change]:
    """The changes so far. Raises OSError or ValueError where the file can't be read."""
    file = run_dir / FILE_NAME
    return TypeAdapter(list[Change]).validate_python(read_json(file)) if file.exists() else []


def record(run_dir: Path, step: int, changed: Mapping[str, tuple[Any, Any]]) -> Change:
    """Append a change, and log it. A file that can't be read is kept beside the new one. Raises OSError."""
    file = run_dir / FILE_NAME
    try:
        before = read(run_dir)
    except ValueError as error:
        aside = file.with_suffix(".unreadable.json")
        log.warning(f"{file} can't be read ({str(error).splitlines()[0]}); it is kept as {aside.name}")
        file.rename(aside)
        before = []
    this = Change(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), step=step, changed=dict(changed))
    replace(file, json.dumps([change.model_dump(mode="json") for change in [*before, this]], indent=1).encode())
    log.info(f"from step {step} on: {this}")
    return this
