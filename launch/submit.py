"""From a config to a queued Slurm job, in one command; the config is checked here, not in the queue.

    python launch/submit.py --nodes 2 --gpus 8 --time 4:00:00 [--config FILE] [key=value ...]
    python launch/submit.py --nodes 4 --cpu-ranks 2 --time 30 --dry-run train.steps=500
    python launch/submit.py --gpus 1 --time 1:00:00 --sweep sweep.txt --at-once 8

The job is launch/train.sbatch: it goes on over time limits, preemption and lost nodes until RUN/DONE exists. The same
command again goes on with a run that stopped. docs/clusters.md
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from arguments import sweep

from ebm.config import Config, check_same_run, load_config
from ebm.config.reading import overrides_last
from ebm.errors import ConfigError, UserError

PROJECT = Path(__file__).absolute().parent.parent
SCRIPT = PROJECT / "launch" / "train.sbatch"
PASSED_ON = ("partition", "account", "qos", "mem", "constraint", "gres", "dependency", "reservation", "mail-type",
             "mail-user")  # fmt: skip
OTHER = re.compile(r"--[a-z][a-z0-9-]*=.*", re.DOTALL)
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")  # Slurm's: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S


def main() -> int:
    try:
        options = parse()
        command, environment = job(options)
        if options.dry_run:
            settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
            line = f"{' '.join(settings)} {shlex.join(command)}".replace("\n", "\n# ")  # all of it stays a comment
            print(f"{SCRIPT.read_text()}\n# {line}")
            return 0
        return submit(command, environment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=positive, default=1)
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--gpus", type=positive, help="GPUs a node, a rank each")
    ranks.add_argument("--cpu-ranks", type=positive, help="ranks a node, without GPUs (default: 1)")
    parser.add_argument("--cpus", type=positive, help="CPU cores a rank (default: 1 + data.workers)")
    parser.add_argument("--time", required=True, help="limit of one start, as Slurm writes it: 4:00:00, or minutes")
    slurm = parser.add_argument_group("Slurm's own, as sbatch knows them; any other is passed on, as --name=value")
    for name in PASSED_ON:
        slurm.add_argument(f"--{name}")
    slurm.add_argument("--exclusive", action="store_true", help="whole nodes")
    slurm.add_argument("--job-name", help="default: the name of the run directory")
    slurm.add_argument("--output", metavar="FILE", help="the log (default: RUN/logs/%%j.out)")
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTIONS", help='several, as "--qos=x --nice=5"'
    )
    parser.add_argument(
        "--setup", default="", metavar="FILE|CMD", help="read by the job's shell first: modules, an environment"
    )
    parser.add_argument("--save-seconds", type=positive, default=240, help="time a save may take before the limit")
    parser.add_argument("--sweep", help="a job array: each line of this file has a run's overrides, run.dir among them")
    parser.add_argument("--at-once", type=positive, help="runs of a sweep at the same time, at most")
    parser.add_argument("--container", default="", help='before every command, as "apptainer exec --nv image.sif"')
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command, and submit nothing")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    ours = [name for action in parser._actions for name in action.option_strings]
    others = [
        argument for argument in sys.argv[1:]
        if OTHER.fullmatch(argument) and not any(name.startswith(argument.partition("=")[0]) for name in ours)
    ]  # fmt: skip
    rest = [argument for argument in sys.argv[1:] if argument not in others]
    options = parser.parse_args(overrides_last(parser, rest, only_dotted=True))
    try:
        options.sbatch = [*others, *(word for text in options.sbatch for word in shlex.split(text))]
    except ValueError as error:
        raise ConfigError(f"--sbatch {options.sbatch}: {error}") from error
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def job(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The sbatch command, and the variables it is given beside the user's own. Raises ConfigError."""
    lines = sweep(options.sweep) if options.sweep else [[]]
    configs = [load_config(options.config, options.overrides + line) for line in lines]
    ranks = options.gpus or options.cpu_ranks or 1
    for config in configs:
        check(config, options.nodes, ranks, on_gpus=options.gpus is not None)
    run_dirs = [Path(config.run.dir).absolute() for config in configs]
    for i, run_dir in enumerate(run_dirs):
        if run_dir in run_dirs[:i]:
            raise ConfigError(f"sweep {options.sweep}: two lines have run.dir={run_dir}; give each its own")

    lead = options.save_seconds + 60  # Slurm looks at time limits once a minute
    if seconds(options.time) <= lead:
        raise ConfigError(
            f"--time {options.time} leaves no time to train: the signal to save comes {lead} s before its end; ask for "
            "more, or lower --save-seconds"
        )
    command = ["sbatch", f"--nodes={options.nodes}", f"--time={options.time}", f"--signal=B:USR1@{lead}"]
    command += [f"--cpus-per-task={ranks * (options.cpus or 1 + max(c.data.workers for c in configs))}"]
    command += [f"--gpus-per-node={options.gpus}"] if options.gpus else []
    command += [f"--{name}={value}" for name in PASSED_ON if (value := vars(options)[name.replace("-", "_")])]
    command += ["--exclusive"] if options.exclusive else []
    environment = {"EBM_PROJECT": str(PROJECT), "EBM_PYTHON": sys.executable, "EBM_RANKS_PER_NODE": str(ranks),
                   "EBM_SAVE_SECONDS": str(options.save_seconds)}  # fmt: skip
    if options.container:
        environment |= {"EBM_CONTAINER": options.container, "EBM_PYTHON": "python"}
    if options.setup:
        file = Path(options.setup)
        environment |= {"EBM_SETUP": str(file.absolute()) if file.is_file() else options.setup}
    if options.sweep:
        at_once = f"%{options.at_once}" if options.at_once else ""
        logs = run_dirs[0].parent / "logs"
        command += [f"--array=0-{len(lines) - 1}{at_once}"]
        names = f"sweep-{Path(options.sweep).stem}", f"{logs}/%A_%a.out"
        environment |= {"EBM_SWEEP": str(Path(options.sweep).absolute())}
    else:
        names = run_dirs[0].name, f"{run_dirs[0]}/logs/%j.out"
    command += [f"--job-name={options.job_name or names[0]}", f"--output={options.output or names[1]}"]
    arguments = [f"--config={file}" for file in options.config]
    if options.gpus and all(config.train.device == "auto" for config in configs):
        arguments.append("train.device=cuda")  # a node whose GPUs can't be used ends the job, and does not train slowly
    if any(config.train.extend for config in configs) and "train.extend=true" not in options.overrides:
        arguments.append("train.extend=true")  # which the job, too, looks for
    return [*command, *options.sbatch, str(SCRIPT), *arguments, *options.overrides], environment


