"""launch/: what is submitted, what is refused before it reaches a queue, and whether nodes fit together."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from runs import ROOT, environment

sys.path.insert(0, str(ROOT / "launch"))
import arguments
import check_nodes
import submit
import sweeps

from ebm.config import load_config, to_yaml
from ebm.errors import ConfigError


def run_submit(monkeypatch, capsys, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["submit.py", *options])
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")  # the options of whoever runs the tests
    code = submit.main()
    said = capsys.readouterr()
    return code, said.out, said.err


def test_dry_run_begins_with_a_command_that_a_shell_reads_back(monkeypatch, capsys, tmp_path):
    odd = f"run.dir={tmp_path}/it's a $run; true"
    options = [
        "--nodes",
        "2",
        "--gpus",
        "2",
        "--time",
        "4:00:00",
        "--container",
        "apptainer exec --nv i.sif",
        "--dry-run",
    ]
    code, said, _ = run_submit(monkeypatch, capsys, *options, odd, "data.workers=3", "--sbatch=--qos=long")
    line, _, facts = said.partition("\n\n")
    words = shlex.split(line)
    assert code == 0 and words[-3:] == ["train.device=cuda", odd, "data.workers=3"]
    assert facts.splitlines()[0] == "2 nodes x 2 GPU ranks = 4; saves 300 s before each limit of 4:00:00"
    assert str(ROOT / "launch/train.sbatch") in words
    wanted = "--nodes=2 --gpus-per-node=2 --time=4:00:00 --signal=B:USR1@300 --cpus-per-task=8 --qos=long"
    variables = {"EBM_RANKS_PER_NODE=2", "EBM_CONTAINER=apptainer exec --nv i.sif", "EBM_PYTHON=python"}
    assert variables | set(wanted.split()) <= set(words)


def test_options_of_slurm_are_passed_on(monkeypatch, capsys, tmp_path):
    given = ["--qos=long", "--mem=0", "--constraint=a100", "--gres=gpu:a100:8", "--mail-type=END,FAIL", "--partition=p",
             "--mail-user=me@x", "--dependency=afterok:7", "--reservation=r", "--licenses=a b"]  # fmt: skip
    named = ["--job-name=mine", f"--output={tmp_path}/%j.log", "--exclusive", "--sbatch=--nice=5 '--comment=two words'"]
    key = f"run.dir={tmp_path}/run"
    code, said, _ = run_submit(monkeypatch, capsys, "--time=60", "--dry-run", *given, *named, key, "--train.steps=9")
    words = shlex.split(said.partition("\n\n")[0])
    assert code == 0 and words[-2:] == [key, "train.steps=9"]
    assert {*given, *named[:3], "--nice=5", "--comment=two words"} <= set(words[: words.index(str(submit.SCRIPT))])
    assert len([word for word in words if word.startswith(("--job-name", "--output"))]) == 2
    with pytest.raises(SystemExit):
        run_submit(monkeypatch, capsys, "--time=60", "--dry-run", "--licences", key)
    assert "--licences" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "command", "failing"])
def test_the_setup_is_read_before_anything_else(monkeypatch, capsys, tmp_path, kind):
    """By the script itself, up to where it looks for the project: Slurm has no part in this."""
    (tmp_path / "setup.sh").write_text("export LOADED=$UNSET_BEFORE/file\n")
    setup = {"file": f"{tmp_path}/setup.sh", "command": "export LOADED=/command", "failing": "false"}[kind]
    said = run_submit(monkeypatch, capsys, "--time=60", "--dry-run", "--setup", setup, f"run.dir={tmp_path}/run")[1]
    line = shlex.split(said.partition("\n\n")[0])
    assert f"EBM_SETUP={setup}" in line
    script = submit.SCRIPT.read_text().partition("# What to run:")[0] + 'echo "loaded $LOADED"\n'
    variables = {"EBM_SETUP": setup, "EBM_PROJECT": str(ROOT), "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment(**variables))
    if kind == "failing":
        assert done.returncode == 2 and "--setup 'false' failed" in done.stdout
    else:
        assert done.stdout.split() == ["loaded", f"/{kind}"]


def test_the_log_is_the_real_one():
    queued = submit.what_next("Submitted batch job 42", "/a b/%j.out")
    assert queued == ["log: /a b/42.out", "tail -F '/a b/42.out'", "squeue -j 42", "scancel 42"]
    assert submit.what_next("Submitted batch job 42", "/r/%A_%a.out")[0] == "log: /r/42_0.out"


def test_scripts_of_launch_run_from_anywhere(tmp_path):
    """By the package that is installed (here: on PYTHONPATH), without changing the path themselves."""
    for script in ("submit.py", "arguments.py"):
        assert "sys.path" not in (ROOT / "launch" / script).read_text()
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--time", "60", "--dry-run", f"run.dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "sbatch --nodes=1" in done.stdout, done.stderr


def test_a_newline_stays_in_its_word(monkeypatch, capsys, tmp_path):
    injected = f"tracking.name=a\ntouch {tmp_path}/marker\n"
    code, said, _ = run_submit(monkeypatch, capsys, "--time", "60", "--dry-run", f"run.dir={tmp_path}/run", injected)
    assert code == 0 and shlex.split(said.partition("\n\n")[0])[-1] == injected
    (tmp_path / "odd.yaml").write_text(to_yaml(load_config()).replace("runs/digits", f'"{tmp_path}/a\\nb"'))
    code, _, error = run_submit(
        monkeypatch, capsys, "--time", "60", "--dry-run", "--config", str(tmp_path / "odd.yaml")
    )
    assert code == 2 and "run.dir" in error and "control characters" in error


def test_variables_are_arguments_so_that_they_survive_export_none(monkeypatch, capsys, tmp_path):
    """By the script itself, up to where it looks for the project, in an empty environment."""
    monkeypatch.setenv("EBM_MAX_CRASHES", "7")
    odd = "nice -n '1 2'"
    command = ["--time=60", "--dry-run", "--export=NONE", "--container", odd, f"run.dir={tmp_path}/run"]
    words = shlex.split(run_submit(monkeypatch, capsys, *command)[1].partition("\n\n")[0])
    script = words.index(str(submit.SCRIPT))
    assert "--export=NONE" in words[:script] and "EBM_MAX_CRASHES=7" in words[script:]
    text = submit.SCRIPT.read_text().partition("# Modules and environments")[0]
    text += 'printf "%s\\n" "$project" "$max_crashes" "$EBM_CONTAINER" "$SLURM_EXPORT_ENV" "$@"\n'
    done = subprocess.run(["bash", "-c", text, *words[script:]], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"})  # fmt: skip
    assert done.stdout.splitlines() == [str(ROOT), "7", odd, "ALL", f"run.dir={tmp_path}/run"], done.stderr


def test_a_sweep_of_a_product(monkeypatch, capsys, tmp_path):
    """Each trial has a directory by its values and the sweep's group; a list is one value."""
    shared = [f"run.dir={tmp_path}/run", "train.steps=9", "energy.features=8,16"]
    options = ["--time=60", "--at-once=2", "--sweep", "optim.lr=1e-4,3e-4", "sampler.num_steps=20,40"]
    code, said, error = run_submit(monkeypatch, capsys, "--dry-run", *options, *shared)
    assert code == 0, error
    words = shlex.split(said.partition("\n\n")[0])
    assert {"--array=0-3%2", "--job-name=run-sweep", f"--output={tmp_path}/run-sweep/logs/%A_%a.out"} < set(words)
    assert words[-3:] == shared and not any(word.startswith(("optim.lr", "sampler.")) for word in words)
    names = [f"lr_{lr}-num_steps_{steps}" for lr in ("1e-4", "3e-4") for steps in (20, 40)]
    trials = [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("trial ")]
    assert [line[2:] for line in trials] == [
        [f"run.dir={tmp_path}/run-sweep/{name}", "tracking.group=run-sweep"] for name in names
    ]
    assert trials[2][:2] == ["optim.lr=3e-4", "sampler.num_steps=20"]
    assert not (tmp_path / "run-sweep").exists()
    odd = "data.source=a:'b,c'"
    lists = sweeps.product(["energy.features=[8,16],[16,32]", odd])
    assert lists == [["energy.features=[8,16]", odd], ["energy.features=[16,32]", odd]]
    code, _, error = run_submit(monkeypatch, capsys, "--dry-run", "--time=60", "--sweep=optim.lr=1e-4,", *shared)
    assert code == 2 and "a value is empty" in error


