"""Sweeps: a file with a line of overrides for each run, or values whose every combination is a run.

    optim.lr=1e-4,3e-4 sampler.num_steps=20,40

are four trials. Values are split at commas outside of brackets and quotes.
"""

import hashlib
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ebm.config import Config, load_config
from ebm.config.reading import one_number
from ebm.errors import ConfigError

LONGEST = 100  # characters of a trial's name


class Sweep(NamedTuple):
    """Trials, each a line of overrides that names its run.dir, and what the whole is called."""

    name: str
    lines: list[list[str]]
    configs: list[Config]

    @property
    def folder(self) -> Path:
        """Where what belongs to all trials stands."""
        return Path(self.configs[0].run.dir).absolute().parent / "logs"

    @property
    def text(self) -> str:
        return "".join(f"{shlex.join(line)}\n" for line in self.lines)

    @property
    def file(self) -> Path:
        """Named by its content: a job that is queued keeps its own."""
        return self.folder / f"sweep_{hashlib.sha256(self.text.encode()).hexdigest()[:8]}.txt"


def read_lines(path: str | Path) -> list[list[str]]:
    """The overrides of each line of a sweep's file. Raises ConfigError."""
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
        found = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise ConfigError(f"sweep {path}: {error}") from error
    if not found:
        raise ConfigError(f"sweep {path}: no line with overrides, such as optim.lr=3e-4 run.dir=runs/lr_3e-4")
    return found


def product(words: Sequence[str]) -> list[list[str]]:
    """Every combination of the values of `key=value,value` words, the last key varying fastest."""
    return [list(line) for line in itertools.product(*(_choices(word) for word in words))]


def _choices(word: str) -> list[str]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"--sweep {word}: neither a file nor of the form key=value,value")
    depth, quote, parts = 0, "", [""]
    for c in text:
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        depth += (not quote) * ((c in "[{") - (c in "]}"))
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    if not all(parts):
        raise ConfigError(f"--sweep {word}: a value is empty; write key=value,value without spaces")
    return [f"{key}={part}" for part in parts]


def plan(given: Sequence[str], config: Sequence[str], overrides: Sequence[str]) -> tuple[Sweep, list[str]]:
    """The trials of `--sweep` (files and products, combined), and the overrides that all of them share.

    Beside a product, an override with several values for one number is part of it. A trial without a run.dir gets
    RUN-sweep/NAME by what is special about it, and W&B's group RUN-sweep unless there is one. Raises ConfigError.
    """
    lines: list[list[str]] = [[]]
    swept: list[str] = []
    for text in given:
        file = Path(text).is_file() or "=" not in text
        swept += [] if file else shlex.split(text)
        lines = [line + more for line in lines for more in (read_lines(text) if file else [[]])]
    if swept:
        swept += [word for word in overrides if one_number(word.partition("=")[0]) and "," in word.partition("=")[2]]
    shared = [word for word in overrides if word not in swept]
    lines = [line + more for line in lines for more in product(swept)]
    base = load_config(config, shared)
    name = f"{Path(base.run.dir).name}-sweep"
    for i, line in enumerate(lines):
        if not any(word.startswith("run.dir=") for word in line):
            line.append(f"run.dir={base.run.dir}-sweep/{_name(line, i)}")
        if base.tracking.group is None and not any(word.startswith("tracking.group=") for word in line):
            line.append(f"tracking.group={name}")
    configs = [load_config(config, [*shared, *line]) for line in lines]
    run_dirs = [Path(each.run.dir).absolute() for each in configs]
    for i, run_dir in enumerate(run_dirs):
        if run_dir in run_dirs[:i]:
            raise ConfigError(f"sweep {' '.join(given)}: two lines have run.dir={run_dir}; give each its own")
    return Sweep(name, lines, configs), shared


def _name(line: Sequence[str], number: int) -> str:
    """A trial's name by its values, such as lr_1e-4-num_steps_20."""
    keys = [word.partition("=")[0] for word in line]
    short = [key.rpartition(".")[2] for key in keys]
    named = [
        f"{key if short.count(last) > 1 else last}_{word.partition('=')[2]}"
        for word, key, last in zip(line, keys, short, strict=True)
    ]
    name = re.sub(r"[^\w.-]", "_", "-".join(named)).lstrip(".-")
    return name if 0 < len(name) <= LONGEST else f"trial_{number}"
