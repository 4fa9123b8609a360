"""Checkpoints are written in the background under a temporary name, agreed on by all ranks, then renamed.

`step_00001000/` holds safetensors files (shared ones by rank 0, one a stream by its owner), `state.json`, and last
`manifest.json` with the size and sha256 of each. Nothing in it can run code.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ebm.errors import DataError
from ebm.runtime.distributed import World
from ebm.runtime.files import read_json, sync_directory

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")
ASIDE = re.compile(r"step_\d{8,}\.aside")
TEMPORARY = re.compile(r"step_\d{8,}(\.gone)?\.tmp")

Entry = dict[str, Any]  # of manifest.json: the "bytes" and "sha256" of a file
Count = Annotated[int, Field(ge=0, lt=2**62)]


class DataIdentity(BaseModel):
    """The data that a checkpoint was trained on. `identity`: a hash of the shards' sums; `name`: for messages."""

    model_config = ConfigDict(strict=True, frozen=True)
    identity: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    name: str

    def __str__(self) -> str:
        return f"{self.name} (identity {self.identity[:12]})"


class SavedState(BaseModel):
    """The part of state.json that a resume reads. Aliases are the keys of versions before 0.2."""

    model_config = ConfigDict(strict=True)
    step: Count
    positions: dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]
    skipped_samples: Count
    skipped_steps: Count
    skipped_in_row: Count
    reset_chains: Annotated[Count, Field(validation_alias=AliasChoices("reset_chains", "quarantined"))]
    good: bool
    # Checked by `ebm.training.divergence`.
    divergence: Annotated[dict[str, Any], Field(validation_alias=AliasChoices("divergence", "ladder"))]
    adapted_step: Annotated[  # of a sampler that adapts its step size
        Annotated[FiniteFloat, Field(gt=0)] | None, Field(validation_alias=AliasChoices("adapted_step", "step_size"))
    ] = None
    scaler: dict[str, FiniteFloat] | None
    data: DataIdentity | None = None  # None: of a version before 0.2
    field_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # of the file that loss.field names

    @field_validator("divergence")
    @classmethod
    def _divergence(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Check what is read outside training; `ebm.training.divergence` checks the rest."""
        rollbacks, scale = value.get("rollbacks"), value.get("step_scale")
        if type(rollbacks) is not int or rollbacks < 0:
            raise ValueError(f"must have a number of rollbacks, found {rollbacks!r:.80}")
        if not isinstance(scale, float | int) or not 0 < scale < math.inf:
            raise ValueError(f"must have a step_scale above 0, found {scale!r:.80}")
        return value


def directory_of(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint's directory."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def _temporary(root: Path, step: int) -> Path:
    return directory_of(root, step).with_suffix(".tmp")


def checkpoints(root: Path) -> list[Path]:
    """Returns the finished checkpoints under `root`, oldest first, by number."""
    found = [(int(m[1]), p) for p in root.glob("step_*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


class Saver:
    """Writes checkpoints in a thread while training goes on. All ranks act together.

    The ranks call `start` and `finish` at the same steps; in between a thread writes what this rank owns. A checkpoint
    that one rank could not write is given up by all, and the one before stays.

    Args:
        root: the directory of checkpoints.
        world: the run's `ebm.runtime.distributed.World`.
    """

    def __init__(self, root: Path, world: World):
        self._root, self._world = root, world
        self._step = 0
        self._thread: threading.Thread | None = None
        self._written: dict[str, Entry] = {}
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for this rank's part, whatever ended the training. A thread that is still inside torch when the
        interpreter ends takes the process down with SIGABRT in the place of its exit code."""
        if self._thread is not None:
            self._thread.join()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is under way; the same on every rank."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """Whether this rank has written its part."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`; training may change the tensors as soon as this returns.

        `files`: this rank's tensors by file name (`model`, `ema`, `optimizer` on rank 0; `stream_0003` on its owner).
        `state`: what `state.json` holds; rank 0 writes it.
        """
        assert not self.busy
        snapshot = {name: {key: _on_host(t) for key, t in tensors.items()} for name, tensors in files.items()}
        self._step, self._written, self._error = step, {}, None
        self._thread = threading.Thread(target=self._write, args=(snapshot, state), daemon=True)
        self._thread.start()

    def _write(self, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            temporary = _temporary(self._root, self._step)
            temporary.mkdir(exist_ok=True)  # not its parents: a run directory that was removed is not made again
            for name, tensors in files.items():
                save_file(tensors, temporary / f"{name}.safetensors")
                self._written[f"{name}.safetensors"] = _entry(temporary / f"{name}.safetensors")
            if self._world.is_main:
                self._written["state.json"] = _write_json(temporary / "state.json", state)
        except Exception as error:  # the thread's end must be seen by the training, whatever it was
            self._error = error

    def finish(self, keep: int, ready: bool = True) -> Path | None:
        """Wait for all ranks' parts and make the checkpoint final; None, and said, where a rank could not write its,
        or rank 0 was not `ready`: a run resumed from here would not write the records before it again.

        Kept are the newest `keep` with this one, and the newest that is good to roll back to.
        """
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        parts = self._world.gather((self._written, None if self._error is None else str(self._error)))
        error = next((error for _, error in parts if error is not None), None)
        if self._world.is_main:
            try:
                if not ready:
                    error = error or "records of its steps are not on the disk yet"
                if error is None:
                    self._commit({name: entry for files, _ in parts for name, entry in sorted(files.items())})
            except OSError as caught:
                error = str(caught)
            if error is not None:
                shutil.rmtree(_temporary(self._root, self._step), ignore_errors=True)
            else:
                self._prune(keep)
        error = self._world.gather(error)[0]
        if error is not None:
            if self._world.is_main:
                log.warning(
                    f"the checkpoint of step {self._step} could not be written ({error}); the one before is kept"
                )
            return None
        return directory_of(self._root, self._step)

    def _commit(self, entries: dict[str, Entry]) -> None:
        final, temporary = directory_of(self._root, self._step), _temporary(self._root, self._step)
        _write_json(temporary / "manifest.json", {"version": 1, "step": self._step, "files": entries})
        sync_directory(temporary)
        if final.exists():  # damaged, or of a branch that was rolled back
            set_aside(final)
        os.replace(temporary, final)
        sync_directory(self._root)

    def _prune(self, keep: int) -> None:
        """Remove what is too old. Nothing here raises: a disk that is not tidy must not end a run."""
        try:
            good = newest_good(self._root)
            old = [path for path in checkpoints(self._root)[:-keep] if path != good]
            newest = directory_of(self._root, self._step).name
            aside = [path for path in self._root.glob("step_*.aside") if ASIDE.fullmatch(path.name)]
            old += [path for path in aside if path.stem <= newest]
            gone = [path.rename(path.with_suffix(".gone.tmp")) for path in old]
        except OSError as error:
            log.warning(f"old checkpoints in {self._root} can't be removed ({error}); training goes on")
            return
        # Big files take long to unlink, and nobody need wait for it.
        threading.Thread(target=_remove, args=(gone,)).start()


def _remove(paths: list[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename a checkpoint so that no run resumes from it. It is removed once a newer one is final."""
    aside = path.with_suffix(".aside")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def remove(path: Path) -> None:
    """Remove a checkpoint that nobody will resume from; one that is half removed is none any more."""
    gone = path.with_suffix(".gone.tmp")
    os.replace(path, gone)
    _remove([gone])


def sweep(root: Path) -> None:
    """Remove what earlier starts left unfinished. One process calls it, before the first `Saver.start`."""
    _remove([path for path in root.glob("step_*.tmp") if TEMPORARY.fullmatch(path.name)])


def problem_of(path: Path) -> str | None:
    """Returns why a checkpoint can't be trusted, or None if every file has the size and sha256 of the manifest."""
    try:
        manifest = _read_object(path / "manifest.json")
        files = {name: (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"manifest.json: {type(error).__name__}: {error}"
    if "state.json" not in files:
        return "manifest.json does not list state.json"
    for name, (size, sha256) in files.items():
        if Path(name).name != name:
            return f"manifest.json names {name!r}, which is outside the checkpoint"
        try:
            problem = _problem_of_file(path / name, size, sha256)
        except OSError as error:
            problem = error.strerror
        if problem:
            return f"{name!r} {problem}"
    return None


def _problem_of_file(file: Path, size: int, sha256: str) -> str | None:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != size:
        return f"has {file.stat().st_size} bytes, not {size}"
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            return "does not have the sha256 of the manifest"
    return None


def newest_valid(root: Path) -> Path | None:
    """Returns the newest checkpoint that verifies. Each newer one that does not is logged."""
    for path in reversed(checkpoints(root)):
        problem = problem_of(path)
        if problem is None:
            return path
        log.warning(f"checkpoint {path} is damaged ({problem}); going back to the one before")
    return None


def newest_good(root: Path, before: Path | None = None) -> Path | None:
    """Returns the newest checkpoint, older than `before`, whose state.json says that training was well."""
    for path in reversed(checkpoints(root)):
        if (before is None or path < before) and _is_good(path):
            return path
    return None


def _is_good(path: Path) -> bool:
    try:
        return read_state(path).good
    except DataError:
        return False


def read_tensors(path: Path, name: str, expected: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns a file's tensors. With `expected`, they must have its names, shapes and types. Raises DataError."""
    file = path / f"{name}.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        if not path.exists():
            raise DataError(
                f"{path} is gone: its run, which goes on, pruned it; use a newer checkpoint, or raise checkpoint.keep"
            ) from error
        raise DataError(f"{file}: {error}") from error
    if expected is not None:
        _check_tensors(file, tensors, expected)
    return tensors


def _check_tensors(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise DataError(f"{file}: {name!r} is {'missing' if name in expected else 'not of this run'}")
    for name, tensor in expected.items():
        is_, should = ((t.dtype, list(t.shape)) for t in (found[name], tensor))
        if is_ != should:
            raise DataError(f"{file}: {name!r} is {is_[0]} {is_[1]}, and this run's is {should[0]} {should[1]}")


def read_state(path: Path, streams: int | None = None) -> SavedState:
    """Returns a checkpoint's state.json, checked. With `streams`, it must have a position for each of them. Raises
    DataError."""
    file = path / "state.json"
    try:
        state = SavedState(**_read_object(file))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{file}: {key!r}: {first['msg']}, found {str(first['input'])[:80]!r}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}") from error
    if streams is not None and state.positions.keys() != {str(v) for v in range(streams)}:
        raise DataError(f"{file}: 'positions' must name the streams 0 to {streams - 1}, and no others")
    return state


def _read_object(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises OSError or ValueError."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, found {type(value).__name__}")
    return value


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the tensors of a torch optimizer's state, named "parameter number.name"."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, state in states.items() for name, value in state.items()}


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh Adam the state in a checkpoint. Raises DataError."""
    tensors = read_tensors(path, "optimizer")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    expected: dict[str, Tensor] = {}
    for i in {key.split(".")[0] for key in tensors} & {str(i) for i in range(len(parameters))}:
        p = parameters[int(i)]  # one that never had a gradient has no state
        expected |= {f"{i}.step": torch.zeros(()), f"{i}.exp_avg": p, f"{i}.exp_avg_sq": p}
    _check_tensors(path / "optimizer.safetensors", tensors, expected)
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def load_scaler(path: Path, scaler: torch.amp.GradScaler, saved: Mapping[str, float]) -> None:
    """Give a gradient scaler the state in a checkpoint's state.json. Raises DataError."""
    own = scaler.state_dict()
    if saved.keys() != own.keys():
        raise DataError(f"{path}/state.json: 'scaler' has {sorted(saved)}, not {sorted(own)}")
    # As whole numbers where they count steps: torch takes no others.
    scaler.load_state_dict({name: type(own[name])(value) for name, value in saved.items()})


def _on_host(tensor: Tensor) -> Tensor:
    """Returns a copy in host memory that shares nothing with `tensor`."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_json(path: Path, value: dict[str, Any]) -> Entry:
    path.write_text(json.dumps(value, indent=1))
    return _entry(path)


def _entry(path: Path) -> Entry:
    """Sync a file to the disk and return its size and sha256."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
