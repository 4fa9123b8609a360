"""ebm train [--config FILE] [key=value ...], or accelerate launch train.py: train, or resume, a run."""

import argparse
import logging
import os
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebm.config import DEFAULT_CONFIG, Config, check_places, describe, load_config
from ebm.config.describing import Row, meant
from ebm.config.reading import overrides_last
from ebm.errors import EXIT_STOPPED, ConfigError, UserError
from ebm.runtime.process import configure_logging, leave_code, show_error, under_launcher

log = logging.getLogger(__name__)

STARTED = time.monotonic()

HELP = f"""\
usage: accelerate launch train.py [--config FILE] [key=value ...]
       ebm train [--config FILE] [key=value ...]              (one process)

Trains an energy, or resumes the run in run.dir: the same command again goes on.

  --config FILE     a YAML file, or the name of a shipped config (default: {DEFAULT_CONFIG.stem}); it may stand several
                    times, and later files win. A file's key `base:` names files that are merged under it
  key=value         overrides, such as train.steps=500 data.shape=1,8,8; also --train.steps=500, --train.steps 500
  --dry-run         show what differs from the defaults, size, memory and time, the whole config; write nothing
  --help SECTION    the keys of a section, or one key: type, default, meaning. --help all: every key

keys that most runs set:
{{keys}}

sections: {", ".join(Config.model_fields)}
exit codes: 0 done, 2 bad usage or config, 3 diverged, 4 data error, 75 stopped and resumable
stop a run: touch RUN/STOP, or Ctrl-C; how a run fares: ebm doctor RUN; all of it: docs/configuration.md
"""
COMMON = (
    "run.dir",
    "data.shards",
    "data.source",
    "data.shape",
    "energy.kind",
    "sampler.num_steps",
    "sampler.step_size",
    "sampler.noise_scale",
    "buffer.size",
    "buffer.reinit_prob",
    "loss.kind",
    "optim.lr",
    "train.steps",
    "train.batch_size",
    "train.mixed_precision",
    "train.extend",
    "run.init",
    "checkpoint.every",
    "tracking.wandb",
    "evaluate.shards",
)
WIDTH, MAX_TYPE = 118, 40  # characters of a line and of a type in the short help


class Help(argparse.Action):
    """`--help`, `--help SECTION`, `--help KEY`, `--help all`: shows it and exits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        print(short_help() if values is None else keys_of(values))
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-h", "--help", nargs="?", metavar="SECTION", action=Help, help="this help, or that of keys")
    parser.add_argument("--config", action="append", help=f"YAML file (default: configs/{DEFAULT_CONFIG.name})")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, size and cost, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as train.steps=500")


def arrange(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments in the one form that `parser` reads."""
    return overrides_last(parser, arguments)


def short_help() -> str:
    rows = {row.key: row for row in reversed(describe())}  # of several kinds' rows the first
    lines = []
    for key in COMMON:
        row = rows[key]
        kind = row.type if len(row.type) <= MAX_TYPE else f"--help {key}"
        meaning = row.meaning.splitlines()[0].partition(";")[0] if not key.endswith(".kind") else "..."
        line = f"  {key:<22}{kind} = {row.default}: {meaning}"
        lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ...")
    return HELP.format(keys="\n".join(lines)).rstrip()


def keys_of(name: str) -> str:
    """The keys of a section, or one key, or, of `all`, every key. Raises ConfigError where there is none."""
    asked = name.removesuffix(".")
    rows = [row for row in describe() if asked == "all" or f"{row.key}.".startswith(f"{asked}.")]
    if not rows:
        raise ConfigError(
            f"--help {name}: unknown key{meant(asked)}; the sections are {', '.join(Config.model_fields)}, and "
            "--help all shows every key"
        )
    return "\n".join(line for row in rows for line in lines_of(row))


def lines_of(row: Row) -> list[str]:
    of = f" [{', '.join(row.kinds)}]" if row.kinds else ""
    lines = [f"  {row.key}{of}: {row.type} = {row.default}"]
    for paragraph in row.meaning.splitlines():
        lines += textwrap.wrap(paragraph, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def run(arguments: argparse.Namespace) -> int:
    rank = _rank()
    configure_logging(rank)
    try:
        overrides = [*directory_of_trial(os.environ, arguments.config, arguments.overrides), *arguments.overrides]
        config = load_config(arguments.config, overrides)
        if not arguments.dry_run:
            check_places(config, arguments.config, overrides)
            return train(config, rank)
        if rank == 0:
            from ebm.training.cost import dry_run

            dry_run(config)
        return 0
    except UserError as error:
        leave_code(error.exit_code)
        if rank == 0 or not isinstance(error, ConfigError):  # the others have the same config
            show_error(error)
        return error.exit_code


def _rank() -> int:
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal():
        raise ConfigError(f"RANK={rank!r} of the environment must be a number; launchers set it, or unset it")
    return int(rank)


def directory_of_trial(
    environment: Mapping[str, str], config: Sequence[str] | None, overrides: Sequence[str]
) -> list[str]:
    """In a sweep of W&B's, a run directory for each trial, RUN-SWEEP/TRIAL, unless run.dir is given: the override, or
    nothing."""
    sweep, trial = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
    if not sweep or not trial or any(item.startswith("run.dir=") for item in overrides):
        return []
    return [f"run.dir={load_config(config, overrides).run.dir}-{sweep}/{trial}"]


def train(config: Config, rank: int) -> int:
    """Train in this process, one of the run's ranks. Returns the exit code."""
    from ebm.data.shards import ensure_shards  # torch and its libraries load from here on: --help needs none of them
    from ebm.runtime.distributed import World
    from ebm.runtime.stopping import Watchdog
    from ebm.training import loop
    from ebm.training.cost import check_memory

    with Watchdog(config.train.collective_timeout, rank) as watchdog:
        world = World(config.train)
        try:
            if config.data.streams % world.size:
                raise ConfigError(
                    f"data.streams={config.data.streams} is not divisible by {world.size} processes; launch "
                    "with a divisor of it, or set data.streams to a multiple"
                )
            check_memory(config, world)
            log.info(world.describe())
            data = config.data
            world.on_main(lambda: ensure_shards(data.shards, data.source, "train"), watchdog.beat)
            code = loop.train(config, world, watchdog, STARTED)
            left = leave_code(code, Path(config.run.dir))  # before the ranks part, which may hang
        except BaseException:
            world.abandon()
            raise
    world.close()
    # A launcher would make a traceback and exit code 1, or a restart, of a run that was asked to stop.
    return 0 if code == EXIT_STOPPED and left and under_launcher() else code
