"""Reads a config from a YAML file and overrides, with one clear message if anything is wrong; describes its keys; and
compares the configs of two runs."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt  # what pydantic keeps the limits of a field in
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ebm.config.energies import HybridConfig
from ebm.config.section import Section
from ebm.config.sections import Config
from ebm.errors import ConfigError

# The parser that OmegaConf uses: two parsers could read the same text differently.
YAML_LOADER: type = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

PACKAGE = Path(__file__).parent.parent
# An installed wheel carries the shipped configs inside the package; a checkout has them beside it.
CONFIGS = next(
    (path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir()), PACKAGE / "configs"
)
DEFAULT_CONFIG = CONFIGS / "digits.yaml"

MAX_BYTES = 1 << 16  # size of a config file; the shipped ones have less than 2 KiB
MAX_VALUE = 2048  # characters of a value; Python refuses to print integers of more than 4300 digits
MAX_DEPTH = 32  # levels of nesting; libyaml overflows its stack far beyond that
OVERRIDE = re.compile(r"[\w.\[\]-]{1,200}=")  # OmegaConf takes quadratic time over a key and reads `\=` as part of it
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}

# Keys that may differ when a run is resumed: they move, observe or stop the run but do not change what it computes.
FREE_TO_CHANGE = (
    "run.dir",
    "data.shards",
    "data.source",
    "data.workers",
    "data.on_error",
    "data.max_skipped",
    "data.trace",
    "data.schemes",
    "data.cache_dir",
    "data.cache_bytes",
    "data.retries",
    "data.timeout",
    "train.time_limit",
    "train.collective_timeout",
    "train.log_every",
    "train.device",
    "train.backend",
    "train.threads",
    "health.",
    "checkpoint.",
    "tracking.",
    "evaluate.",
)


# Reading


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file and `dotted.key=value` overrides, validated as one. `path` is a file or the name of a
    shipped config, by default digits. Raises ConfigError with one clear message."""
    file = _find(path or DEFAULT_CONFIG)
    for item in overrides:
        if not OVERRIDE.match(item):
            raise ConfigError(f"{item!r} is not of the form dotted.key=value (see --help for the keys)")
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1).decode()
        for source in (text, *(item.partition("=")[2] for item in overrides)):
            _check_yaml(source)
        of_file, given = OmegaConf.load(io.StringIO(text)), OmegaConf.from_dotlist(list(overrides))
        values = OmegaConf.to_container(OmegaConf.unsafe_merge(_without_superseded(of_file, given), given))
    except (
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        TypeError,
        ArithmeticError,
        OSError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{file} with {list(overrides)}: {error}") from error
    return validate(values, str(file))


def _find(path: str | Path) -> Path:
    """The file at `path`. If there is none, `digits` and `configs/digits.yaml` name the shipped config digits, wherever
    the command runs. Raises ConfigError."""
    given = Path(path)
    if given.is_file():
        return given
    if given.parent == Path("configs") or given.parts == (given.stem,):
        shipped = CONFIGS / f"{given.stem}.yaml"
        if shipped.is_file():
            return shipped
    names = ", ".join(sorted(config.stem for config in CONFIGS.glob("*.yaml")))
    raise ConfigError(f"--config {path}: no such file; give a YAML file, or one of the shipped configs: {names}")


def _check_yaml(text: str) -> None:
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
            raise ValueError(f"line {line + 1} ({_shorten(text.splitlines()[line])}): {problem}")


def _problem_of(event: yaml.Event) -> str | None:
    if isinstance(event, yaml.AliasEvent):
        return f"aliases (*{event.anchor}) are not supported; write the value out"
    if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag not in (None, "!", *TAGS):
        return f"the tag {event.tag} is not supported; write a plain value"
    if not isinstance(event, yaml.ScalarEvent):
        return None
    if "${" in event.value:  # OmegaConf would read the environment, and references can grow without bound
        return "${...} is not supported; write the value out"
    return f"a value of more than {MAX_VALUE} characters" if len(event.value) > MAX_VALUE else None


def _without_superseded(of_file: DictConfig | ListConfig, given: DictConfig) -> DictConfig | ListConfig:
    """The values of the file without those that an override supersedes: the other keys of a section that is given
    another `kind`, and the other way to state the noise."""
    if not isinstance(of_file, DictConfig):
        return of_file  # no config: `validate` says so
    for section in given:
        default = Config.model_fields[section].default if section in Config.model_fields else None
        _forget_other_kind(of_file, given, str(section), default)
    if OmegaConf.is_dict(of_file.get("energy")) and OmegaConf.is_dict(given.get("energy")):
        _forget_other_kind(of_file.energy, given.energy, "network", HybridConfig.model_fields["network"].default)
    if OmegaConf.is_dict(given.get("sampler")) and OmegaConf.is_dict(of_file.get("sampler")):
        for one, other in (("noise_scale", "temperature"), ("temperature", "noise_scale")):
            if given.sampler.get(one) is not None and other not in given.sampler:
                of_file.sampler.pop(other, None)
    return of_file


def _forget_other_kind(of_file: DictConfig, given: DictConfig, section: str, default: Any) -> None:
    """Empties a section of the file if an override gives it another kind than the file does. A section of the file
    without a kind has that of `default`."""
    if not (OmegaConf.is_dict(of_file.get(section)) and OmegaConf.is_dict(given.get(section))):
        return
    has_kinds = isinstance(default, Section) and "kind" in type(default).model_fields
    kind = of_file[section].get("kind", default.kind if has_kinds else None)
    if "kind" in given[section] and given[section]["kind"] != kind:
        of_file[section] = {}


def validate(values: Any, where: str) -> Config:
    """The config of nested dictionaries. `where` begins the message of the ConfigError that it may raise, which has a
    line for each wrong key."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be sections with keys, such as train.steps; found {type(values).__name__}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {_explain(item)}" for item in error.errors())) from error


def _kinds(section: type[Section] = Section) -> set[str]:
    """The values that the key `kind` can have in `section` and its subclasses."""
    own = {section.model_fields["kind"].default} if "kind" in section.model_fields else set()
    return own.union(*map(_kinds, section.__subclasses__()))


def _explain(item: ErrorDetails) -> str:
    """One line for an error: the key, the value, and what is allowed."""
    # Pydantic inserts the union member's name at odd positions of an error's location.
    location = [str(part) for i, part in enumerate(item["loc"]) if not (i % 2 and part in _kinds())]
    key = ".".join(location) or "config"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}; train.py --help lists them all"
    if item["type"] == "missing":
        return f"{key}: required"
    shown = "" if isinstance(item["input"], dict | BaseModel) else f"={_shorten(item['input'])}"
    return f"{key}{shown}: {message}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _nearest(key: str) -> str:
    known = [*Config.model_fields, *(row.key for row in describe())]
    close = get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


# Describing the keys


class Row(NamedTuple):
    """One key of the config, as --help shows it."""

    key: str  # dotted
    kinds: tuple[str, ...]  # the kinds of its section that have this key; empty if the section has no kinds
    type: str  # with its range, such as "int >= 1"
    default: str
    meaning: str


def describe() -> list[Row]:
    """Every key of the config, in order. Keys that several kinds of a section share are one row, unless their defaults
    or meanings differ."""
    return [row for section, field in Config.model_fields.items() for row in _rows(section, field)]


def _rows(key: str, field: FieldInfo, kinds: tuple[str, ...] = ()) -> list[Row]:
    """The row of a plain field, or the rows of all keys of a section. `kinds`: those of the section that `key` is
    in."""
    members = [m for m in (field.annotation, *get_args(field.annotation)) if isinstance(m, type)]
    sections = [m for m in members if issubclass(m, Section)]
    if not sections:
        default = "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        return [Row(key, kinds, _type_name(field.annotation) + _range(field), default, field.description or "")]
    if len(sections) == 1:
        own = [row for name, each in sections[0].model_fields.items() for row in _rows(f"{key}.{name}", each, kinds)]
        optional = NoneType in get_args(field.annotation)
        return [Row(key, kinds, "section|null", "null", field.description or ""), *own] if optional else own
    names = {section.model_fields["kind"].default: section for section in sections}
    meaning = "\n".join(f"{name}: {_first_paragraph(section)}".removesuffix(": ") for name, section in names.items())
    rows = [Row(f"{key}.kind", kinds, "|".join(names), json.dumps(field.default.kind), meaning)]
    for name, section in names.items():
        for inner, each in section.model_fields.items():
            rows += _rows(f"{key}.{inner}", each, (name,)) if inner != "kind" else []
    return _merged(rows)


def _range(field: FieldInfo) -> str:
    """The limits of a number, such as " >= 0 and < 1"."""
    signs = ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt"))
    limits = [
        f"{sign} {getattr(limit, name)}"
        for kind, sign, name in signs
        for limit in field.metadata
        if isinstance(limit, kind)
    ]
    return " " + " and ".join(limits) if limits else ""


def _first_paragraph(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _merged(rows: list[Row]) -> list[Row]:
    """The rows with one for all that differ in their kinds alone."""
    kinds: dict[Row, tuple[str, ...]] = {}
    for row in rows:
        same = row._replace(kinds=())
        kinds[same] = (*kinds.get(same, ()), *row.kinds)
    return [row._replace(kinds=of) for row, of in kinds.items()]


def _type_name(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(args)
    if origin in (Union, UnionType):
        return "|".join(_type_name(a) for a in args)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is tuple:
        return "[" + ", ".join("..." if a is ... else _type_name(a) for a in args) + "]"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


# Writing, and comparing runs


def to_yaml(config: Config) -> str:
    """The whole config as text that load_config reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_same_run(old: Config, new: Config, where: str) -> None:
    """Raises ConfigError if a key that decides what the run computes differs; the message names all such keys."""
    a, b = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and not k.startswith(FREE_TO_CHANGE)]
    if changed:
        lines = "\n".join(f"  {k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in changed)
        raise ConfigError(
            f"{where} was made with a different config:\n{lines}\n"
            "choose another run.dir for a new run, or use the values it was made with to resume it"
        )
