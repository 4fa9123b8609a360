"""From a config to a queued Slurm job, in one command; the config is checked here, not in the queue.

    python launch/submit.py --nodes 2 --gpus 8 --time 4:00:00 [--config FILE] [key=value ...]
    python launch/submit.py --nodes 4 --cpu-ranks 2 --time 30 --dry-run train.steps=500
    python launch/submit.py --gpus 1 --time 1:00:00 --sweep "optim.lr=1e-4,3e-4 sampler.num_steps=20,40" --at-once 8

The job is launch/train.sbatch: it goes on over time limits, preemption and lost nodes until RUN/DONE exists. The same
command again goes on with a run that stopped. Options that you always give can stand in a file of yours,
~/.config/ebm/submit (or the one that EBM_SUBMIT names), as --account=me --partition=gpu; those of the command win.
docs/clusters.md
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import sweeps

from ebm.config import Config, check_same_run, load_config
from ebm.config.reading import overrides_last
from ebm.errors import ConfigError, UserError
from ebm.runtime.process import flush_output

PROJECT = Path(__file__).absolute().parent.parent
SCRIPT = PROJECT / "launch" / "train.sbatch"
PASSED_ON = ("partition", "account", "qos", "mem", "constraint", "gres", "dependency", "reservation", "mail-type",
             "mail-user")  # fmt: skip
NOT_FOR_JOBS = ("EBM_EXIT_FILE", "EBM_SUBMIT")  # of another run, and of this command
OTHER = re.compile(r"--[a-z][a-z0-9-]*=.*", re.DOTALL)
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")  # Slurm's: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S


def main() -> int:
    try:
        arguments, told = with_defaults(sys.argv[1:])
        options = parse(arguments)
        planned = job(options)
        if told:
            print(told, file=sys.stderr)
        if options.dry_run:
            print("\n".join([shlex.join(planned.command), "", *planned.facts]))
            return 0
        return submit(planned)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        return 128 + signal.SIGPIPE  # whoever read the output, such as `head`, has seen enough
    finally:
        flush_output()


def with_defaults(given: list[str]) -> tuple[list[str], str]:
    """The arguments behind those of the user's own file, where there is one, and what to tell. Raises ConfigError."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    file = Path(os.environ.get("EBM_SUBMIT", f"{home}/ebm/submit")).expanduser()
    if not file.is_file():
        if os.environ.get("EBM_SUBMIT"):
            raise ConfigError(f"EBM_SUBMIT={file}: no such file; unset it, or name a file with options")
        return given, ""
    try:
        found = shlex.split(file.read_text(), comments=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if any(re.match("--(gpus|cpu-ranks)(=|$)", argument) for argument in given):
        found = without(found, "--gpus", "--cpu-ranks")
    return [*found, *given], f"options of {file}: {shlex.join(found)}"


def without(arguments: list[str], *names: str) -> list[str]:
    """The arguments less these options and their values."""
    left, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in names and rest:
            rest.pop(0)
        elif argument not in names and argument.partition("=")[0] not in names:
            left.append(argument)
    return left


def parse(arguments: list[str]) -> argparse.Namespace:
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
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="FILE|VALUES",
        help='a job array: a run for each line of a file with overrides, or for each combination of "key=a,b key=c,d"',
    )  # fmt: skip
    parser.add_argument("--at-once", type=positive, help="runs of a sweep at the same time, at most")
    parser.add_argument("--container", default="", help='before every command, as "apptainer exec --nv image.sif"')
    parser.add_argument("--dry-run", action="store_true", help="print the command and what it does, submit nothing")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    ours = [name for action in parser._actions for name in action.option_strings]
    others = [
        argument for argument in arguments
        if OTHER.fullmatch(argument) and not any(name.startswith(argument.partition("=")[0]) for name in ours)
    ]  # fmt: skip
    rest = [argument for argument in arguments if argument not in others]
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


class Job(NamedTuple):
    """What is submitted: the sbatch command, what to tell of it, and the sweep whose file it reads, if any."""

    command: list[str]
    facts: list[str]
    sweep: sweeps.Sweep | None


def job(options: argparse.Namespace) -> Job:
    """The job of these options. Raises ConfigError for what it would only find out when it starts."""
    sweep, overrides = None, options.overrides
    if options.sweep:
        sweep, overrides = sweeps.plan(options.sweep, options.config, overrides)
    configs = sweep.configs if sweep else [load_config(options.config, overrides)]
    ranks = options.gpus or options.cpu_ranks or 1
    for config in configs:
        check(config, options.nodes, ranks, on_gpus=options.gpus is not None)
    if all(is_done(config) for config in configs):
        raise ConfigError(
            f"run.dir={configs[0].run.dir} is done already; another run.dir begins a new run, and "
            "train.extend=true with more train.steps goes on with it"
        )
    lead = checked_lead(options)
    command = ["sbatch", f"--nodes={options.nodes}", f"--time={options.time}", f"--signal=B:USR1@{lead}"]
    command += [f"--cpus-per-task={ranks * (options.cpus or 1 + max(c.data.workers for c in configs))}"]
    command += [f"--gpus-per-node={options.gpus}"] if options.gpus else []
    command += [f"--{name}={value}" for name in PASSED_ON if (value := vars(options)[name.replace("-", "_")])]
    command += ["--exclusive"] if options.exclusive else []
    run_dir = Path(configs[0].run.dir).absolute()
    if sweep:
        command += [f"--array=0-{len(configs) - 1}" + (f"%{options.at_once}" if options.at_once else "")]
    names = (sweep.name, f"{sweep.folder}/%A_%a.out") if sweep else (run_dir.name, f"{run_dir}/logs/%j.out")
    output = options.output or names[1]
    # What Slurm itself says ("error: *** JOB 7 CANCELLED ... DUE TO JOB REQUEUE ***") goes to a file of its own.
    error = f"{output.removesuffix('.out')}.slurm"
    command += [f"--job-name={options.job_name or names[0]}", f"--output={output}", f"--error={error}"]
    arguments = [f"--config={file}" for file in options.config]
    if options.gpus and all(config.train.device == "auto" for config in configs):
        arguments.append("train.device=cuda")  # a node whose GPUs can't be used ends the job, and does not train slowly
    if any(config.train.extend for config in configs) and "train.extend=true" not in overrides:
        arguments.append("train.extend=true")  # which the job, too, looks for
    variables = [f"{name}={value}" for name, value in settings(options, ranks, sweep).items()]
    world = options.nodes * ranks
    size = f"{options.nodes} node{'s' * (options.nodes > 1)} x {ranks} {'GPU' if options.gpus else 'CPU'} rank"
    facts = [
        f"{size}{'s' * (ranks > 1)} = {world}; saves {lead} s before each limit of {options.time}",
        *([f"trial {i}: {shlex.join(line)}" for i, line in enumerate(sweep.lines)] if sweep else [f"run: {run_dir}"]),
        f"log: {output}",
        f"script: {SCRIPT}",
    ]
    return Job([*command, *options.sbatch, str(SCRIPT), *variables, *arguments, *overrides], facts, sweep)


