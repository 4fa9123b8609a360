"""What the benchmarks share: the machine they ran on, measurements taken in turns, tables."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "torchebm", "triton")


def machine() -> dict[str, str | int]:
    """Processor, cores, threads, device and versions, for a result's JSON."""
    import torch

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, the device's work included."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def alternate(sides: dict[str, Callable[[], float]], rounds: int, log=sys.stderr) -> dict[str, list[float]]:
    """What each side returns, `rounds` times, the sides in turn, so that a slow spell of the machine meets them all."""
    values = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            values[name].append(side())
        print(f"round {number + 1} of {rounds}", end="\r", file=log, flush=True)
    return values


def spread(values: list[float], digits: int = 5) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(median(values), digits), "low": round(low, digits), "high": round(high, digits)}


def ratios(ones: Iterable[float], others: Iterable[float]) -> list[float]:
    """Of the rounds, one by one, since the runs of a round met the same machine."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def publish(result: dict, file: Path | None) -> None:
    """Print a result as one JSON object, and write it to `file` where there is one."""
    print(json.dumps(result, indent=1))
    if file:
        write(result, file)


def write(result: dict, file: Path) -> None:
    """Write a result whole: another process may read the file meanwhile."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(file)


def training_seconds(run: Path, until: float = math.inf) -> float:
    """What the steps of a run took, up to step `until`, by its metrics.jsonl, a line of which has the mean since the
    line before."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    starts = [0, *(line["step"] for line in lines)]
    spans = zip(lines, starts, strict=False)
    return sum(line["perf/step_s"] * (line["step"] - start) for line, start in spans if line["step"] <= until)


def table(header: list[str], rows: list[list]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [header, *([f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells)
