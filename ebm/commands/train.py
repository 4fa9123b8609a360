"""ebm train [--config FILE] [key=value ...], or accelerate launch train.py: train, or resume, a run."""

import argparse
import logging
import os
import textwrap
import time

from ebm.config import DEFAULT_CONFIG, Config, describe, load_config
from ebm.errors import ConfigError, UserError
from ebm.runtime.process import configure_logging, leave_code, show_error

log = logging.getLogger(__name__)

STARTED = time.monotonic()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help=f"YAML file (default: configs/{DEFAULT_CONFIG.name})")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, size and cost, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as train.steps=500")
    parser.epilog = all_keys()


def all_keys() -> str:
    lines = [
        "exit codes: 0 done, 2 bad usage or config, 3 diverged, 4 data error, 75 stopped and resumable",
        "",
        "keys:",
    ]
    for key, kinds, kind, default, meaning in describe():
        of = f" [{', '.join(kinds)}]" if kinds else ""
        lines.append(f"  {key}{of}: {kind} = {default}")
        for paragraph in meaning.splitlines():
            lines += textwrap.wrap(paragraph, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> int:
    rank = int(os.environ.get("RANK", "0"))
    configure_logging(rank)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if not arguments.dry_run:
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


def train(config: Config, rank: int) -> int:
    """Train in this process, one of the run's ranks. Returns the exit code."""
    from ebm.data.shards import ensure_shards  # torch and its libraries load from here on: --help needs none of them
    from ebm.runtime.distributed import World
    from ebm.runtime.watchdog import Watchdog
    from ebm.training import loop
    from ebm.training.memory import check_memory

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
        except BaseException:
            world.abandon()
            raise
    leave_code(code)  # before the ranks part, which may hang
    world.close()
    return code
