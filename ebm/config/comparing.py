"""Writes a config as text, and compares the configs of two runs."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from ebm.config.sections import Config
from ebm.errors import ConfigError

# Keys that may differ when a run is resumed: they move, observe or stop the run but do not change what it computes.
FREE_TO_CHANGE = (
    "run.dir",
    "data.shards",
    "data.source",
    "data.workers",
    "data.on_error",
    "data.max_skipped",
    "data.trace",
    "data.allow_change",
    "data.schemes",
    "data.cache_dir",
    "data.cache_bytes",
    "data.retries",
    "data.timeout",
    "train.extend",
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

# Keys that decide which tensors and numbers a checkpoint holds: train.extend=true does not change them.
STORED = (
    "run.",
    "data.shape",
    "data.streams",
    "energy.",
    "sampler.kind",
    "sampler.adapt",
    "sampler.temperatures",
    "sampler.num_levels",
    "buffer.size",
    "buffer.dtype",
    "loss.kind",
    "loss.negatives",
    "loss.conditional_chains",
    "train.mixed_precision",
)


def to_yaml(config: Config) -> str:
    """The whole config as text that load_config reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys that decide what a run computes and differ between two configs: {key: (old, new)}."""
    a, b = flatten(old.model_dump(mode="json")), flatten(new.model_dump(mode="json"))
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k) and not k.startswith(FREE_TO_CHANGE)]
    return {key: (a.get(key), b.get(key)) for key in keys}


def differences(config: Config) -> dict[str, tuple[Any, Any]]:
    """The keys of a config that differ from the defaults that --help tells, {key: (default, value)}. Keys of sections
    whose kind is another than the default's are compared with the defaults of that kind."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in Config.model_fields:
        section = getattr(config, name)
        given = flatten(section.model_dump(mode="json"))
        kind = {"kind": given["kind"]} if "kind" in given else {}
        required = {key: given[key] for key, field in type(section).model_fields.items() if field.is_required()}
        default = flatten(type(section).model_validate(kind | required).model_dump(mode="json"))
        found |= {f"{name}.{k}": (None, v) for k, v in required.items()}
        if kind and Config.model_fields[name].default.kind != given["kind"]:
            found[f"{name}.kind"] = (Config.model_fields[name].default.kind, given["kind"])
        found |= {f"{name}.{k}": (default.get(k), v) for k, v in given.items() if v != default.get(k)}
    return found


def check_same_run(old: Config, new: Config, where: str) -> dict[str, tuple[Any, Any]]:
    """What differs, as `changes`, between the config that a run was made with and the one that it is to go on with.
    Raises ConfigError that names all such keys, unless train.extend=true and none of them decides what is stored."""
    changed = changes(old, new)
    stored = [key for key in changed if key.startswith(STORED)]
    if not changed or (new.train.extend and not stored):
        return changed
    lines = "\n".join(f"  {key}: {changed[key][0]!r} there, {changed[key][1]!r} now" for key in changed)
    if new.train.extend:
        remedy = f"train.extend=true can't change what a run stores ({', '.join(stored)}): "
    else:
        remedy = "" if stored else "to go on with the new values, which its history records, add train.extend=true; or "
    raise ConfigError(
        f"{where} was made with a different config:\n{lines}\n{remedy}"
        "choose another run.dir for a new run, or use the values it was made with to resume it"
    )