def test_a_sweep_goes_on_where_some_trials_are_done(monkeypatch, capsys, tmp_path):
    for name, code in (("lr_1e-4", 0), ("lr_3e-4", 2)):
        folder = tmp_path / f"run-sweep/{name}"
        folder.mkdir(parents=True)
        (folder / "DONE").touch()
        options = ["--time=60", "--sweep=optim.lr=1e-4,3e-4", "--dry-run", f"run.dir={tmp_path}/run"]
        assert run_submit(monkeypatch, capsys, *options)[0] == code


def test_options_of_the_users_own_file(monkeypatch, capsys, tmp_path):
    """They stand behind those of the command, which win."""
    (tmp_path / "mine").write_text("# ours\n--account=me --partition gpu\n--gpus 8\n--time=1:00:00\n--licenses=x\n")
    monkeypatch.setenv("EBM_SUBMIT", str(tmp_path / "mine"))
    command = ["--dry-run", "--partition=cpu", "--cpu-ranks=2", f"run.dir={tmp_path}/run"]
    code, said, told = run_submit(monkeypatch, capsys, *command)
    words = shlex.split(said.partition("\n\n")[0])
    assert code == 0 and {"--account=me", "--partition=cpu", "--time=1:00:00", "--licenses=x"} <= set(words)
    assert not any("gpu" in word for word in words if word.startswith("--")) and str(tmp_path / "mine") in told
    monkeypatch.setenv("EBM_SUBMIT", str(tmp_path / "none"))
    assert run_submit(monkeypatch, capsys, *command)[0] == 2


