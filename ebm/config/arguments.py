"""A command line with `key=value` overrides, in the forms that people and other programs write them."""

import argparse
import re
from collections.abc import Sequence

from ebm.errors import ConfigError

PLAIN = re.compile(r"[\w.-]{1,200}=")
DASHED = re.compile(r"--([A-Za-z_][\w.-]{0,200})(=.*)?", re.DOTALL)


def overrides_last(parser: argparse.ArgumentParser, arguments: Sequence[str], only_dotted: bool = False) -> list[str]:
    """The arguments with overrides at the end, as `key=value`: argparse takes positional arguments in one place only.

    `--optim.lr=1e-3`, as W&B's agent writes it, and `--optim.lr 1e-3` become `optim.lr=1e-3`; `--data.trace` alone
    becomes `data.trace=true`. Options of `parser` stay as they are. Raises ConfigError for what is neither; with
    `only_dotted`, that stays as it is, too.
    """
    takes_value = {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}
    options: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        name, equals, _ = token.partition("=")
        known = [option for option in takes_value if option == name or (len(name) > 2 and option.startswith(name))]
        match = DASHED.fullmatch(token)
        if name in takes_value or len(known) == 1:
            options.append(token)
            if takes_value[name if name in takes_value else known[0]] and not equals and rest and _is_value(rest[0]):
                options.append(rest.pop(0))
        elif match is None or known or (only_dotted and "." not in name):
            (overrides if PLAIN.match(token) else options).append(token)
        elif match[2] is not None:
            overrides.append(f"{_key(match[1])}{match[2]}")
        elif rest and _is_value(rest[0]):
            overrides.append(f"{_key(match[1])}={rest.pop(0)}")
        elif "." in match[1]:
            overrides.append(f"{_key(match[1])}=true")
        else:
            raise ConfigError(
                f"{token}: no option, and without a value no key either; options are {', '.join(sorted(takes_value))}, "
                f"and keys are written as train.steps=500 or --train.steps 500"
            )
    return [*options, *overrides]


def _key(name: str) -> str:
    return name.replace("-", "_")


def _is_value(token: str) -> bool:
    """Whether a token can be the value of the one before: no option, no override. Negative numbers are values."""
    return not PLAIN.match(token) and (not token.startswith("-") or re.match(r"-\.?\d", token) is not None)
