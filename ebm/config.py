"""The configuration: every key, its type, default and meaning, once. Frozen; unknown keys are errors."""

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
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ebm.errors import ConfigError

try:  # the parser that OmegaConf takes: what one reads, the other must not read differently
    from yaml import CSafeLoader as YAMLLoader
except ImportError:
    from yaml import SafeLoader as YAMLLoader

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


MAX_BYTES = 1 << 16  # of a config file; the shipped ones have 2 KiB
MAX_VALUE = 2048  # characters; Python refuses to print integers of more than 4300 digits
MAX_DEPTH = 32  # libyaml overflows its stack on deep nesting
OVERRIDE = re.compile(r"[\w.\[\]-]{1,200}=")  # OmegaConf takes quadratic time over a key, and `\=` for a part of it
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class RunConfig(Section):
    dir: str = Field("runs/run", description="run directory; the same command with the same directory resumes")
    seed: int = Field(0, ge=0, lt=2**63, description="all randomness of the run follows from it")


class DataConfig(Section):
    shards: str = Field(description="directory with manifest.json, or the manifest itself")
    source: str | None = Field(
        None,
        description="write `shards` from this source first where they do not exist yet "
        "(digits, mnist, cifar10, svhn, celeba, folder:PATH, npy:PATH)",
    )
    shape: tuple[int, int, int] = Field((3, 32, 32), description="channels, height, width of every image")
    streams: int = Field(8, ge=1, description="streams, fixed for the run; divisible by the number of processes")
    workers: int = Field(1, ge=0, description="decoding processes a rank; 0 decodes in the training process")
    window: int = Field(2048, ge=1, description="samples a stream shuffles at a time; bounds the reader's memory")
    augment_flip: bool = Field(False, description="mirror half of the images left to right")
    augment_crop: int = Field(0, ge=0, description="shift images by up to this many pixels, edges repeated")
    dequantize: bool = Field(True, description="spread the 256 levels uniformly over their bins")
    noise_std: float = Field(0.03, ge=0, description="standard deviation of Gaussian noise on data, images in [-1, 1]")
    trace: bool = Field(False, description="write trace.jsonl: every step's samples and chains, globally")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="what an unreadable sample does; skip logs and counts it"
    )
    max_skipped: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="largest share of a stream's epoch that on_error=skip passes over; above it, exit 4",
    )
    max_pixels: int = Field(4096 * 4096, ge=1, description="larger images are refused before they are decoded")

    @model_validator(mode="after")
    def _shape(self):
        channels, height, width = self.shape
        if channels < 1 or height < 1 or width < 1:
            raise ValueError(f"shape {self.shape} must be three positive numbers: channels, height, width")
        return self


class NetworkConfig(Section):
    spectral_norm: bool = Field(False, description="normalise every layer to spectral norm 1 (Miyato et al. 2018)")
    num_classes: int | None = Field(None, ge=2, description="classes of a class-conditional energy E(x, y)")


class MLPConfig(NetworkConfig):
    kind: Literal["mlp"] = "mlp"
    hidden_dim: int = Field(128, ge=1, description="width of the hidden layers")
    num_layers: int = Field(2, ge=1, description="hidden layers")


class ConvConfig(NetworkConfig):
    kind: Literal["conv"] = "conv"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (16, 32, 32, 64), min_length=1, description="channels a layer; every layer after the first halves the size"
    )
    hidden_dim: int = Field(64, ge=1, description="width of the head's hidden layer")


class ResNetConfig(NetworkConfig):
    kind: Literal["resnet"] = "resnet"
    features: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (128, 256, 256, 256), min_length=1, description="channels a stage; the resolution halves after each"
    )
    blocks: int = Field(2, ge=1, description="residual blocks a stage")
    spectral_norm: bool = Field(True, description="normalise every layer to spectral norm 1 (Miyato et al. 2018)")


class ImportConfig(Section):
    kind: Literal["import"] = "import"
    path: str = Field(pattern=r"^[\w.]+:\w+$", description="module:Class of a BaseEnergyFunction")
    settings: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the class")
    num_classes: int | None = Field(None, ge=2, description="classes, where forward takes (x, y)")


EnergyConfig = Annotated[MLPConfig | ConvConfig | ResNetConfig | ImportConfig, Field(discriminator="kind")]


