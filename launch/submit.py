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
from ebm.config.arguments import overrides_last
from ebm.errors import ConfigError, UserError

PROJECT = Path(__file__).absolute().parent.parent
SCRIPT = PROJECT / "launch" / "train.sbatch"
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
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other, as --sbatch=--qos=x"
    )
    parser.add_argument("--save-seconds", type=positive, default=240, help="time a save may take before the limit")
    parser.add_argument("--sweep", help="a job array: each line of this file has a run's overrides, run.dir among them")
    parser.add_argument("--at-once", type=positive, help="runs of a sweep at the same time, at most")
    parser.add_argument("--container", default="", help='before every command, as "apptainer exec --nv image.sif"')
    parser.add_argument("--dry-run", action="store_true", help="print the script and the command, and submit nothing")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args(overrides_last(parser, sys.argv[1:], only_dotted=True))


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
    command += [f"--{name}={value}" for name in ("partition", "account") if (value := getattr(options, name))]
    environment = {"EBM_PROJECT": str(PROJECT), "EBM_PYTHON": sys.executable, "EBM_RANKS_PER_NODE": str(ranks),
                   "EBM_SAVE_SECONDS": str(options.save_seconds)}  # fmt: skip
    if options.container:
        environment |= {"EBM_CONTAINER": options.container, "EBM_PYTHON": "python"}
    if options.sweep:
        at_once = f"%{options.at_once}" if options.at_once else ""
        logs = run_dirs[0].parent / "logs"
        command += [f"--array=0-{len(lines) - 1}{at_once}", f"--job-name=sweep-{Path(options.sweep).stem}"]
        command += [f"--output={logs}/%A_%a.out"]
        environment |= {"EBM_SWEEP": str(Path(options.sweep).absolute())}
    else:
        command += [f"--job-name={run_dirs[0].name}", f"--output={run_dirs[0]}/logs/%j.out"]
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
    print(f"{done.stdout.strip()}\nlog: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
