"""Loads a config from YAML files and overrides, with one clear message if anything is wrong."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ebm.config.describing import meant
from ebm.config.energies import HybridConfig
from ebm.config.reading import MAX_BYTES, read_file_text, read_override, shorten
from ebm.config.section import Section
from ebm.config.sections import Config
from ebm.errors import ConfigError

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
# An installed wheel carries the shipped configs inside the package; a checkout has them beside it.
CONFIGS = next(
    (path for path in (PACKAGE / "configs", PACKAGE.parent / "configs") if path.is_dir()), PACKAGE / "configs"
)
DEFAULT_CONFIG = CONFIGS / "digits.yaml"

OVERRIDE = re.compile(r"[\w.-]{1,200}=")
MAX_BASES = 8  # files under a config, one under the other
ERRORS = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, ArithmeticError, OSError, RecursionError)


def load_config(path: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of YAML files and `dotted.key=value` overrides, validated as one.

    Each file wins over those before it, and overrides over all. `path`: files or names of shipped configs, by default
    digits. A file's key `base` names files that are merged under it. Raises ConfigError with one clear message.
    """
    files = _files(path)
    values: Any = {}
    for i, file in enumerate(files):
        layer = _layer(file, ())
        values = _merged(values, layer, str(file)) if i else layer
    where = ", ".join(map(str, files))
    given = _given(overrides, where)
    return validate(_merged(values, given, "") if given else values, where)


def _files(path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    paths = [path] if isinstance(path, str | Path) else list(path or [DEFAULT_CONFIG])
    return [_find(each) for each in paths]


def _layer(file: Path, above: tuple[Path, ...]) -> Any:
    """The values of a file over those of its bases. `above`: the files that name it as a base. Raises ConfigError."""
    values, bases = _own_values(file, above)
    below: Any = None
    for base in bases:
        layer = _layer(base, (*above, file.resolve()))
        below = layer if below is None else _merged(below, layer, str(base))
    return _merged(below, values, str(file)) if bases else values


def _own_values(file: Path, above: tuple[Path, ...]) -> tuple[Any, list[Path]]:
    """(the values that a file gives itself, its bases, of which later ones win). Raises ConfigError."""
    if file.resolve() in above or len(above) > MAX_BASES:
        raise ConfigError(f"{file}: is a base of itself, or the last of more than {MAX_BASES} bases; name another base")
    try:
        with file.open("rb") as stream:
            values = read_file_text(stream.read(MAX_BYTES + 1).decode())
    except ERRORS as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(values, dict) or "base" not in values:
        return values, []
    named = values.pop("base")
    bases = []
    for base in named if isinstance(named, list) else [named]:
        if not isinstance(base, str):
            raise ConfigError(
                f"{file}: base={base!r}: must be a file, the name of a shipped config, or a list of these"
            )
        bases.append(_find(base, file.parent, f"{file}: base"))
    return values, bases


def _find(path: str | Path, folder: Path = Path(), what: str = "--config") -> Path:
    """The file at `path`, from `folder` on. If there is none, `digits` and `configs/digits.yaml` name the shipped
    config digits, wherever the command runs. Raises ConfigError."""
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what} {path}: {error}") from error
    if (folder / given).is_file():
        return folder / given
    if given.parent == Path("configs") or given.parts == (given.stem,):
        shipped = CONFIGS / f"{given.stem}.yaml"
        if shipped.is_file():
            return shipped
    names = ", ".join(sorted(config.stem for config in CONFIGS.glob("*.yaml")))
    raise ConfigError(f"{what} {path}: no such file; give a YAML file, or one of the shipped configs: {names}")


def _given(overrides: Sequence[str], where: str) -> dict[str, Any]:
    """The values of overrides as nested dictionaries. Raises ConfigError."""
    values: dict[str, Any] = {}
    for item in overrides:
        if not OVERRIDE.match(item):
            raise ConfigError(f"{item!r} is not of the form dotted.key=value (see --help for the keys)")
        key, _, text = item.partition("=")
        *sections, last = key.split(".")
        if not all((*sections, last)):
            raise ConfigError(f"{item!r}: {key} has an empty part; keys are written as train.steps")
        try:
            value = read_override(key, text)
        except ERRORS as error:
            raise ConfigError(f"{where} with {list(overrides)}: {error}") from error
        inner = values
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[last] = _joined(inner.get(last), value)
    return values