class LangevinConfig(Section):
    kind: Literal["langevin"] = "langevin"
    num_steps: int = Field(20, ge=1, description="Langevin steps a training step")
    step_size: float = Field(10.0, gt=0, description="x <- x - step_size * dE/dx + noise_scale * z")
    noise_scale: float | None = Field(0.005, ge=0, description="see step_size; null where temperature is given")
    temperature: float | None = Field(None, ge=0, description="sets noise_scale = sqrt(2 step_size temperature)")
    grad_clamp: float | None = Field(0.03, gt=0, description="each component of dE/dx is clamped to +- this")
    bounds: tuple[float, float] | None = Field((-1.0, 1.0), description="states stay in this interval; null: free")
    boundary: Literal["clamp", "reflect"] = Field("clamp", description="how bounds are kept")
    schedule: Literal["constant", "linear", "cosine", "geometric"] = Field(
        "constant", description="how step_size and noise_scale go to step_size_end and noise_scale_end in a chain"
    )
    step_size_end: float | None = Field(None, gt=0, description="last step size of a chain (schedule)")
    noise_scale_end: float | None = Field(None, ge=0, description="last noise scale of a chain (schedule)")

    @model_validator(mode="before")
    @classmethod
    def _temperature_replaces_noise_scale(cls, values):
        if isinstance(values, dict) and values.get("temperature") is not None and "noise_scale" not in values:
            values = {**values, "noise_scale": None}
        return values

    @model_validator(mode="after")
    def _one_noise(self):
        if (self.noise_scale is None) == (self.temperature is None):
            raise ValueError("give exactly one of noise_scale and temperature, and set the other to null")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds {self.bounds} must be (low, high) with low < high")
        ends = self.step_size_end is not None or self.noise_scale_end is not None
        if ends != (self.schedule != "constant"):
            raise ValueError("step_size_end or noise_scale_end go together with a schedule other than constant")
        starts_at_zero = self.noise_scale == 0 or self.temperature == 0
        if self.schedule == "geometric" and (self.noise_scale_end == 0 or starts_at_zero):
            raise ValueError("a geometric schedule needs noise scales above 0; use linear or cosine")
        return self

    def scaled(self, factor: float) -> "LangevinConfig":
        """With step sizes times `factor`; the noise follows where a temperature sets it."""
        end = None if self.step_size_end is None else self.step_size_end * factor
        return self.model_copy(update={"step_size": self.step_size * factor, "step_size_end": end})

    @property
    def noise(self) -> float:
        """The noise scale, given or from the temperature: sqrt(2 step_size T)."""
        return self.noise_scale if self.noise_scale is not None else (2 * self.step_size * self.temperature) ** 0.5


class BufferConfig(Section):
    size: int = Field(8192, ge=1, description="persistent chains, over all ranks; divisible by the streams")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="type chains are kept in between draws; float16 takes half the memory (.0005 near 1)"
    )
    reinit_prob: float = Field(0.05, ge=0, le=1, description="share of drawn chains that start again from noise")


class ContrastiveConfig(Section):
    kind: Literal["contrastive"] = "contrastive"
    negatives: Literal["persistent", "data", "noise"] = Field(
        "persistent",
        description="where chains start: the replay buffer (Tieleman 2008), data (CD-k, Hinton 2002), "
        "or fresh noise (Nijkamp et al. 2019)",
    )
    l2: float = Field(0.1, ge=0, description="weight of E(x_pos)^2 + E(x_neg)^2 (Du & Mordatch 2019)")


class OptimConfig(Section):
    lr: float = Field(1e-4, gt=0, description="Adam's learning rate after warm-up")
    betas: tuple[float, float] = Field((0.0, 0.999), description="Adam's decay rates")
    weight_decay: float = Field(0.0, ge=0, description="decoupled (AdamW); on weights, not on biases and scales")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_start: float = Field(0.5, ge=0, le=1, description="share of the run after which lr falls as a cosine")
    lr_end: float = Field(0.0, ge=0, description="learning rate at the last step, as a share of lr")
    grad_clip: float | None = Field(0.5, gt=0, description="largest norm of the gradient; null: none")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights that sample and score")

    @model_validator(mode="after")
    def _betas(self):
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must be at least 0 and below 1")
        return self


class TrainConfig(Section):
    steps: int = Field(100_000, ge=1, description="optimizer steps of the whole run")
    batch_size: int = Field(128, ge=1, description="images a step over all ranks; divisible by the streams")
    accumulate: int = Field(1, ge=1, description="parts a batch is computed in, one after the other, to save memory")
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="compute type of the network")
    log_every: int = Field(50, ge=1, description="steps between lines of metrics")
    collective_timeout: float = Field(
        600.0, gt=0, description="seconds without a step after which every rank shows its stacks and the job ends"
    )
    time_limit: float | None = Field(None, gt=0, description="seconds of wall time, then a clean stop (exit 75)")

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value):
        return "no" if value is False else value  # YAML 1.1 reads a bare `no` as false


class HealthConfig(Section):
    every: int = Field(10, ge=1, description="steps between two checks of the run's health")
    ladder: bool = Field(True, description="cut steps and roll back where training diverges; false: stop (exit 3)")
    patience: int = Field(5, ge=1, description="bad checks, less good ones, before something is done")
    max_skipped_steps: int = Field(20, ge=1, description="steps in a row without a finite gradient that are too many")
    min_auc: float = Field(0.05, ge=0, lt=0.5, description="P(E(x_neg) > E(x_pos)) below this is bad")
    max_auc: float = Field(0.995, gt=0.5, le=1, description="P(E(x_neg) > E(x_pos)) above this is bad, after grace")
    grace: int = Field(1000, ge=0, description="steps in which chains, begun as noise, may lie above all data")
    max_saturated: float = Field(0.5, gt=0, description="share of chain pixels at the bounds beyond data's that is bad")
    max_drift: float = Field(0.5, gt=0, description="step_size * |dE/dx| as a share of the bounds' width that is bad")
    gap_deviations: float = Field(8.0, gt=0, description="robust deviations of the energy gap that are bad")
    cut: float = Field(0.1, gt=0, lt=1, description="factor of a cut of the learning rate or the step size")
    recover: int = Field(100, ge=1, description="good checks in a row after which half of a cut learning rate is back")
    max_rollbacks: int = Field(6, ge=0, description="rollbacks of a run, before it gives up (exit 3)")
    max_restarts: int = Field(
        10, ge=0, description="starts in a row that reach no newer checkpoint, before one is refused"
    )


