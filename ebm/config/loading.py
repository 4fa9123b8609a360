"""A config from YAML and overrides, with one clear message for whatever is wrong; and what two configs share."""

import hashlib
import io
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from ebm.config.energies import HybridConfig
from ebm.config.section import Section
from ebm.config.sections import Config
from ebm.errors import ConfigError

try:  # the parser that OmegaConf takes: what one reads, the other must not read differently
    from yaml import CSafeLoader as YAMLLoader
except ImportError:
    from yaml import SafeLoader as YAMLLoader


PACKAGE = Path(__file__).parent.parent
# An installed wheel carries the shipped configs inside the package; a checkout has them beside it.
CONFIGS = next(
    (path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir()), PACKAGE / "configs"
)
DEFAULT_CONFIG = CONFIGS / "digits.yaml"


MAX_BYTES = 1 << 16  # of a config file; the shipped ones have 2 KiB
MAX_VALUE = 2048  # characters; Python refuses to print integers of more than 4300 digits
MAX_DEPTH = 32  # libyaml overflows its stack on deep nesting
OVERRIDE = re.compile(r"[\w.\[\]-]{1,200}=")  # OmegaConf takes quadratic time over a key, and `\=` for a part of it
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


# Keys that may differ when a run is resumed: they move, observe or stop the run and do not change what it computes.
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
    "health.",
    "checkpoint.",
    "tracking.",
    "evaluate.",
)


def load_config(path: str | Path | None = None, overrides: list[str] = ()) -> Config:
    """A YAML file plus `dotted.key=value` overrides, validated as one. Raises ConfigError with one clear message."""
    path = Path(path or DEFAULT_CONFIG)
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    for item in overrides:
        if not OVERRIDE.match(item):
            raise ConfigError(f"{item!r} is not of the form dotted.key=value (see --help for the keys)")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
        for source in (text, *(item.partition("=")[2] for item in overrides)):
            _check_yaml(source)
        base, given = OmegaConf.load(io.StringIO(text)), OmegaConf.from_dotlist(list(overrides))
        values = OmegaConf.to_container(OmegaConf.unsafe_merge(_superseded(base, given), given))
    except (
        OmegaConfBaseException,
        yaml.YAMLError,
        ValueError,
        TypeError,
        ArithmeticError,
        OSError,
        RecursionError,
    ) as error:
        raise ConfigError(f"{path} with {list(overrides)}: {error}") from error
    return validate(values, str(path))


def _check_yaml(text: str) -> None:
    """Refuse what no config needs and a hostile one uses, before anything is built from it. Raises ValueError."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes, which no config is")
    depth = 0
    for event in yaml.parse(text, YAMLLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        problem = f"more than {MAX_DEPTH} levels deep" if depth > MAX_DEPTH else _problem_of(event)
        if problem:
            line = event.start_mark.line
            raise ValueError(f"line {line + 1} ({_show(text.splitlines()[line])}): {problem}")


def _problem_of(event: yaml.Event) -> str | None:
    if isinstance(event, yaml.AliasEvent):
        return f"aliases (*{event.anchor}) are not supported; write the value out"
    if isinstance(event, yaml.NodeEvent) and event.tag not in (None, "!", *TAGS):
        return f"the tag {event.tag} is not supported; write a plain value"
    if not isinstance(event, yaml.ScalarEvent):
        return None
    if "${" in event.value:  # for OmegaConf: it would read the environment, and references grow without bound
        return "${...} is not supported; write the value out"
    return f"a value of more than {MAX_VALUE} characters" if len(event.value) > MAX_VALUE else None


def _superseded(base, given):
    """The file's values without those that an override makes void: another `kind`, or the other way to give noise."""
    for section in given:
        default = Config.model_fields[section].default if section in Config.model_fields else None
        _forget_other_kind(base, given, section, default)
    if OmegaConf.is_dict(base.get("energy")) and OmegaConf.is_dict(given.get("energy")):
        _forget_other_kind(base.energy, given.energy, "network", HybridConfig.model_fields["network"].default)
    if OmegaConf.is_dict(given.get("sampler")):
        for one, other in (("noise_scale", "temperature"), ("temperature", "noise_scale")):
            replaced = given.sampler.get(one) is not None and other not in given.sampler
            if replaced and OmegaConf.is_dict(base.get("sampler")):
                base.sampler.pop(other, None)
    return base


