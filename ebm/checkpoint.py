"""Checkpoints: written under a temporary name, verified, agreed by all ranks, then renamed.

`step_00001000/` holds safetensors files (shared ones by rank 0, one a stream by its owner), `state.json`, and last
`manifest.json` with the size and sha256 of each. Nothing in it can run code.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ebm.errors import DataError

_NAME = re.compile(r"step_(\d{8,})")


def directory_of(root: Path, step: int) -> Path:
    return root / f"step_{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, oldest first, by number."""
    found = [(int(m[1]), p) for p in root.glob("step_*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def save(root: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict, world, keep: int) -> Path:
    """Write one checkpoint together with all ranks; the older ones go, but for the newest `keep`.

    Args:
        files: this rank's tensors by file name (`model`, `ema`, `optimizer` on rank 0; `stream_0003` on its owner).
        state: what `state.json` holds, from rank 0.
        world: the run's `ebm.distributed.World`.
    """
    final, temporary = directory_of(root, step), directory_of(root, step).with_suffix(".tmp")
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    written, error = {}, None
    try:
        for name, tensors in files.items():
            written[f"{name}.safetensors"] = _write_tensors(temporary / f"{name}.safetensors", tensors)
        if world.is_main:
            written["state.json"] = _write_json(temporary / "state.json", state)
    except (OSError, SafetensorError) as caught:
        error = DataError(f"{temporary}: the checkpoint of step {step} could not be written: {caught}")
    world.raise_together(error)
    parts = world.gather(written)
    if world.is_main:
        entries = {name: entry for part in parts for name, entry in sorted(part.items())}
        _write_json(temporary / "manifest.json", {"version": 1, "step": step, "files": entries})
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync(root)
        for old in checkpoints(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return final


def problem_of(path: Path) -> str | None:
    """Why a checkpoint can't be trusted; None where every file has the size and sha256 of the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = {str(name): (int(entry["bytes"]), entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json: {type(error).__name__}: {error}"
    for name, (size, sha256) in files.items():
        if Path(name).name != name:
            return f"manifest.json names {name!r}, which is outside the checkpoint"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                return f"{name} does not have the sha256 of the manifest"
    return None


def newest_valid(root: Path, say=print) -> Path | None:
    """The newest checkpoint that verifies; `say` hears about each newer one that does not."""
    for path in reversed(checkpoints(root)):
        problem = problem_of(path)
        if problem is None:
            return path
        say(f"checkpoint {path} is damaged ({problem}); going back to the one before")
    return None


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(path / f"{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path / name}.safetensors: {error}") from error


def read_state(path: Path) -> dict:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'state.json'}: {error}") from error


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a torch optimizer's state, named "parameter number.name"."""
    states = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, state in states.items() for name, value in state.items()}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    states: dict[int, dict] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    return _entry(path)


def _write_json(path: Path, value: dict) -> dict:
    path.write_text(json.dumps(value, indent=1))
    return _entry(path)


def _entry(path: Path) -> dict:
    """Size and sha256 of a file that is on the disk for good."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