def _merged(below: Any, above: Any, name: str) -> Any:
    """The values of `above` over those of `below`, less what these supersede. `name`: of the file above, if any."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return below if not isinstance(below, dict) else above  # no config: `validate` says so
    below, above, notes = without_other_data(_without_superseded(below, above), above)
    for note in notes:
        log.info(f"{name}: {note}" if name else note)
    return _joined(below, above)


def _joined(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: _joined(below.get(key), value) for key, value in above.items()}


def _without_superseded(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`below` without what `above` supersedes: the other keys of a section that is given another `kind`, and the other
    way to state the noise."""
    below = dict(below)
    for section in above.keys() & below.keys():
        default = Config.model_fields[section].default if section in Config.model_fields else None
        below[section] = _of_same_kind(below[section], above[section], default)
    if isinstance(below.get("energy"), dict) and isinstance(above.get("energy"), dict) and "network" in below["energy"]:
        default = HybridConfig.model_fields["network"].default
        network = _of_same_kind(below["energy"]["network"], above["energy"].get("network"), default)
        below["energy"] = below["energy"] | {"network": network}
    one, other = below.get("sampler"), above.get("sampler")
    if isinstance(one, dict) and isinstance(other, dict):
        for given, superseded in (("noise_scale", "temperature"), ("temperature", "noise_scale")):
            if other.get(given) is not None and superseded not in other:
                one = {key: value for key, value in one.items() if key != superseded}
        below["sampler"] = one
    return below


def _of_same_kind(below: Any, above: Any, default: Any) -> Any:
    """A section below, empty where the one above has another kind. A section without a kind has that of `default`."""
    if not isinstance(below, dict) or not isinstance(above, dict) or "kind" not in above:
        return below
    has_kinds = isinstance(default, Section) and "kind" in type(default).model_fields
    kind = below.get("kind", default.kind if has_kinds else None)
    return below if above["kind"] == kind else {}


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
        value = item["input"]
        while isinstance(value, dict) and value:  # an unknown section: name a key in it
            first, value = next(iter(value.items()))
            key = f"{key}.{first}"
        return f"{key}: unknown key{meant(key)}; train.py --help SECTION lists the keys"
    if item["type"] == "missing":
        return f"{key}: required"
    shown = "" if isinstance(item["input"], dict | BaseModel) else f"={shorten(item['input'])}"
    return f"{key}{shown}: {message}"


HELD_OUT = ("source", "shards")  # of evaluate


