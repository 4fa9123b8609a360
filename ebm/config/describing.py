"""Describes configs: their keys for --help, the key that an unknown one was meant to be, a config as text, and how the
configs of two runs differ."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt  # what pydantic keeps the limits of a field in
from omegaconf import OmegaConf
from pydantic.fields import FieldInfo

from ebm.config.section import Section
from ebm.config.sections import Config
from ebm.errors import ConfigError

# What other trainers call our keys and sections.
SECTIONS = {
    "optimizer": "optim",
    "optimiser": "optim",
    "model": "energy",
    "network": "energy",
    "trainer": "train",
    "training": "train",
    "dataset": "data",
    "wandb": "tracking",
    "logging": "tracking",
    "logger": "tracking",
    "eval": "evaluate",
    "evaluation": "evaluate",
    "replay_buffer": "buffer",
    "mcmc": "sampler",
    "langevin": "sampler",
    "ckpt": "checkpoint",
}
KEYS = {
    "optim.lr": "lr learning_rate base_lr",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.weight_decay": "wd",
    "optim.warmup_steps": "warmup num_warmup_steps lr_warmup_steps",
    "optim.grad_clip": "max_grad_norm clip clip_grad clip_grad_norm gradient_clip_val gradient_clip",
    "optim.ema_decay": "ema ema_rate use_ema ema_decay_rate",
    "train.batch_size": "bs batch global_batch_size train_batch_size per_device_train_batch_size",
    "train.steps": "max_steps num_steps total_steps iterations iters num_iters n_iters max_iters train_iters",
    "train.accumulate": "gradient_accumulation_steps accumulate_grad_batches grad_accum accumulation_steps",
    "train.mixed_precision": "fp16 bf16 precision amp dtype",
    "train.log_every": "log_interval logging_steps log_freq print_freq",
    "train.device": "accelerator",
    "train.threads": "num_threads",
    "run.dir": "output_dir out_dir outdir output out logdir log_dir save_dir workdir exp_dir resume resume_from",
    "run.seed": "random_seed",
    "data.workers": "num_workers dataloader_num_workers",
    "data.shards": "data_dir data_path dataset_path data_root dataset train_data",
    "data.shape": "image_size img_size resolution input_size in_channels",
    "data.source": "dataset_name",
    "buffer.size": "buffer_size replay_size",
    "buffer.reinit_prob": "reinit_freq reinit new_sample_ratio restart_prob",
    "sampler.num_steps": "n_steps langevin_steps mcmc_steps sgld_steps num_langevin_steps mcmc_iters k_steps",
    "sampler.step_size": "step_lr langevin_lr sgld_lr langevin_step_size step_size",
    "sampler.noise_scale": "sgld_std langevin_noise noise",
    "checkpoint.every": "save_every save_steps save_interval save_freq ckpt_every ckpt_interval",
    "checkpoint.keep": "save_total_limit keep_last",
    "tracking.project": "wandb_project project_name",
    "tracking.entity": "wandb_entity",
    "tracking.name": "run_name exp_name wandb_name experiment",
    "tracking.group": "wandb_group",
    "tracking.wandb": "use_wandb report_to wandb_mode",
    "energy.kind": "arch architecture model_type",
    "energy.features": "channels widths hidden_channels num_filters",
    "loss.kind": "objective criterion",
}
EPOCHS = ("epochs", "num_epochs", "max_epochs", "num_train_epochs", "n_epochs")


def meant(key: str) -> str:
    """What follows an unknown key in a message: the key that it probably means, or nothing."""
    rows = describe()
    known = [row.key for row in rows]
    if key in known:  # of another kind of the section than the chosen one
        kinds = dict.fromkeys(kind for row in rows if row.key == key for kind in row.kinds)
        return (
            f" of this {key.rpartition('.')[0]}.kind ({' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'} it)"
        )
    section, _, last = key.rpartition(".")
    section = SECTIONS.get(section, section)
    if last in EPOCHS:
        return " (a run is counted in steps: train.steps = epochs x images / train.batch_size)"
    if f"{section}.{last}" in known:
        return f" (here it is {section}.{last})"
    for candidates in (
        [ours for ours, theirs in KEYS.items() if last.lower() in theirs.split()],
        list(dict.fromkeys(row for row in known if row.rpartition(".")[2] == last)),
    ):
        of_section = [ours for ours in candidates if ours.startswith(f"{section}.")] or candidates
        if len(of_section) == 1:
            return f" (here it is {of_section[0]})"
        if of_section:
            return f" (is it {' or '.join(of_section)}?)"
    close = get_close_matches(key, [*Config.model_fields, *known], n=1)
    return f" (did you mean {close[0]}?)" if close else ""


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
        rows = [row for name, each in sections[0].model_fields.items() for row in _rows(f"{key}.{name}", each, kinds)]
        optional = NoneType in get_args(field.annotation)
        default = "null" if field.default is None else "section"
        return [Row(key, kinds, "section|null", default, field.description or ""), *rows] if optional else rows
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


# Keys that may differ when a run is resumed: they move, observe or stop the run but do not change what it computes
# (buffer.age does so by the buffer's size alone, which is compared).
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
    "buffer.age",
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
    "sampler.start",
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
    """The keys that decide what a run computes and differ between two configs: {key: (old, new)}. buffer.size=auto is
    the number that it comes to."""
    a, b = (flatten(each.model_dump(mode="json")) | {"buffer.size": each.buffer_size} for each in (old, new))
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
    if "buffer.size" in changed and new.buffer.size == "auto":
        remedy += (
            "buffer.size=auto follows train.steps, train.batch_size, sampler.num_steps and buffer.age: give "
            f"buffer.size={old.buffer_size} to keep the run's chains, with train.extend=true for what else changes; or "
        )
    raise ConfigError(
        f"{where} was made with a different config:\n{lines}\n{remedy}"
        "choose another run.dir for a new run, or use the values it was made with to resume it"
    )