def checked_lead(options: argparse.Namespace) -> int:
    """Seconds from the signal to save to the time limit. Raises ConfigError where they are most of a start."""
    lead = options.save_seconds + 60  # Slurm looks at time limits once a minute
    if 2 * lead > seconds(options.time):
        raise ConfigError(
            f"--time {options.time} leaves less than half of a start for training: the signal to save comes {lead} s "
            f"before its end; ask for {-(-2 * lead // 60)} minutes or more, or lower --save-seconds"
        )
    return lead


def settings(options: argparse.Namespace, ranks: int, sweep: sweeps.Sweep | None) -> dict[str, str]:
    """The job's variables: the user's own EBM_*, and over these what the options say. They are arguments of the script,
    since --export=NONE keeps the environment from it."""
    own = {name: value for name, value in os.environ.items() if name.startswith("EBM_") and name not in NOT_FOR_JOBS}
    ours = {"EBM_PROJECT": str(PROJECT), "EBM_PYTHON": sys.executable, "EBM_RANKS_PER_NODE": str(ranks),
            "EBM_SAVE_SECONDS": str(options.save_seconds)}  # fmt: skip
    if options.container:
        ours |= {"EBM_CONTAINER": options.container, "EBM_PYTHON": "python"}
    if options.setup:
        file = Path(options.setup)
        ours |= {"EBM_SETUP": str(file.absolute()) if file.is_file() else options.setup}
    return own | ours | ({"EBM_SWEEP": str(sweep.file)} if sweep else {})


def check(config: Config, nodes: int, ranks: int, on_gpus: bool) -> None:
    """Raises ConfigError where the job would only find out when it starts."""
    if (config.train.device == "cpu" and on_gpus) or (config.train.device == "cuda" and not on_gpus):
        raise ConfigError(
            f"train.device={config.train.device} does not go with a job {'with' if on_gpus else 'without'} --gpus; "
            "change one of them"
        )
    check_divisible(config, nodes, ranks)
    run_dir = Path(config.run.dir).absolute()
    if "%" in str(run_dir):
        raise ConfigError(f"run.dir={config.run.dir}: Slurm would read the % in the names of its log files")
    if (run_dir / "config.yaml").exists():
        check_same_run(load_config(run_dir / "config.yaml"), config, str(run_dir))


def is_done(config: Config) -> bool:
    """Whether a start would do nothing."""
    return (Path(config.run.dir) / "DONE").exists() and not config.train.extend


def check_divisible(config: Config, nodes: int, ranks: int) -> None:
    """Raises ConfigError where the streams can't be dealt to the ranks, with all keys that have to change."""
    world, streams, batch = nodes * ranks, config.data.streams, config.train.batch_size
    if streams % world == 0:
        return
    streams = -(-streams // world) * world
    part = streams * config.train.accumulate
    wanted = {"data.streams": streams, "train.batch_size": -(-batch // part) * part,
              "buffer.size": -(-config.buffer_size // streams) * streams}  # fmt: skip
    now = {"data.streams": config.data.streams, "train.batch_size": batch, "buffer.size": config.buffer_size}
    if config.buffer.size == "auto":  # it follows the others
        wanted.pop("buffer.size")
    change = " ".join(f"{key}={value}" for key, value in wanted.items() if value != now[key])
    raise ConfigError(
        f"data.streams={config.data.streams} is not divisible by {nodes} nodes x {ranks} ranks = {world}; set all that "
        f"depends on it, for example: {change}"
    )


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


def submit(planned: Job) -> int:
    output = Path(next(option for option in planned.command if option.startswith("--output=")).partition("=")[2])
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if planned.sweep:
            planned.sweep.folder.mkdir(parents=True, exist_ok=True)
            planned.sweep.file.write_text(planned.sweep.text)
        done = subprocess.run(planned.command, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError("there is no sbatch here: submit from a login node, or use --dry-run") from error
    except OSError as error:
        raise ConfigError(f"{output.parent}: {error}") from error
    if done.returncode:
        raise ConfigError(f"sbatch refused: {done.stderr.strip()}")
    print(done.stdout.strip())
    print("\n".join([*planned.facts[:-2], *what_next(done.stdout, str(output))]))
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
