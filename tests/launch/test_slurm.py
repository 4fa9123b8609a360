"""launch/train.sbatch, by launch/submit.py, on a real Slurm of two nodes: a job goes on over whatever ends it."""

import re
import sys

import pytest
from runs import ROOT, TINY, environment, finish, last_step, records
from slurm_cluster import Cluster, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
STEPS = 100
SETTINGS = {key: value for key, value in TINY.items() if not key.startswith("energy.")}
SETTINGS |= {"energy.kind": "import", "energy.path": "slow_energy:SlowEnergy", "train.steps": STEPS}
FAILURE = re.compile("error|fail|traceback|exception", re.IGNORECASE)
PYTHONPATH = f"{ROOT}:{ROOT / 'tests'}"


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """trace.jsonl of an uninterrupted run; it does not depend on the number of ranks."""
    path = tmp_path_factory.mktemp("whole")
    arguments = [sys.executable, str(ROOT / "train.py"), *overrides(path / "run", digits)]
    finish(arguments, path / "log", PYTHONPATH=PYTHONPATH)
    return (path / "run/trace.jsonl").read_bytes()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def overrides(run_dir, shards, **settings) -> list[str]:
    values = SETTINGS | {"run.dir": run_dir, "data.shards": shards}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    return [f"{key}={value}" for key, value in values.items()]


def submit(cluster, arguments, *options: str, nodes: int = 2, seconds: float = 0.03, **variables: str) -> int:
    """The id of a job with a CPU rank a node; a step takes three times `seconds` and more."""
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--nodes", str(nodes), "--time", "30", *options]
    ours = {"GLOO_SOCKET_IFNAME": "lo", "EBM_MIN_FREE_GB": "0.1", "EBM_TEST_SECONDS": str(seconds)}
    variables = environment(**({"PYTHONPATH": PYTHONPATH} | ours | variables))
    said = cluster.run(*command, *arguments, **variables)
    return int(re.search(r"Submitted batch job (\d+)", said)[1])


def until_step(cluster, run_dir, step: int) -> None:
    cluster.until(lambda: last_step(run_dir) >= step, lambda: f"step {step}:\n{logs(run_dir)}")


def logs(run_dir) -> str:
    folders = (run_dir / "logs", run_dir.parent / "logs")  # the second is a sweep's
    ours = [path for folder in folders for path in sorted(folder.glob("*")) if path.suffix != ".slurm"]  # Slurm's own
    return "\n".join(path.read_text() for path in ours)