def without_other_data(
    below: dict[str, Any], above: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(below, above) without what belongs to the data set of `below` where `above` has another one, and what to tell.

    Another `data.source` is another data set, whose shards and run get directories named after it unless `above` names
    them. Other `data.shards` alone are those of the same source, written there if need be, unless shards are there
    already of which nobody knows that they are: then, or where there is no source, only the held-out data go.
    """
    held_out = above.get("evaluate")
    if isinstance(held_out, dict) and "source" not in held_out and _of_unknown_origin(held_out.get("shards")):
        below, _ = _without_held_out(below, above)
    old, new = below.get("data"), above.get("data")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return below, above, []
    was, now = old.get("source"), new.get("source", old.get("source"))
    moved = "shards" in new and new["shards"] != old.get("shards")
    if was != now and (moved or (was is not None and now is not None)):
        return _other_source(below, above, was, now)
    if moved and was is None and "source" not in new:
        left, dropped = _without_held_out(below, above)
        return left, above, [f"data.shards={new['shards']} {_does_not_apply(dropped)}"] if dropped else []
    if moved and "source" not in new and _of_unknown_origin(new["shards"]):
        left, dropped = _without_held_out(below, above)
        left["data"] = old | {"source": None}
        dropped.insert(0, f"data.source={was}")
        return left, above, [f"the shards in {new['shards']} were made elsewhere: {_does_not_apply(dropped)}"]
    return below, above, []


def _other_source(
    below: dict[str, Any], above: dict[str, Any], was: str | None, now: str | None
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    old, new = below["data"], above["data"]
    left, dropped = _without_held_out(below, above)
    named, above = [], dict(above)
    name = _name_of(str(new["shards"] if new.get("shards") else now))
    if "shards" not in new:
        above["data"] = new | {"shards": f"data/{name}/train"}
        named.append(f"data.shards={above['data']['shards']}")
        dropped.append(f"data.shards={old.get('shards')}")
        if now is not None and ":" not in now and "evaluate" not in above:  # its test split is known by name
            above["evaluate"] = {"source": now, "shards": f"data/{name}/test"}
            named.append(f"evaluate.shards={above['evaluate']['shards']}")
    run = above.get("run", {})
    if isinstance(run, dict) and "dir" not in run and isinstance(below.get("run"), dict) and "dir" in below["run"]:
        dropped.append(f"run.dir={below['run']['dir']}")
        above["run"] = run | {"dir": f"runs/{name}"}
        named.append(f"run.dir={above['run']['dir']}")
    note = f"data.source={now} is another data set than {was}: {_does_not_apply(dropped)}"
    return left, above, [f"{note}{'; instead ' if named else ''}{', '.join(named)}"] if dropped else []


def _does_not_apply(dropped: list[str]) -> str:
    held_out = any(item.startswith("evaluate.") for item in dropped)
    hint = " (set evaluate.shards to have held-out data)" if held_out else ""
    return f"the config's {', '.join(dropped)} {'do' if len(dropped) > 1 else 'does'} not apply{hint}"


def _without_held_out(below: dict[str, Any], above: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`below` without its held-out data, and what was dropped that `above` does not give."""
    held_out = below.get("evaluate")
    if not isinstance(held_out, dict):
        return dict(below), []
    given = above["evaluate"] if isinstance(above.get("evaluate"), dict) else {}
    dropped = [f"evaluate.{k}={held_out[k]}" for k in HELD_OUT if held_out.get(k) is not None and k not in given]
    return below | {"evaluate": {k: value for k, value in held_out.items() if k not in HELD_OUT}}, dropped


def _of_unknown_origin(shards: object) -> bool:
    """Whether there is a manifest that does not say what its shards were made from."""
    try:
        manifest = json.loads(_manifest_of(str(shards)).read_text())
        return isinstance(manifest, dict) and manifest.get("source") is None
    except (OSError, ValueError, RuntimeError, RecursionError):  # no shards yet, or a URL, or for the reader to refuse
        return False


def _manifest_of(shards: str) -> Path:
    """Raises RuntimeError where there is no home directory."""
    path = Path(shards).expanduser()
    return path if path.suffix == ".json" else path / "manifest.json"


def check_places(
    config: Config, path: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> None:
    """Raises ConfigError where `data.shards` or `evaluate.shards` is likely mistyped and would get other data than the
    user means; says what is to be written to a place that may be meant.

    That is where the path is given without a source, so that the source of a file below it holds, and no shards are
    there. With shards beside it at a path that differs in the spelling of one part, it is taken for a typing error.
    """
    layers = [layer for layer in _layers(path, overrides) if isinstance(layer, dict)]
    for name, section in (("data", config.data), ("evaluate", config.evaluate)):
        given = [layer[name] for layer in layers if isinstance(layer.get(name), dict) and "shards" in layer[name]]
        place, source = section.shards, section.source
        if not given or place is None or source is None or "source" in given[0] or "://" in place:
            continue
        known = any("source" in values and values["shards"] == given[0]["shards"] for values in given)
        parts = [part.lower() for part in Path(place).parts]
        named = any(re.match(rf"{re.escape(_name_of(source).lower())}(?![a-z])", part) for part in parts)
        if not (known or named or _manifest_of(place).exists()):
            near = _near(Path(place))
            if near is None:
                log.info(
                    f"{name}.shards={place}: there are no shards yet; they are written from {name}.source={source}, "
                    f"which the config has (for other data give {name}.source beside it, or null for your own shards)"
                )
                continue
            raise ConfigError(
                f"{name}.shards={place}: there are no shards, and {name}.source={source} comes from the config, not "
                f"with this path; did you mean {near}? Give {name}.source={source} beside it to have shards written "
                "from that"
            )


def _layers(path: str | Path | Sequence[str | Path] | None, overrides: Sequence[str]) -> Iterator[Any]:
    """The values that overrides, files and their bases give themselves, the uppermost first."""
    yield _given(overrides, "")

    def below(files: list[Path], above: tuple[Path, ...]) -> Iterator[Any]:
        for file in reversed(files):
            values, bases = _own_values(file, above)
            yield values
            yield from below(bases, (*above, file.resolve()))

    yield from below(_files(path), ())


def _near(place: Path) -> Path | None:
    """A directory of shards whose path differs from `place` in the spelling of one part."""
    for i in reversed(range(len(place.parts))):
        above, below = Path(*place.parts[:i]), Path(*place.parts[i + 1 :])
        try:
            names = [entry.name for entry in above.iterdir() if entry.is_dir()]
        except OSError:  # it is not there, or may not be read: then there is nothing to offer
            continue
        for name in get_close_matches(place.parts[i], names):
            if (above / name / below / "manifest.json").is_file():
                return above / name / below
    return None


def _name_of(place: str) -> str:
    """A name for a data set: the last part of its place that is no split, pattern or file name extension."""
    parts = [part for part in re.split(r"[/:#]", place) if part and "*" not in part]
    names = [re.sub(r"\.(npy|npz|parquet)$", "", part) for part in parts]
    proper = [name for name in names if name not in ("train", "training", "test", "val", "validation", "~", "..", ".")]
    return re.sub(r"[^\w.-]", "_", proper[-1]).lstrip(".-") or "own" if proper else "own"