class CheckpointConfig(Section):
    every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a login, else offline"
    )
    project: str = Field("ebm", description="W&B project")
    entity: str | None = Field(None, description="W&B user or team")
    name: str | None = Field(None, description="W&B run name; the run directory's by default")
    group: str | None = Field(None, description="W&B group")
    tags: tuple[str, ...] = Field((), description="W&B tags")
    samples_every: int = Field(1000, ge=1, description="steps between sample panels")
    num_samples: int = Field(64, ge=1, description="images a panel")
    sample_steps: int = Field(200, ge=1, description="chain steps of fresh samples")
    wandb_timeout: float = Field(30.0, gt=0, description="seconds W&B may take to start, and again to finish")


class EvaluateConfig(Section):
    shards: str | None = Field(None, description="held-out shards for python -m ebm evaluate")
    source: str | None = Field(None, description="write evaluate.shards from this source's test split first")


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig
    energy: EnergyConfig = ResNetConfig()
    sampler: LangevinConfig = LangevinConfig()
    buffer: BufferConfig = BufferConfig()
    loss: ContrastiveConfig = ContrastiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_energy(cls, values):
        if isinstance(values, dict) and isinstance(values.get("energy"), dict) and "kind" not in values["energy"]:
            values = {**values, "energy": {"kind": ResNetConfig().kind, **values["energy"]}}
        return values

    @model_validator(mode="after")
    def _divisible(self):
        streams, batch, parts = self.data.streams, self.train.batch_size, self.train.accumulate
        if batch % (streams * parts):
            below = batch // (streams * parts) * streams * parts
            raise ValueError(
                f"train.batch_size={batch} is not divisible by data.streams={streams} times train.accumulate={parts}; "
                f"use {f'{below} or ' if below else ''}{below + streams * parts}, or other streams"
            )
        if self.buffer.size % streams:
            raise ValueError(
                f"buffer.size={self.buffer.size} is not divisible by data.streams={streams}; use "
                f"{-(-self.buffer.size // streams) * streams}"
            )
        if self.loss.negatives == "persistent" and self.buffer.size < batch:
            raise ValueError(
                f"buffer.size={self.buffer.size} is below train.batch_size={batch}: a step draws a whole "
                "batch of different chains; raise buffer.size"
            )
        return self


# Keys that may differ when a run is resumed: they move, observe or stop the run and do not change what it computes.
FREE_TO_CHANGE = (
    "run.dir",
    "data.shards",
    "data.source",
    "data.workers",
    "data.on_error",
    "data.max_skipped",
    "data.trace",
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
        if not (OmegaConf.is_dict(base.get(section)) and OmegaConf.is_dict(given[section])):
            continue
        if "kind" in given[section] and given[section]["kind"] != base[section].get("kind"):
            base[section] = {}
    if OmegaConf.is_dict(given.get("sampler")):
        for one, other in (("noise_scale", "temperature"), ("temperature", "noise_scale")):
            replaced = given.sampler.get(one) is not None and other not in given.sampler
            if replaced and OmegaConf.is_dict(base.get("sampler")):
                base.sampler.pop(other, None)
    return base


def validate(values: Any, where: str) -> Config:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be sections with keys, such as train.steps; found {type(values).__name__}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n" + "\n".join(f"  {_explain(item)}" for item in error.errors())) from error


_KINDS = {"mlp", "conv", "resnet", "import", "langevin", "contrastive"}  # pydantic names the union's member too


def _explain(item: dict) -> str:
    """One line of a validation error: the key, the value, what is allowed."""
    location = [str(part) for i, part in enumerate(item["loc"]) if not (i == 1 and part in _KINDS)]
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
    from typing import get_args

    rows = []
    for section, info in Config.model_fields.items():
        inner = [m for m in (info.annotation, *get_args(info.annotation)) if isinstance(m, type)]
        models = [m for m in inner if issubclass(m, Section)]
        for model in models:
            for name, field in model.model_fields.items():
                kind = f" [{model.model_fields['kind'].default}]" if len(models) > 1 and name != "kind" else ""
                rows.append(
                    (
                        f"{section}.{name}{kind}",
                        _type_name(field.annotation),
                        "required" if field.is_required() else _default(field),
                        field.description or "",
                    )
                )
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