def check(config: Config, nodes: int, ranks: int, on_gpus: bool) -> None:
    """Raises ConfigError where the job would only find out when it starts."""
    if (config.train.device == "cpu" and on_gpus) or (config.train.device == "cuda" and not on_gpus):
        raise ConfigError(
            f"train.device={config.train.device} does not go with a job {'with' if on_gpus else 'without'} --gpus; "
            "change one of them"
        )
    if config.data.streams % (nodes * ranks):
        raise ConfigError(
            f"data.streams={config.data.streams} is not divisible by {nodes} nodes x {ranks} ranks = {nodes * ranks}; "
            f"use a multiple, such as data.streams={-(-config.data.streams // (nodes * ranks)) * nodes * ranks}"
        )
    run_dir = Path(config.run.dir).absolute()
    if "%" in str(run_dir):
        raise ConfigError(f"run.dir={config.run.dir}: Slurm would read the % in the names of its log files")
    if (run_dir / "DONE").exists() and not config.train.extend:
        raise ConfigError(
            f"run.dir={config.run.dir} is done already; another run.dir begins a new run, and "
            "train.extend=true with more train.steps goes on with it"
        )
    if (run_dir / "config.yaml").exists():
        check_same_run(load_config(run_dir / "config.yaml"), config, str(run_dir))


def seconds(time: str) -> int:
    """A time limit of Slurm's in seconds. Raises ConfigError."""
    match = TIME.fullmatch(time)
    if not match:
        raise ConfigError(f"--time {time}: give minutes, hours:minutes:seconds, or days-hours:minutes:seconds")
    days, *parts = [int(part) if part else None for part in match.groups()]
    if days is None and parts[2] is None:  # minutes, or minutes:seconds
        return 60 * parts[0] + (parts[1] or 0)
    hours, minutes, rest = (part or 0 for part in parts)
    return 86400 * (days or 0) + 3600 * hours + 60 * minutes + rest


def submit(command: list[str], environment: dict[str, str]) -> int:
    output = Path(next(option for option in command if option.startswith("--output=")).partition("=")[2])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, check=False, env=os.environ | environment, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError("there is no sbatch here: submit from a login node, or use --dry-run") from error
    except OSError as error:
        raise ConfigError(f"{output.parent}: {error}") from error
    if done.returncode:
        raise ConfigError(f"sbatch refused: {done.stderr.strip()}")
    print(done.stdout.strip())
    print("\n".join(what_next(done.stdout, str(output))))
    return 0


def what_next(said: str, output: str) -> list[str]:
    """Where the log is, and how to follow and to end the job that sbatch said it had queued."""
    number = re.search(r"\d+", said)
    if number is None:
        return [f"log: {output}"]
    log = output.replace("%j", number[0]).replace("%A", number[0]).replace("%a", "0")
    return [f"log: {log}", f"tail -F {shlex.quote(log)}", f"squeue -j {number[0]}", f"scancel {number[0]}"]


if __name__ == "__main__":
    sys.exit(main())
