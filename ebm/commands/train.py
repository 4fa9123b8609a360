"""ebm train [--config FILE] [key=value ...], or accelerate launch train.py: train, or resume, a run."""

import os
import sys
import textwrap
import time
from contextlib import suppress

from ebm.config import DEFAULT_CONFIG, Config, describe, load_config
from ebm.errors import ConfigError, UserError
from ebm.runtime.process import configure_logging

STARTED = time.monotonic()


def add_arguments(parser) -> None:
    parser.add_argument("--config", help=f"YAML file, or the name of a shipped one (default: {DEFAULT_CONFIG.stem})")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, size and cost, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, such as train.steps=500")
    parser.epilog = all_keys()


def run(arguments) -> int:
    code = _run(arguments)
    leave_code(code)
    return code


def _run(arguments) -> int:
    rank = int(os.environ.get("RANK", 0))
    main_rank = rank == 0
    configure_logging(rank)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from ebm.training.cost import dry_run

            if main_rank:
                dry_run(config)
            return 0
        return train(config)
    except UserError as error:
        if main_rank or not isinstance(error, ConfigError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


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


def train(config: Config) -> int:
    from ebm.data.shards import ensure_shards  # torch and its libraries load from here on: --help needs none of them
    from ebm.runtime.distributed import World
    from ebm.training import loop

    world = World(config.train)
    try:
        if config.data.streams % world.size:
            raise ConfigError(
                f"data.streams={config.data.streams} is not divisible by {world.size} processes; launch "
                "with a divisor of it, or set data.streams to a multiple"
            )
        error = None
        if world.is_main:
            try:
                ensure_shards(config.data.shards, config.data.source, "train")
            except UserError as caught:
                error = caught
        world.raise_together(error)
        return loop.train(config, world, STARTED)
    finally:
        world.close()


def leave_code(code: int) -> None:
    """For batch scripts, since launchers turn every exit code into 1: those that say what to do go to EBM_EXIT_FILE."""
    file = os.environ.get("EBM_EXIT_FILE")
    if file and code not in (0, 1):
        with suppress(OSError), open(file, "w") as stream:
            stream.write(f"{code}\n")
