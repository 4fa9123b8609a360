"""ebm doctor [RUN]

Says what this machine has for a training (versions, devices, threads, W&B, disk), and of a run: what it is, how far it
is, what is odd, and what to do next.
"""

import argparse
import json
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from ebm import __version__
from ebm.config import Config, TrackingConfig, load_config
from ebm.errors import DataError, UserError
from ebm.inference.run import MAX_INITIAL, initial_weights
from ebm.runtime import checkpoint, history
from ebm.runtime.files import read_json
from ebm.runtime.run_directory import Attempts, is_training
from ebm.tracking import delivery
from ebm.tracking.wandb_run import mode_here

PACKAGES = ("torch", *history.PACKAGES)
LITTLE = 5 << 30  # bytes of free disk below which it is said
OLD = 600.0  # seconds without a line of metrics, of a run under way
WARNING, SATURATED, WAITING = (
    1.0,
    0.25,
    0.1,
)  # docs/monitoring.md: health/warning, above the data's share, data_wait_frac


class Found(NamedTuple):
    """What was looked at, in lines; what is odd; what to do next."""

    lines: list[str]
    odd: list[str]
    next: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", help="run directory")


def run(arguments: argparse.Namespace) -> int:
    parts = {"machine": machine(Path(arguments.run) if arguments.run else Path())}
    if arguments.run:
        parts[f"run {arguments.run}"] = of_run(Path(arguments.run))
    for title, found in parts.items():
        print(f"{title}\n" + "\n".join(f"  {line}" for line in found.lines))
    odd = [line for found in parts.values() for line in found.odd]
    print("odd\n" + "\n".join(f"  {line}" for line in odd or ["nothing"]))
    todo = [line for found in parts.values() for line in found.next]
    print("next\n" + "\n".join(f"  {line}" for line in todo))
    return 0