def _forget_other_kind(base, given, section: str, default: Any) -> None:
    """Empty a section of the file that an override gives another kind than the file, or else `default`, says."""
    if not (OmegaConf.is_dict(base.get(section)) and OmegaConf.is_dict(given.get(section))):
        return
    of_file = base[section].get("kind", default.kind if "kind" in getattr(type(default), "model_fields", ()) else None)
    if "kind" in given[section] and given[section]["kind"] != of_file:
        base[section] = {}


def validate(values: Any, where: str) -> Config:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be sections with keys, such as train.steps; found {type(values).__name__}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {_explain(item)}" for item in error.errors())) from error


def _kinds(section: type[Section] = Section) -> set[str]:
    """The values of all `kind` keys below a section."""
    own = {section.model_fields["kind"].default} if "kind" in section.model_fields else set()
    return own.union(*map(_kinds, section.__subclasses__()))


def _explain(item: dict) -> str:
    """One line of a validation error: the key, the value, what is allowed."""
    # At every odd place of a location pydantic may name the member of a union.
    location = [str(part) for i, part in enumerate(item["loc"]) if not (i % 2 and part in _kinds())]
    key = ".".join(location) or "config"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}; train.py --help lists them all"
    if item["type"] == "missing":
        return f"{key}: required"
    shown = "" if isinstance(item["input"], dict | BaseModel) else f"={_show(item['input'])}"
    return f"{key}{shown}: {message}"


def _show(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _nearest(key: str) -> str:
    known = [*Config.model_fields, *(row[0].split(" ")[0] for row in describe())]
    close = get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def describe() -> list[tuple[str, str, str, str]]:
    """(dotted key, type, default, meaning) of every key, in order; a union's members stand one after the other."""
    return [row for section, info in Config.model_fields.items() for row in _rows(section, info)]


def _rows(key: str, field, kinds: tuple[str, ...] = ()) -> list[tuple[str, str, str, str]]:
    """The rows of a field: one, or a section's; `kinds` of the unions around it."""
    from typing import get_args

    inner = [m for m in (field.annotation, *get_args(field.annotation)) if isinstance(m, type)]
    models = [m for m in inner if issubclass(m, Section)]
    if not models:
        of = f" [{', '.join(kinds)}]" if kinds else ""
        default = "required" if field.is_required() else _default(field)
        return [(key + of, _type_name(field.annotation), default, field.description or "")]
    rows = []
    for model in models:
        own = (*kinds, model.model_fields["kind"].default) if len(models) > 1 else kinds
        for name, each in model.model_fields.items():
            rows += _rows(f"{key}.{name}", each, () if name == "kind" else own)
    return rows


def _default(field) -> str:
    value = field.get_default(call_default_factory=True)
    return "null" if value is None else json.dumps(value)


def _type_name(annotation) -> str:
    from types import UnionType
    from typing import Union, get_args, get_origin

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


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_same_run(old: Config, new: Config, where: str) -> None:
    """Raises ConfigError naming each key that changes what the run computes."""
    a, b = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    changed = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and not k.startswith(FREE_TO_CHANGE)]
    if changed:
        lines = "\n".join(f"  {k}: {a.get(k)!r} there, {b.get(k)!r} now" for k in changed)
        raise ConfigError(
            f"{where} was made with a different config:\n{lines}\n"
            "choose another run.dir for a new run, or use the values it was made with to resume it"
        )


def fingerprint(config: Config) -> str:
    """A hash of the keys that decide what the run computes."""
    flat = flatten(config.model_dump(mode="json"))
    kept = {k: v for k, v in flat.items() if not k.startswith(FREE_TO_CHANGE)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