def test_devices_that_do_not_go_together(monkeypatch, capsys, tmp_path):
    job = ["--time", "60", "--dry-run", f"run.dir={tmp_path}/run"]
    for options in (["--gpus", "1", "train.device=cpu"], ["--cpu-ranks", "1", "train.device=cuda"]):
        code, _, error = run_submit(monkeypatch, capsys, *job, *options)
        assert code == 2 and "train.device=" in error and "--gpus" in error


CRASHED = """
run={run}; max_crashes=5
fail() {{ exit 9; }}
requeue() {{ echo "requeued: $1"; }}
{function}
crashed why
"""


@pytest.mark.parametrize(
    ("content", "count"),
    [("none 2", 3), ("none 08", 9), ("none x[$(touch {run}/marker)]", 1), ("none $(touch {run}/marker)", 1),
     ("step_00000010 4", 1), ("none -3", 1), ("none 99999999999999999999", 1), ("", 1)],
)  # fmt: skip
def test_the_count_of_crashes_is_a_number_or_nothing(tmp_path, content, count):
    """RUN/crashes is read by a shell whose arithmetic would run a command that stands in it."""
    script = (ROOT / "launch/train.sbatch").read_text()
    function = "crashed() {" + script.partition("crashed() {")[2].partition("\n}\n")[0] + "\n}"
    (tmp_path / "crashes").write_text(content.format(run=tmp_path) + "\n")
    done = subprocess.run(
        ["bash", "-c", CRASHED.format(run=tmp_path, function=function)], capture_output=True, text=True
    )
    assert not (tmp_path / "marker").exists()
    assert (tmp_path / "crashes").read_text() == f"none {count}\n", done.stderr
    assert done.returncode == (9 if count > 5 else 0)


