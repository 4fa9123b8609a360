"""Whether a job's nodes fit together, before the first step: same code, same packages, one shared run directory, free
disk, clocks that agree, and a head node that all can name. Standard library only, so that it fails for none of these.

    srun python launch/check_nodes.py report RUN TOKEN HEAD | python launch/check_nodes.py compare NODES SINCE

`report` prints a line of JSON about the node it runs on; RUN/TOKEN holds TOKEN, if the directory is the shared one, and
HEAD is the head node's address. `compare` reads NODES such lines, made after SINCE (seconds since 1970), and says what
is wrong.
Exit codes: 0 all is well, 2 the nodes do not fit, 75 a node did not answer.
"""

import hashlib
import ipaddress
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).absolute().parent.parent
MIN_FREE_GB = float(os.environ.get("EBM_MIN_FREE_GB", "5"))  # where checkpoints go
MAX_SKEW = 10.0  # seconds; what it costs to notice more is nothing, and logs that disagree cost days
EXIT_UNFIT, EXIT_UNANSWERED = 2, 75


def report(run: str, token: str, head: str) -> dict[str, Any]:
    """About this node: who it is, and all that must be equal or good enough."""
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "host": socket.gethostname(),
        "shared": _read(Path(run) / token) == token,
        "free_gb": shutil.disk_usage(run).free / 1e9 if Path(run).is_dir() else 0.0,
        "head": _addresses(head),
        "gpus_of_job": int(os.environ.get("SLURM_GPUS_ON_NODE") or 0),
        "gpus_seen": len(_gpus()),
        "equal": {"code": code(), "python": platform.python_version(), "gpus": _gpu_text(_gpus()), **_packages()},
        "clock": time.time(),
    }


def compare(reports: list[dict[str, Any]], since: float, now: float) -> list[str]:
    """What is wrong with the nodes, a sentence each. The reports were made between `since` and `now`, here's time."""
    problems = []
    for r in reports:
        node = r["node"]
        if not r["shared"]:
            problems.append(f"{node} does not see this run directory: run.dir must be on a file system that all share")
        elif r["free_gb"] < MIN_FREE_GB:
            problems.append(f"{node}: {r['free_gb']:.1f} GB free in the run directory, below {MIN_FREE_GB:g} GB "
                            "(EBM_MIN_FREE_GB)")  # fmt: skip
        if r["gpus_seen"] < r["gpus_of_job"]:
            problems.append(f"{node}: the job has {r['gpus_of_job']} GPUs there, nvidia-smi shows {r['gpus_seen']}; "
                            "have its driver looked at, or give the container its GPUs (--nv, --gpus all)")  # fmt: skip
        skew = max(since - r["clock"], r["clock"] - now, 0.0)
        if skew > MAX_SKEW:
            problems.append(f"{node}: its clock is off by {skew:.0f} s or more; have its time service looked at")
        if not r["head"]:
            problems.append(f"{node} can't resolve the head node's address (EBM_HEAD_ADDRESS overrides it)")
        elif r["host"] != reports[0]["host"] and any(ipaddress.ip_address(a).is_loopback for a in r["head"]):
            problems.append(f"{node} takes the head node's address for its own ({', '.join(r['head'])}): mend "
                            "/etc/hosts, or set EBM_HEAD_ADDRESS to an address that all nodes reach")  # fmt: skip
    return problems + _differences(reports)


def _differences(reports: list[dict[str, Any]]) -> list[str]:
    found = []
    for name in sorted({name for r in reports for name in r["equal"]}):
        nodes = defaultdict(list)
        for r in reports:
            nodes[str(r["equal"].get(name))].append(r["node"])
        if len(nodes) > 1:
            values = "; ".join(f"{value} on {_short(who)}" for value, who in nodes.items())
            found.append(f"{name} is not the same on all nodes: {values}")
    return found


def _short(nodes: list[str]) -> str:
    return ", ".join(nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")


def code() -> str:
    """A hash of the names and contents of all Python files that training imports."""
    digest = hashlib.sha256()
    for path in sorted([PROJECT / "train.py", *(PROJECT / "ebm").rglob("*.py")]):
        digest.update(f"{path.relative_to(PROJECT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _packages() -> dict[str, str]:
    """Versions of what pyproject.toml asks for."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[^\w.-]", requirement)[0] for requirement in project["dependencies"]]
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _gpus() -> list[str]:
    """Name and driver of each GPU, such as "NVIDIA H100, 550.54"."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _gpu_text(gpus: list[str]) -> str:
    """Such as "8 x NVIDIA H100, 550.54"."""
    return " and ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in sorted(set(gpus))) or "none"


def _addresses(head: str) -> list[str]:
    try:
        return sorted({info[4][0] for info in socket.getaddrinfo(head, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def main() -> int:
    if len(sys.argv) == 5 and sys.argv[1] == "report":
        print(json.dumps(report(*sys.argv[2:])), flush=True)
        return 0
    if len(sys.argv) != 4 or sys.argv[1] != "compare":
        print(__doc__, file=sys.stderr)
        return EXIT_UNFIT
    wanted, since = int(sys.argv[2]), float(sys.argv[3])
    reports = [json.loads(line) for line in sys.stdin if line.startswith("{")]
    problems = compare(reports, since, time.time())
    for problem in problems:
        print(f"error: {problem}")
    if problems:
        return EXIT_UNFIT
    if len(reports) < wanted:
        answered = _short([r["node"] for r in reports]) or "none"
        print(f"error: {len(reports)} of {wanted} nodes answered ({answered})")
        return EXIT_UNANSWERED
    least = min(r["free_gb"] for r in reports)
    print(f"{wanted} nodes fit together: code {reports[0]['equal']['code']}, {least:.0f} GB free")
    return 0


if __name__ == "__main__":
    sys.exit(main())
