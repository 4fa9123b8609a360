"""A real Slurm of several nodes on this machine: one controller, a slurmd a node, munge on a socket of its own.

Needs root and the packages slurmctld, slurmd, slurm-client and munge; no systemd and no cgroups. All nodes are this
host, under other names and ports.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue", "srun")
CONF = """
ClusterName=test
# Of several clusters on a machine, each has its own ports for its jobs.
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
AuthType=auth/munge
# A requeued job also waits for as long as a credential lives.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=shm
Licenses=x
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=30
PropagateResourceLimits=NONE
"""


def why_not() -> str | None:
    """Why there can be no cluster here."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return (
        f"not installed: {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge)"
        if missing
        else None
    )


class Cluster:
    """Nodes n1, n2, ... with two cores each; partition `low` (the default) gives way to `high`."""

    def __init__(self, folder: Path, nodes: int = 2):
        self.folder, self.nodes = folder, [f"n{i + 1}" for i in range(nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self):
        for name in ("munge", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self._start_munge()
        self._write_conf()
        self.run("slurmctld", "-i")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: all(self.state_of(node) == "IDLE" for node in self.nodes), lambda: "the nodes are up", 60)
        return self

    def __exit__(self, *_):
        self.run("scancel", "--user=root", "--full", check=False)
        for node in self.nodes:
            self.kill_node(node)
        for file in ("slurmctld.pid", "munge/pid"):
            process = self._process(file)
            if process is not None:
                process.kill()

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", "--num-threads=2", *(f"--{name}={folder}/{file}" for name, file in files.items()))

    def _write_conf(self) -> None:
        port, *ports = free_ports(1 + len(self.nodes))
        host, nodes = socket.gethostname().split(".")[0], ",".join(self.nodes)
        lines = [CONF.format(folder=self.folder, host=host, port=port, first_job=os.getpid() % 15000 + 1)]
        for node, node_port in zip(self.nodes, ports, strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2 RealMemory=4000 "
                "Feature=a Gres=shm:1"
            )
        lines += [f"PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE",
                  f"PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF"]  # fmt: skip
        (self.folder / "gres.conf").write_text("Name=shm Count=1\n")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """A command's output."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment | environment, timeout=120)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """As by a power cut: its slurmd and all that it started, at once, in an order in which none has time to tell of
        another's end: srun's child, which watches it, srun itself, which would have the other nodes' tasks killed, and
        then each slurmstepd before what it started."""
        daemon = self._process(f"slurmd.{node}.pid")
        steps = self._processes("SLURMD_NODENAME", node)
        steps += [p.parent() for p in steps if p.is_running() and "slurmstepd" in (p.parent() or p).name()]
        depths = {p: len(p.parents()) for p in (daemon, *steps) if p is not None and p.is_running()}
        sruns = {p for p in depths if p.name() == "srun"}
        for process in sorted(depths, key=lambda p: (0, -depths[p]) if p in sruns else (1, depths[p])):
            process.kill()

    def _process(self, file: str) -> psutil.Process | None:
        try:
            return psutil.Process(int((self.folder / file).read_text()))
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None

    def state_of(self, node: str) -> str:
        return _field(self.run("scontrol", "--oneliner", "show", "node", node), "State")

    def job(self, job: int | str) -> dict[str, str]:
        """State, restarts, reason, nodes and exit code of a job or, as "4_1", of an array's task."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job)).splitlines()[0]
        return {name: _field(text, name) for name in ("JobState", "Restarts", "Reason", "NodeList", "ExitCode")}

    def until(self, condition, what, timeout: float = 300) -> None:
        """Wait for `condition`; `what()` says what was waited for."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"not within {timeout:.0f} s: {what()}"
            time.sleep(0.1)

    def until_ended(self, job: int | str, timeout: float = 600) -> str:
        """The state that a job ended in."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.job(job)["JobState"] in ended, lambda: f"job {job} ends: {self.job(job)}", timeout)
        return self.job(job)["JobState"]

    def until_restarts(self, job: int, number: int) -> None:
        self.until(lambda: self.job(job)["Restarts"] == str(number), lambda: f"job {job} restarts: {self.job(job)}")

    def processes(self, job: int) -> list[psutil.Process]:
        """Whatever a job has left running."""
        return self._processes("SLURM_JOB_ID", str(job))

    def _processes(self, name: str, value: str) -> list[psutil.Process]:
        """Those that this cluster started with a variable of that value."""
        ours = {"SLURM_CONF": self.environment["SLURM_CONF"], name: value}
        return [p for p in psutil.process_iter() if ours.items() <= environ(p).items()]


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _field(text: str, name: str) -> str:
    """A field of `scontrol --oneliner show`."""
    return next((part.partition("=")[2] for part in text.split() if part.startswith(f"{name}=")), "")


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