def test_what_the_job_would_find_out_is_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done/DONE").touch()
    (tmp_path / "twice.txt").write_text(f"run.dir={tmp_path}/a optim.lr=1e-4\nrun.dir={tmp_path}/a optim.lr=2e-4\n")
    (tmp_path / "open.txt").write_text("run.dir='runs/a\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text(to_yaml(load_config(None, [f"run.dir={tmp_path / 'other'}"])))
    hour, fresh = ["--time", "60"], f"run.dir={tmp_path / 'fresh'}"
    for options, named in (
        ([*hour, "--nodes", "3", "--gpus", "2", fresh], "data.streams=4 is not divisible by 3 nodes x 2 ranks = 6"),
        ([*hour, "--nodes", "3", fresh], "data.streams=6 train.batch_size=132 buffer.size=4098"),
        ([*hour, "--nodes", "3", fresh, "buffer.size=auto"], "data.streams=6 train.batch_size=132\n"),
        ([*hour, "train.stepz=5"], "did you mean train.steps"),
        ([*hour, "--config", "nowhere.yaml"], "no such file"),
        ([*hour, "run.dir=runs/50%j"], "%"),
        ([*hour, f"run.dir={tmp_path / 'done'}"], "is done already"),
        ([*hour, f"run.dir={tmp_path / 'other'}", "optim.lr=7e-4"], "optim.lr: 0.003 there, 0.0007 now"),
        ([*hour, "--sweep", str(tmp_path / "twice.txt")], "two lines have run.dir="),
        ([*hour, "--sweep", str(tmp_path / "open.txt")], "No closing quotation"),
        (["--time", "9", fresh], "the signal to save comes 300 s before its end; ask for 10 minutes or more"),
        (["--time", "soon", fresh], "--time soon"),
    ):
        code, said, error = run_submit(monkeypatch, capsys, "--dry-run", *options)
        assert (code, said) == (2, "") and named in error, error


def test_slurm_times():
    times = {"90": 5400, "1:30": 90, "4:00:00": 14400, "1-12": 129600, "1-0:30": 88200, "2-00:00:05": 172805}
    assert {text: submit.seconds(text) for text in times} == times


def test_arguments_of_a_sweeps_task(tmp_path, monkeypatch, capsys):
    file = tmp_path / "sweep.txt"
    file.write_text("# comment\n\nrun.dir=a optim.lr=1e-3\n  run.dir='b c' tracking.tags=[x,y]\n")
    monkeypatch.setenv("EBM_SWEEP", str(file))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arguments.py", "train.steps=5"])
    assert arguments.main() == 0
    assert capsys.readouterr().out == f"{tmp_path}/b c\0train.steps=5\0run.dir=b c\0tracking.tags=[x,y]\0"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert arguments.main() == 2 and "has 2 lines" in capsys.readouterr().err


def node(name: str, run_dir, **changes) -> dict:
    """A real report of this machine, under another name, with changes."""
    (run_dir / "token").write_text("token\n")
    return check_nodes.report(str(run_dir), "token", "127.0.0.1") | {"node": name} | changes


def test_nodes_that_fit_and_nodes_that_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(check_nodes, "MIN_FREE_GB", 1e-6)
    since = time.time()
    good = node("n1", tmp_path)
    assert check_nodes.compare([good, node("n2", tmp_path)], since, time.time()) == []
    equal = good["equal"]
    assert re.fullmatch(r"[0-9a-f]{12}", equal["code"]) and equal["torch"] != "missing" and "pydantic" in equal
    for changes, named in (
        ({"equal": equal | {"torch": "2.0"}}, f"torch is not the same on all nodes: {equal['torch']} on n1; 2.0 on n2"),
        ({"equal": equal | {"gpus": "7 x H100"}}, "gpus is not the same"),
        ({"clock": time.time() + 60}, "n2: its clock is off by"),
        ({"clock": since - 60}, "n2: its clock is off by 60 s"),
        ({"shared": False}, "n2 does not see this run directory"),
        ({"free_gb": 0.0}, "n2: 0.0 GB free"),
        ({"gpus_of_job": 8, "gpus_seen": 7}, "n2: the job has 8 GPUs there, nvidia-smi shows 7"),
        ({"head": []}, "n2 can't resolve the head node's address"),
        ({"host": "other", "head": ["127.0.1.1"]}, "n2 takes the head node's address for its own (127.0.1.1)"),
    ):
        problems = check_nodes.compare([good, node("n2", tmp_path, **changes)], since, time.time())
        assert len(problems) == 1 and named in problems[0], problems


def test_another_copy_of_the_code_is_noticed(tmp_path):
    """By the real commands, with a changed file; and a node that does not answer is not one that does not fit."""
    for name in ("ebm", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "token").write_text("token")
    environment = os.environ | {"EBM_MIN_FREE_GB": "0.000001"}
    since = str(time.time())

    def report() -> str:
        command = [
            sys.executable,
            str(tmp_path / "launch/check_nodes.py"),
            "report",
            str(tmp_path),
            "token",
            "127.0.0.1",
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout

    def compare(nodes: int, lines: str) -> tuple[int, str]:
        command = [sys.executable, str(tmp_path / "launch/check_nodes.py"), "compare", str(nodes), since]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout

    first, again = report(), report()
    assert compare(2, first + again)[0] == 0
    assert compare(3, first + again)[0] == check_nodes.EXIT_UNANSWERED
    with (tmp_path / "ebm/trainer.py").open("a") as file:
        file.write("\n")
    code, said = compare(2, first + report())
    assert code == check_nodes.EXIT_UNFIT and "code is not the same on all nodes" in said


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="a mount of one's own needs root and unshare"
)
def test_a_directory_that_is_not_shared(tmp_path):
    """Another file system in its place, as on a node that did not mount the shared one."""
    (tmp_path / "token").write_text("token")
    report = shlex.join(
        [sys.executable, str(ROOT / "launch/check_nodes.py"), "report", str(tmp_path), "token", "127.0.0.1"]
    )
    outside = subprocess.run(["sh", "-c", report], capture_output=True, text=True, check=True).stdout
    mount = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {shlex.quote(str(tmp_path))} && {report}"]
    inside = subprocess.run(mount, capture_output=True, text=True)
    if inside.returncode:
        pytest.skip(f"no mounts here: {inside.stderr.strip()}")
    assert '"shared": true' in outside and '"shared": false' in inside.stdout


def test_sweep_needs_a_line(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no line with overrides"):
        sweeps.read_lines(tmp_path / "empty.txt")
