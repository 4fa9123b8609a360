"""Which W&B run a run is: what the config says wins, then what an earlier start obtained, then the environment, then
the default. A resumed run is the same W&B run, whatever the environment says by then."""

import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ebm.config import TrackingConfig
from ebm.runtime.files import read_json, replace

log = logging.getLogger(__name__)

MAX_ID = 128
ID = re.compile(r"[\w.-]{1,128}")
DEFAULT_PROJECT = "ebm"
YES = ("1", "true", "yes", "on")


class Obtained(BaseModel):
    """RUN/wandb_run.json: where the client put the run. `folder`: the directory with its `wandb` directory, if not RUN,
    which may move."""

    model_config = ConfigDict(strict=True)
    project: Annotated[str, Field(max_length=1000)]
    entity: Annotated[str, Field(max_length=1000)] | None = None
    folder: Annotated[str, Field(max_length=4096)] | None = None


class Identity(NamedTuple):
    """What the client is asked for."""

    id: str
    project: str
    entity: str | None
    name: str
    folder: Path


def asked_for(tracking: TrackingConfig, run_dir: Path, environment: Mapping[str, str]) -> Identity:
    """Of the start of a run in `run_dir`. Raises OSError where the id can't be kept."""
    before = obtained(run_dir)
    return Identity(
        run_id(run_dir, environment),
        tracking.project or (before and before.project) or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
        tracking.entity or (before and before.entity) or environment.get("WANDB_ENTITY") or None,
        tracking.name or environment.get("WANDB_NAME") or run_dir.name,
        _folder(run_dir, environment),
    )


def keep(run: Any, run_dir: Path, folder: Path) -> str:
    """Keep what the client obtained for its run, and return its id: in a sweep it takes the agent's id and project,
    whatever it was asked for. Where they are others than before, none of the rows is delivered there."""
    before = obtained(run_dir)
    entity = run.entity or (before.entity if before is not None else None)  # an offline client does not know its own
    place = None if folder == run_dir else str(folder.absolute())
    now = Obtained(project=run.project, entity=entity or None, folder=place)
    moved = before is not None and (before.project != now.project or (before.entity or entity) != entity)
    if moved:
        (run_dir / "wandb_step").unlink(missing_ok=True)
    if before != now:
        replace(run_dir / "wandb_run.json", now.model_dump_json().encode())
    if run.id != run_id(run_dir, {}):
        log.info(f"W&B's client took the run id {run.id}, as the environment says; it is kept in {run_dir}/wandb_id")
        replace(run_dir / "wandb_id", run.id.encode())
    return str(run.id)


def obtained(run_dir: Path) -> Obtained | None:
    """What an earlier start obtained; None where there is none, or the file is not of this kind."""
    file = run_dir / "wandb_run.json"
    try:
        return Obtained.model_validate(read_json(file)) if file.exists() else None
    except (OSError, ValueError) as error:
        log.warning(f"{file} can't be read ({str(error).splitlines()[0]}); the project is the config's")
        return None


def run_id(run_dir: Path, environment: Mapping[str, str]) -> str:
    """The run's W&B id. It is kept in RUN/wandb_id, so that a resumed run is the same W&B run."""
    path = run_dir / "wandb_id"
    found = path.read_text(errors="replace")[: MAX_ID + 1].strip() if path.is_file() else ""
    if not ID.fullmatch(found):
        if found:
            log.warning(f"{path} holds no W&B id; a new W&B run begins")
        given = environment.get("WANDB_RUN_ID", "")
        if given and not ID.fullmatch(given):
            log.warning(f"WANDB_RUN_ID={json.dumps(given)[:200]} is no W&B id; a new one is made")
        found = given if ID.fullmatch(given) else secrets.token_hex(4)
        replace(path, found.encode())
    return found


def folders_of(run_dir: Path) -> list[Path]:
    """The `wandb` directories with files of the run: its own, and the one that WANDB_DIR said last."""
    before = obtained(run_dir)
    elsewhere = [Path(before.folder) / "wandb"] if before is not None and before.folder else []
    return [folder for folder in (run_dir / "wandb", *elsewhere) if folder.is_dir()]


def _folder(run_dir: Path, environment: Mapping[str, str]) -> Path:
    """RUN, or what WANDB_DIR says. W&B's agent sets it to its working directory: that is nobody's wish."""
    given = environment.get("WANDB_DIR")
    if not given or (environment.get("WANDB_SWEEP_ID") and Path(given) == Path.cwd()):
        return run_dir
    return Path(given).expanduser()


def mode_of(tracking: TrackingConfig, environment: Mapping[str, str]) -> str | None:
    """online, offline or disabled, as config or environment say; None where neither does."""
    if tracking.wandb != "auto":
        return tracking.wandb
    if environment.get("WANDB_DISABLED", "").lower() in YES:
        return "disabled"
    mode = environment.get("WANDB_MODE", "").lower()
    known = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
    return known.get(mode)


def share_with_client(identity: Identity) -> None:
    """In a sweep the client obeys the environment alone: let a resumed trial find its own run there."""
    if os.environ.get("WANDB_SWEEP_ID"):
        os.environ.setdefault("WANDB_RUN_ID", identity.id)
        os.environ.setdefault("WANDB_PROJECT", identity.project)
        if identity.entity:
            os.environ.setdefault("WANDB_ENTITY", identity.entity)