def machine(place: Path) -> Found:
    """Versions, devices, threads, W&B, and the disk that `place` is on."""
    import torch

    odd: list[str] = []
    versions = [f"{name} {_version(name)}" for name in PACKAGES]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(count)]
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    if torch.version.cuda and not gpus:
        odd.append(f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and sees no GPU here")
    if threads and threads.isdecimal() and 2 * int(threads) <= cores and not gpus:
        odd.append(f"OMP_NUM_THREADS={threads} leaves cores unused: unset it, or set train.threads={cores}")
    existing = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < LITTLE:
        odd.append(f"{free / 1e9:.1f} GB are free at {existing}: checkpoints and records may not fit")
    kept = [f", {k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("WANDB_") and "KEY" not in k]
    launched = f"OMP_NUM_THREADS={threads}" if threads else "one thread a process unless OMP_NUM_THREADS is set"
    lines = [
        f"ebm {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        ", ".join(versions),
        f"GPUs: {', '.join(gpus) or 'none'}",
        f"CPU: {cores} cores for this process, threads {torch.get_num_threads()}; accelerate launch: {launched}",
        f"W&B: {mode_here(TrackingConfig())}{''.join(kept)}",
        f"disk: {free / 1e9:.0f} GB free at {existing}",
    ]
    return Found(lines, odd, [] if place != Path() else ["ebm train --help, or ebm doctor RUN for a run"])


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is not installed"


def of_run(run_dir: Path) -> Found:
    """What a run is, how far, what is odd about it, and what to do next. Raises DataError where there is none."""
    if not (run_dir / "config.yaml").is_file():
        raise DataError(f"{run_dir}: no run directory (it has no config.yaml); give the run.dir of a training run")
    try:
        config = load_config(run_dir / "config.yaml")
    except UserError as error:
        return Found([f"its config can't be read: {error}"], [], ["open it with the version that wrote it"])
    metrics = last_metrics(run_dir / "metrics.jsonl")
    saved = checkpoint.checkpoints(run_dir / "checkpoints")
    valid = [path for path in saved if checkpoint.problem_of(path) is None]
    lines = [*_what(run_dir, config), _how_far(config, metrics, valid)]
    odd = [f"checkpoint {path.name} is damaged: {checkpoint.problem_of(path)}" for path in saved if path not in valid]
    if valid and (share := config.optim.initial_share(checkpoint.step_of(valid[-1]))) > MAX_INITIAL:
        odd.append(initial_weights(share, checkpoint.step_of(valid[-1])))
    odd += _odd(run_dir, config, metrics)
    return Found(lines, odd, _next(run_dir, config, valid))


def _what(run_dir: Path, config: Config) -> list[str]:
    data = config.data
    lines = [
        f"{config.energy.kind} energy of {data.shape} by {config.loss.kind}, data {data.shards}"
        + (f" from {data.source}" if data.source else ""),
    ]
    starts = history.read_starts(run_dir / history.STARTS)
    if starts:
        last = starts[-1]
        lines.append(
            f"{len(starts)} starts; the last at {last.time} from step {last.step}, on {last.host}: {last.device}, "
            f"{last.ranks} ranks, {last.threads} threads"
        )
    try:
        lines += [f"changed at step {change.step}: {change}" for change in history.read_changes(run_dir)]
    except (OSError, ValueError) as error:
        lines.append(f"{history.CHANGES} can't be read: {str(error).splitlines()[0]}")
    place = delivery.obtained(run_dir)
    if place is not None:
        name = "/".join(part for part in (place.entity, place.project, delivery.run_id(run_dir, {})) if part)
        lines.append(f"W&B: {name}")
    return lines


def _how_far(config: Config, metrics: dict[str, Any], valid: list[Path]) -> str:
    step, total = int(metrics.get("step", 0)), config.train.steps
    text = f"step {step} of {total} ({step / total:.0%}), "
    text += f"newest checkpoint at step {checkpoint.step_of(valid[-1])}" if valid else "no checkpoint yet"
    seconds = metrics.get("perf/step_s")
    if isinstance(seconds, float) and step < total:
        text += f", {seconds:.3g} s a step, {(total - step) * seconds / 3600:.1f} h left"
    return text


def _odd(run_dir: Path, config: Config, metrics: dict[str, Any]) -> list[str]:
    odd = []
    warning = metrics.get("health/warning")
    if isinstance(warning, str) or (warning is not None and warning >= WARNING):
        odd.append(f"health/warning is {warning}: training may diverge; lower optim.lr or sampler.step_size")
    above = _number(metrics, "sampler/saturated") - _number(metrics, "data/saturated")
    if above > SATURATED:
        odd.append(
            f"chains have {above:.2f} more pixels at the bounds than data: lower sampler.step_size or grad_clamp"
        )
    if _number(metrics, "perf/data_wait_frac") > WAITING:
        odd.append(f"{metrics['perf/data_wait_frac']:.0%} of the time is spent waiting for data: raise data.workers")
    if _number(metrics, "health/rollbacks"):
        odd.append(f"it rolled back {metrics['health/rollbacks']:.0f} times (RUN/rollbacks.json says why)")
    if _number(metrics, "data/skipped"):
        odd.append(f"{metrics['data/skipped']:.0f} samples were passed over as unreadable")
    attempts = _attempts(run_dir)
    if attempts is not None and attempts.reason and not (run_dir / "DONE").exists():
        odd.append(f"the last start that failed said: {attempts.reason}")
    if attempts is not None and attempts.starts > 2 and not (run_dir / "DONE").exists():
        odd.append(f"{attempts.starts} starts in a row began at step {attempts.step}")
    file = run_dir / "metrics.jsonl"
    if is_training(run_dir) and file.exists() and time.time() - file.stat().st_mtime > OLD:
        odd.append(f"a process trains it, and wrote no metrics for {(time.time() - file.stat().st_mtime) / 60:.0f} min")
    if config.evaluate.shards is None:
        odd.append("no held-out data: set evaluate.shards, and train on the same run.dir, or evaluate has few metrics")
    return odd


def _next(run_dir: Path, config: Config, valid: list[Path]) -> list[str]:
    if (run_dir / "DONE").exists():
        return [f"ebm {command} {run_dir}" for command in ("report", "evaluate")] + [
            f"ebm sample {run_dir} --num 64 --steps {config.tracking.sample_steps} --out samples.png",
            f"longer: the same command with train.steps={2 * config.train.steps} train.extend=true",
        ]
    if is_training(run_dir):
        return [f"it trains now; see it: ebm report {run_dir}; stop it with a checkpoint: touch {run_dir}/STOP"]
    again = f"it does not train now; go on: accelerate launch train.py --config {run_dir}/config.yaml run.dir={run_dir}"
    return [again] if valid else [f"{again} (from the start; without a checkpoint, another config may be given)"]


def last_metrics(file: Path) -> dict[str, Any]:
    """The last whole line of metrics; none where there is no such file."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - (1 << 16)))
            lines = stream.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # torn by a crash, or by the seek
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            return record
    return {}


def _number(metrics: dict[str, Any], key: str) -> float:
    """A metric, 0 where it is missing or not finite."""
    value = metrics.get(key, 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def _attempts(run_dir: Path) -> Attempts | None:
    try:
        return Attempts.model_validate(read_json(run_dir / "attempts.json"))
    except (OSError, ValueError):  # none yet, or damaged, which a start tells
        return None