def done(cluster, job, run_dir, whole) -> str:
    """Wait for the job's end, which must be the run's, as if nothing had happened. What was said."""
    assert cluster.until_ended(job) == "COMPLETED", logs(run_dir)
    assert (run_dir / "DONE").exists()
    assert (run_dir / "trace.jsonl").read_bytes() == whole
    assert [r["step"] for r in records(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    return logs(run_dir)


def test_a_signal_saves_and_requeues(cluster, digits, whole, tmp_path):
    """No step is lost. The directory's name and the prefix of every command are what quoting must survive."""
    run_dir = tmp_path / "a run's"
    job = submit(cluster, overrides(run_dir, digits), EBM_CONTAINER="nice -n 1")
    until_step(cluster, run_dir, 25)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    cluster.until_restarts(job, 1)
    stopped = last_step(run_dir)
    said = done(cluster, job, run_dir, whole)
    assert 25 <= stopped < STEPS and f"resuming {run_dir} at step {stopped}" in said
    assert said.count("2 nodes fit together") == 2 and "saved: back to the queue" in said
    assert not FAILURE.search(said), said
    assert {path.name for path in (run_dir / "logs").iterdir()} == {
        f"{job}{end}" for end in (".out", ".slurm", "-n1.log", "-n2.log")
    }


@pytest.mark.slow
def test_the_time_limit_and_preemption_save_and_requeue(cluster, digits, whole, tmp_path):
    """The signal comes 80 s before the end of the three minutes, or up to a minute earlier; on preemption the ranks get
    a SIGTERM, and the batch script nothing."""
    run_dir = tmp_path / "run"
    job = submit(cluster, overrides(run_dir, digits), "--time", "3", "--save-seconds", "20", seconds=0.4)
    cluster.until_restarts(job, 1)
    limited = last_step(run_dir)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    until_step(cluster, run_dir, limited + 5)
    urgent = ["--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    assert cluster.until_ended(int(cluster.run("sbatch", *urgent))) == "COMPLETED"
    preempted = last_step(run_dir)
    said = done(cluster, job, run_dir, whole)
    assert "told to stop" in said and not FAILURE.search(said), said
    assert limited < preempted < STEPS and cluster.job(job)["Restarts"] == "2"


@pytest.mark.slow
def test_lost_nodes_requeue(cluster, digits, whole, tmp_path):
    """First n2, then n1, which runs the batch script and is the head."""
    run_dir = tmp_path / "run"
    job = submit(cluster, overrides(run_dir, digits))
    for restarts, (node, step) in enumerate((("n2", 15), ("n1", 45)), start=1):
        until_step(cluster, run_dir, step)
        cluster.kill_node(node)
        cluster.until_restarts(job, restarts)
        cluster.start_node(node)
    said = done(cluster, job, run_dir, whole)
    assert said.count(f"resuming {run_dir}") == 2, said
    assert {rank for rank in (0, 1) if f"error: rank {rank}: another rank ended" in said} == {0, 1}, said


@pytest.mark.slow
def test_stop_and_scancel_end_the_job(cluster, digits, tmp_path):
    """STOP: saved, and not requeued; the same command goes on. scancel: no process is left behind."""
    run_dir = tmp_path / "run"
    arguments = overrides(run_dir, digits, train__steps=100000, data__workers=1)
    job = submit(cluster, arguments)
    until_step(cluster, run_dir, 15)
    (run_dir / "STOP").touch()
    assert cluster.until_ended(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "75:0" and cluster.job(job)["Restarts"] == "0"
    stopped = last_step(run_dir)

    job = submit(cluster, arguments)
    until_step(cluster, run_dir, stopped + 15)
    running = [" ".join(process.cmdline()) for process in cluster.processes(job)]
    assert sum("train.py" in command for command in running) >= 4 and any("forkserver" in c for c in running)
    cluster.run("scancel", str(job))
    cluster.until(lambda: not cluster.processes(job), lambda: f"gone: {cluster.processes(job)}", 30)
    assert cluster.until_ended(job) == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_sweep_and_a_run_that_can_not_start(cluster, digits, whole, tmp_path):
    """A task of the array a line. One is requeued, alone; the other's exit code says that it is not to be."""
    good, bad, sweep = tmp_path / "good", tmp_path / "bad", tmp_path / "sweep.txt"
    sweep.write_text(f"# two runs\nrun.dir={bad} data.shards=/nowhere\n\nrun.dir='{good}' tracking.name='a name'\n")
    arguments = [a for a in overrides("unused", digits, data__source="null") if not a.startswith("run.dir=")]
    job = submit(cluster, arguments, "--sweep", str(sweep), nodes=1)
    until_step(cluster, good, 25)
    cluster.run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    assert cluster.until_ended(f"{job}_0") == "FAILED"
    assert cluster.job(f"{job}_0")["ExitCode"] == "4:0" and cluster.job(f"{job}_0")["Restarts"] == "0"
    assert "saved: back to the queue" in done(cluster, f"{job}_1", good, whole)
    assert cluster.job(f"{job}_1")["Restarts"] == "1" and "name: a name" in (good / "config.yaml").read_text()


@pytest.mark.slow
def test_a_sweep_of_a_product(cluster, digits, tmp_path):
    """A task of the array for each combination, in a directory of its own; --export=NONE keeps nothing from the job."""
    values = TINY | {"run.dir": tmp_path / "run", "data.shards": digits, "train.steps": 3, "tracking.wandb": "disabled"}
    arguments = [f"{key}={value}" for key, value in values.items() if key != "optim.lr"]
    setup = f"export PYTHONPATH={PYTHONPATH}"  # as modules do
    options = ["--export=NONE", "--setup", setup, "--sweep", "optim.lr=0.0001,0.0002 data.noise_std=0.01,0.02"]
    job = submit(cluster, arguments, *options, nodes=1)
    for task, (lr, noise) in enumerate((lr, noise) for lr in ("0.0001", "0.0002") for noise in ("0.01", "0.02")):
        assert cluster.until_ended(f"{job}_{task}") == "COMPLETED", logs(tmp_path / "run-sweep/any")
        config = (tmp_path / f"run-sweep/lr_{lr}-noise_std_{noise}/config.yaml").read_text()
        assert f"lr: {lr}" in config and f"noise_std: {noise}" in config and "group: run-sweep" in config


def test_each_option_reaches_the_job(cluster, digits, tmp_path):
    """As `scontrol show job` has it; the job waits for another, so that it never starts."""
    first = int(cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true"))
    options = {
        "--partition=high": "Partition=high",
        "--mem=100": "MinMemoryNode=100M",
        "--constraint=a": "Features=a",
        f"--dependency=afterok:{first}": f"Dependency=afterok:{first}(unfulfilled)",
        "--exclusive": "OverSubscribe=NO",
        "--mail-user=me@x": "MailUser=me@x",
        "--mail-type=END": "MailType=END",
        "--job-name=mine": "JobName=mine",
        f"--output={tmp_path}/log": f"StdOut={tmp_path}/log",
        "--nice=5": "Nice=5",
        "--gres=shm:1": "TresPerNode=gres:shm:1",
        "--sbatch=--comment='two words' --licenses=x": "Comment=two words",
    }
    job = submit(cluster, overrides(tmp_path / "run", digits), *options)
    shown = cluster.run("scontrol", "--oneliner", "show", "job", str(job))
    cluster.run("scancel", str(job), str(first))
    missing = [field for field in [*options.values(), "TimeLimit=00:30:00", "NumNodes=2"] if field not in shown]
    assert not missing, (missing, shown)


@pytest.mark.slow
def test_a_crash_loop_ends(cluster, digits, tmp_path):
    """Processes that are killed before the first checkpoint, as for their memory, leave no exit code."""
    run_dir = tmp_path / "run"
    (tmp_path / "killed.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    arguments = overrides(run_dir, digits, energy__path="killed:Net")
    job = submit(cluster, arguments, nodes=1, EBM_MAX_CRASHES="1", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert cluster.until_ended(job) == "FAILED"
    assert cluster.job(job)["Restarts"] == "1"
    assert "2 ends in a row without a newer checkpoint" in logs(run_dir)
