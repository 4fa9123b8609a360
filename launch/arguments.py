"""What train.py is given in this Slurm job, for train.sbatch: the run directory, then the arguments, NUL after each.

    python launch/arguments.py [--config FILE] [key=value ...]

In a job array, EBM_SWEEP names a file with a line of overrides a task (quoted as for a shell; empty lines and lines
that begin with # do not count): task SLURM_ARRAY_TASK_ID, from 0, takes its line after the arguments given here.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from sweeps import read_lines

from ebm.config import load_config
from ebm.config.reading import overrides_last
from ebm.errors import ConfigError, UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    try:
        given = parser.parse_args(overrides_last(parser, sys.argv[1:]))
        overrides = given.overrides + line_of_task(os.environ)
        run_dir = Path(load_config(given.config, overrides).run.dir).absolute()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    config = [f"--config={file}" for file in given.config]
    sys.stdout.write("".join(f"{argument}\0" for argument in (run_dir, *config, *overrides)))
    return 0


def line_of_task(environment: Mapping[str, str]) -> list[str]:
    """This array task's overrides; none outside a sweep. Raises ConfigError."""
    if not environment.get("EBM_SWEEP"):
        return []
    lines, task = read_lines(environment["EBM_SWEEP"]), environment.get("SLURM_ARRAY_TASK_ID", "")
    if not task.isdecimal() or int(task) >= len(lines):
        raise ConfigError(
            f"SLURM_ARRAY_TASK_ID={task!r}: {environment['EBM_SWEEP']} has {len(lines)} lines; submit with "
            f"--array=0-{len(lines) - 1}"
        )
    return lines[int(task)]


if __name__ == "__main__":
    sys.exit(main())
