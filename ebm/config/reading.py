"""Reads a command line, YAML and `key=value` overrides, each value by the type of its key: `run.dir=0123` stays text,
`8,16` is a list.

YAML alone would read a name such as 0123, 2024_01_01 or on as a number or a truth value."""

import argparse
import io
import re
from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf

from ebm.config.section import Section
from ebm.config.sections import Config
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
    needs_value = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
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
            option = name if name in takes_value else known[0]
            value = rest and (_is_value(rest[0]) or (option in needs_value and PLAIN.match(rest[0])))
            if takes_value[option] and not equals and value:
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


# The parser that OmegaConf uses: two parsers could read the same text differently.
YAML_LOADER: type = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

MAX_BYTES = 1 << 16  # size of a config file; the shipped ones have less than 2 KiB
MAX_VALUE = 2048  # characters of a value; Python refuses to print integers of more than 4300 digits
MAX_DEPTH = 32  # levels of nesting; libyaml overflows its stack far beyond that
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
NO_REFERENCES = "${...} is not supported; write the value out"

Types = list[Any]  # what a value may be: the members of its key's annotation


def read_file_text(text: str) -> Any:
    """The values of a config file. Raises ValueError, OSError or an error of YAML's or OmegaConf's."""
    check_yaml(text)
    values = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    return _by_type(yaml.compose(text, YAML_LOADER), values, [Config])


def read_override(key: str, text: str) -> Any:
    """The value of `key=text`. Raises as `read_file_text` does."""
    types: Types = [Config]
    for part in key.split("."):
        types = _of_key(types, part)
    if len(text) > MAX_VALUE:
        raise ValueError(f"{key}: a value of more than {MAX_VALUE} characters")
    if "${" in text:
        raise ValueError(f"{key}: {NO_REFERENCES}")
    if type(None) in types and text in ("null", "None"):
        return None
    sequence = _of_elements(types)
    if text.startswith(("[", "{")) and not (_is_text(types) and types):
        return _structure(text, types)
    if sequence and "," in text:
        return [_scalar(part.strip(), sequence) for part in text.split(",")]
    if sequence and not _texts(types):
        return [_scalar(text, sequence)]
    return _scalar(text, types)


def one_number(key: str) -> bool:
    """Whether the value of `key` is a single number, truth value or kind: neither a list nor free text, in which commas
    may stand."""
    types: Types = [Config]
    for part in key.split("."):
        types = _of_key(types, part)
    return not _of_elements(types) and str not in types


def _structure(text: str, types: Types) -> Any:
    check_yaml(text)
    return _by_type(yaml.compose(text, YAML_LOADER), OmegaConf.to_container(OmegaConf.create(text)), types)


def check_yaml(text: str) -> None:
    """Refuses YAML that no config needs and a hostile file may use, before anything is built from it. Raises
    ValueError."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes, which no config is")
    depth = 0
    for event in yaml.parse(text, YAML_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        problem = f"more than {MAX_DEPTH} levels deep" if depth > MAX_DEPTH else _problem_of(event)
        if problem:
            line = event.start_mark.line if event.start_mark else 0
            raise ValueError(f"line {line + 1} ({shorten(text.splitlines()[line])}): {problem}")


def _problem_of(event: yaml.Event) -> str | None:
    if isinstance(event, yaml.AliasEvent):
        return f"aliases (*{event.anchor}) are not supported; write the value out"
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag not in (None, "!", *TAGS):
        return f"the tag {event.tag} is not supported; write a plain value"
    if not isinstance(event, yaml.ScalarEvent):
        return None
    if "${" in event.value:  # OmegaConf would read the environment, and references can grow without bound
        return NO_REFERENCES
    return f"a value of more than {MAX_VALUE} characters" if len(event.value) > MAX_VALUE else None


def _by_type(node: yaml.Node | None, value: Any, types: Types) -> Any:
    """`value`, built by YAML's rules from `node`, with unquoted scalars read by the types of their keys instead."""
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict) and len(node.value) == len(value):
        return {
            key: _by_type(inner, each, _of_key(types, key))
            for (_, inner), (key, each) in zip(node.value, value.items(), strict=True)
        }
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        return [_by_type(inner, each, _of_elements(types)) for inner, each in zip(node.value, value, strict=True)]
    if isinstance(node, yaml.ScalarNode) and not node.style and value is not None and types:
        return _scalar(node.value, types)
    return value


def _scalar(text: str, types: Types) -> Any:
    """A single value: text where only text is allowed, a decimal number where only numbers are, else as in YAML."""
    if _is_text(types):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return yaml.load(text, YAML_LOADER) if quoted else _checked(text)
    if types and set(types) <= {int, float, type(None)}:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return None if text in ("null", "~", "") else text  # which pydantic refuses; YAML reads 1:30 as 90
    check_yaml(text)
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]  # a dictionary


def _checked(text: str) -> str:
    """Raises an error of YAML's for characters that a YAML file can't have."""
    yaml.reader.Reader(text)
    return text


def _members(annotation: Any) -> Types:
    """The members of a union, or the one type that an annotation is."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [member for each in get_args(annotation) for member in _members(each)]
    return [annotation]


def _of_key(types: Types, key: object) -> Types:
    """The types of the value at `key` of values of these types; none where nothing is known of it."""
    found: Types = []
    for each in types:
        if isinstance(each, type) and issubclass(each, Section) and key in each.model_fields:
            found += _members(each.model_fields[str(key)].annotation)
    return found


def _of_elements(types: Types) -> Types:
    origins: list[Any] = [get_origin(each) for each in types]
    tuples = [each for each, origin in zip(types, origins, strict=True) if origin is tuple]
    args = [arg for each in tuples for arg in get_args(each) if arg is not Ellipsis]
    return [member for arg in args for member in _members(arg)]


def _texts(types: Iterable[Any]) -> bool:
    """Whether text is among the types."""
    return any(each is str or get_origin(each) is Literal for each in types)


def _is_text(types: Types) -> bool:
    """Whether only text is allowed, or none at all."""
    some = [each for each in types if each is not type(None)]
    return bool(some) and all(
        each is str or (get_origin(each) is Literal and all(isinstance(value, str) for value in get_args(each)))
        for each in some
    )


def shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
