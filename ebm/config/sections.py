"""The config as a whole, and the sections that have one form only and that a step of training reads: run, data, buffer,
optim, train, health. Each key is stated once, with its type, range, default and meaning."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from ebm.config.energies import EnergyConfig, NetworkConfig, NoiseRangeConfig, ResNetConfig
from ebm.config.losses import ContrastiveConfig, LossConfig, RecoveryConfig, check_noise_levels
from ebm.config.samplers import FreshConfig, LangevinConfig, SamplerConfig
from ebm.config.section import CheckpointConfig, EvaluateConfig, Section, TrackingConfig, UserPath


class RunConfig(Section):
    dir: UserPath = Field(
        "runs/run", description="run directory; the same command with the same directory resumes the run"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed from which all randomness of the run follows")
    init: UserPath | None = Field(
        None,
        description="another run's directory, or one checkpoint in it, whose weights this run begins with; or "
        "FILE.safetensors, a field that points at data, for energy.kind=unet with head dot or quadratic",
    )
    init_weights: Literal["ema", "raw"] = Field(
        "ema", description="which of the other run's weights: the averaged ones, or those of its optimizer"
    )
    init_optimizer: bool = Field(False, description="take over the other run's averages of Adam, too")
    init_chains: bool = Field(False, description="take over the other run's persistent chains, too")

    @field_validator("dir")
    @classmethod
    def _dir(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a directory; its files would be scattered over the working directory")
        if not value.isprintable():
            raise ValueError("must have no control characters, such as newlines")
        return value


ObjectStore = Literal["s3", "gs", "az", "abfs", "oss", "hf", "hdfs", "webhdfs", "sftp", "ftp", "memory"]  # to fsspec


class DataConfig(Section):
    shards: UserPath = Field(
        description="training data: directory with shards and manifest.json, or the manifest itself; a path or a URL"
    )
    source: UserPath | None = Field(
        None,
        description="write data.shards from this source first, if they do not exist yet "
        "(digits, mnist, cifar10, svhn, celeba, four_peaks, eight_gaussians, rings, two_moons, folder:PATH, npy:PATH)",
    )
    shape: tuple[int, ...] = Field(
        (3, 32, 32), description="[channels, height, width] of every image, in pixels; or [D] for vectors of D values"
    )
    streams: int = Field(
        8,
        ge=1,
        description="number of parts that data, chains and randomness are split into, so that results do not depend on "
        "the number of processes; divisible by that number, and fixed for the run",
    )
    workers: int = Field(
        1, ge=0, description="processes that decode images, for each rank; 0: the training process decodes"
    )
    window: int = Field(
        2048,
        ge=1,
        description="samples that each stream shuffles at a time; a larger window mixes better and takes more memory",
    )
    augment_flip: bool = Field(False, description="mirror each image left to right with probability 1/2")
    augment_crop: int = Field(
        0, ge=0, description="shift each image by up to this many pixels at random; edges are repeated"
    )
    dequantize: bool = Field(
        True, description="add uniform noise of one level to the 256 levels of a pixel, so that values are continuous"
    )
    noise_std: float = Field(
        0.03, ge=0, description="standard deviation of Gaussian noise added to the data (images lie in [-1, 1])"
    )
    trace: bool = Field(
        False, description="write trace.jsonl, which lists the samples and chains of every step over all ranks"
    )
    on_error: Literal["fail", "skip"] = Field(
        "fail",
        description="what happens at an unreadable sample: fail ends the run (exit 4), skip logs and counts the sample",
    )
    max_skipped: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="on_error=skip ends the run (exit 4) if it skips more than this share of a stream's epoch",
    )
    allow_change: bool = Field(
        False, description="let a run that is resumed go on with other data than those it was trained on so far"
    )
    max_pixels: int = Field(
        4096 * 4096, ge=1, description="images with more pixels than this are refused before they are decoded"
    )
    schemes: tuple[ObjectStore, ...] = Field(
        (),
        description="further kinds of URL that data.shards may have, beside file, http and https; read through fsspec",
    )
    cache_dir: UserPath | None = Field(
        None,
        description="directory on a local disk for copies of remote shards; null: a directory of the user in /tmp",
    )
    cache_bytes: int = Field(
        32 << 30, ge=1, description="largest size of data.cache_dir in bytes; all processes of a node share it"
    )
    retries: int = Field(
        5,
        ge=0,
        le=100,
        description="further attempts at a remote shard that stalls, breaks off or has a wrong checksum",
    )
    timeout: float = Field(
        60.0, gt=0, le=3600, description="seconds within which each MiB of a remote shard must arrive"
    )

    @field_validator("shape")
    @classmethod
    def _shape(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ValueError(
                "must be three positive numbers, channels, height, width, or one, the number of a vector's values"
            )
        return shape

    @model_validator(mode="after")
    def _vectors_are_not_images(self) -> Self:
        if len(self.shape) == 1 and (self.augment_flip or self.augment_crop):
            raise ValueError(
                f"shape={list(self.shape)} is for vectors, which can't be flipped or cropped; set augment_flip=false "
                "and augment_crop=0"
            )
        return self


class BufferConfig(Section):
    size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        8192,
        description="number of persistent chains over all ranks; divisible by data.streams. auto: as many as each move "
        "buffer.age steps in the run, and never fewer than train.batch_size",
    )
    age: int = Field(
        10_000,
        ge=1,
        description="size=auto: steps that each slot's chain has moved by the end of training if it never restarts; "
        "with a number as size it is not used",
    )
    dtype: Literal["float32", "float16"] = Field(
        "float32",
        description="type in which chains are stored; float16 halves the memory, with a precision of .0005 near 1",
    )
    reinit_prob: float = Field(0.05, ge=0, le=1, description="probability that a drawn chain restarts from noise")
    reinit_spread: float = Field(
        1.0,
        ge=1,
        description="ratio of the largest to the smallest restart probability of the buffer's slots. These fall "
        "geometrically and average reinit_prob, so that chains of every age are trained on; 1: all are equal",
    )
    restart: Literal["noise", "augmented"] = Field(
        "noise",
        description="where a chain restarts: in noise, or in its own state, mirrored, shifted and with other contrast "
        "and brightness, all at random (images)",
    )
    augment_flip: bool = Field(
        False, description="mirror each drawn chain left to right with probability 1/2 (Du et al. 2021)"
    )
    augment_crop: int = Field(
        0, ge=0, description="shift each drawn chain by up to this many pixels at random; edges are repeated"
    )

    @field_validator("size", mode="wrap")
    @classmethod
    def _size(cls, value: object, validated: ValidatorFunctionWrapHandler) -> object:
        try:
            return validated(value)
        except ValidationError as error:  # one message in place of one for each type that it may have
            raise ValueError(
                "must be a number of chains, 1 or more, or auto, which takes it from buffer.age; use auto, or a "
                "multiple of data.streams"
            ) from error

    @model_validator(mode="after")
    def _largest_probability(self) -> Self:
        spread = self.reinit_spread
        largest = self.reinit_prob * (1.0 if spread == 1 else math.log(spread) / (1 - 1 / spread))
        if largest > 1:
            raise ValueError(
                f"reinit_prob={self.reinit_prob:g} with reinit_spread={spread:g}: some chains would restart with "
                f"probability {largest:.3g}; use a reinit_prob of at most {self.reinit_prob / largest:.2g}"
            )
        return self


class OptimConfig(Section):
    lr: float = Field(1e-4, gt=0, description="learning rate of Adam after warm-up")
    betas: tuple[float, float] = Field(
        (0.0, 0.999), description="decay rates of Adam's averages of the gradient and of its square"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay (AdamW) of weight matrices; biases and scales have none"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly to lr")
    decay_start: float = Field(
        0.5, ge=0, le=1, description="share of train.steps after which the learning rate falls as a cosine; 1: never"
    )
    lr_end: float = Field(0.0, ge=0, description="learning rate at the last step, as a share of lr")
    grad_clip: float | None = Field(
        0.5,
        gt=0,
        description="largest norm of the gradient of all weights, above which it is scaled down; null: no limit",
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the weights, which samples and scores; 0: no averaging",
    )
    ema_warmup: bool = Field(
        True,
        description="average over fewer steps at first: at step n the decay is at most (1 + n) / (10 + n), so that a "
        "short run's average forgets its initial weights",
    )

    def average_decay(self, step: int) -> float:
        """The decay of the averaged weights at step 1, 2, ..."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_decay

    def initial_share(self, steps: int) -> float:
        """The weight that the run's initial weights have in the average after so many steps: the product of the
        decays."""
        warm = min(steps, 10_000)  # by then nothing of them is left, if the decays rise
        return math.prod(self.average_decay(step) for step in range(1, warm + 1)) * self.ema_decay ** (steps - warm)

    @model_validator(mode="after")
    def _betas(self) -> Self:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must be at least 0 and below 1")
        return self


class TrainConfig(Section):
    steps: int = Field(100_000, ge=1, description="optimizer steps of the whole run")
    extend: bool = Field(
        False,
        description="go on with a run under another config, such as more train.steps, if it changes nothing that "
        "checkpoints store; what changed is kept in RUN/config_history.json",
    )
    batch_size: int = Field(
        128, ge=1, description="images in each step over all ranks; divisible by data.streams times accumulate"
    )
    accumulate: int = Field(
        1, ge=1, description="number of parts that a batch is computed in, one after the other, to save memory"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="type that the network computes in: no is float32"
    )
    compile: Literal["auto", "true", "false"] = Field(
        "auto",
        description="compile the network of chains and of the loss by torch.compile: auto where that is faster, tried "
        "out once on a GPU; a compiled network is used only where energies and gradients agree with the eager ones",
    )
    deterministic: bool = Field(
        True,
        description="on a GPU, use algorithms that give the same bits every time, so that a resumed run ends like one "
        "that was never stopped; false: the fastest algorithms, tried out at the start, which may differ in rounding",
    )
    tf32: bool = Field(
        False,
        description="on a GPU, let float32 convolutions and matrix products round their factors to TF32 (10 bits "
        "instead of 23), which is several times as fast; bf16 and fp16 do not depend on it, save for heads",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="device of the run; auto is a GPU where there is one, and cuda refuses to start without one"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="how ranks exchange gradients; auto is nccl on GPUs; with gloo, ranks may share a GPU"
    )
    threads: int | None = Field(
        None, ge=1, le=4096, description="CPU threads of each rank; null: what the environment says"
    )
    log_every: int = Field(50, ge=1, description="steps between two lines of metrics.jsonl")
    collective_timeout: float = Field(
        600.0, gt=0, description="seconds without a step after which every rank prints its stacks and the job ends"
    )
    time_limit: float | None = Field(
        None, gt=0, description="seconds after which the run writes a checkpoint and stops (exit 75); null: no limit"
    )

    @field_validator("compile", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        return str(value).lower() if isinstance(value, bool) else value  # as YAML reads true and false


class HealthConfig(Section):
    every: int = Field(10, ge=1, description="steps between two checks for divergence")
    ladder: bool = Field(True, description="if training diverges, cut step sizes and roll back; false: stop (exit 3)")
    patience: int = Field(
        5, ge=1, description="number of bad checks, less half of the good ones since, at which the run rolls back"
    )
    max_skipped_steps: int = Field(
        20, ge=1, description="steps in a row without a finite gradient at which the run rolls back"
    )
    min_auc: float = Field(0.05, ge=0, lt=0.5, description="a check is bad if P(E(x_neg) > E(x_pos)) is below this")
    max_auc: float = Field(
        0.995, gt=0.5, le=1, description="a check is bad if P(E(x_neg) > E(x_pos)) is above this, after health.grace"
    )
    grace: int = Field(1000, ge=0, description="number of first steps in which chains may lie above or below all data")
    max_saturated: float = Field(
        0.5,
        gt=0,
        description="a check is bad if the share of chain values at the bounds exceeds that of the data by this",
    )
    max_drift: float = Field(
        0.5,
        gt=0,
        description="a check is bad if step_size * |dE/dx| (root mean square) is above this share of the bounds' width",
    )
    min_drift: float = Field(
        1e-8,
        ge=0,
        description="a check is bad if step_size * |dE/dx| (root mean square) is below this share of the bounds' width",
    )
    min_spread: float = Field(
        1e-5,
        ge=0,
        description="a check is bad if the standard deviation of the energies is below this share of its median so far",
    )
    gap_deviations: float = Field(
        8.0, gt=0, description="a check is bad if the energy gap is this many robust deviations away from its median"
    )
    cut: float = Field(
        0.1, gt=0, lt=1, description="factor by which a cut multiplies the learning rate or the step size"
    )
    recover: int = Field(
        100,
        ge=1,
        description="good checks in a row after which a cut learning rate returns to half of its value before the cut",
    )
    max_rollbacks: int = Field(6, ge=0, description="number of rollbacks after which the run gives up (exit 3)")
    max_restarts: int = Field(
        10, ge=0, description="number of starts in a row without a newer checkpoint after which a start is refused"
    )


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig
    energy: EnergyConfig = ResNetConfig()
    sampler: SamplerConfig = LangevinConfig()
    buffer: BufferConfig = BufferConfig()
    loss: LossConfig = ContrastiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def classes_of_chains(self) -> int | None:
        """The number of classes that chains have; None where they have none."""
        return self.energy.num_classes if self.loss.conditional_chains else None

    @property
    def chain_steps(self) -> int:
        """Steps of all persistent chains together in the whole run; 0 where there are none."""
        if self.loss.negatives != "persistent":
            return 0
        without = self.loss.warmup_steps if self.loss.kind == "dual_score_matching" else 0
        return max(0, self.train.steps - without) * self.sampler.num_steps * self.train.batch_size

    @property
    def buffer_size(self) -> int:
        """The number of persistent chains over all ranks. buffer.size=auto is `chain_steps` / buffer.age, in slices of
        the streams that are equal and hold their share of a batch and a chain of each class."""
        if isinstance(self.buffer.size, int):
            return self.buffer.size
        streams = self.data.streams
        slots = (2 * self.chain_steps + self.buffer.age * streams) // (2 * self.buffer.age * streams)  # rounded
        return streams * max(slots, -(-self.train.batch_size // streams), self.classes_of_chains or 1)

    @property
    def fresh_sampler(self) -> FreshConfig:
        """The sampler of fresh chains: the objective's own or the run's."""
        return self.loss.fresh_sampler(self.sampler, self.noise_range)

    @property
    def noise_range(self) -> NoiseRangeConfig | None:
        """The range of noise of an energy E(x, t); None of an energy E(x)."""
        return self.energy.noise_conditional if isinstance(self.energy, NetworkConfig) else None

    @property
    def recovery_levels(self) -> tuple[float, ...]:
        """The log variances of recovery likelihood over levels of noise, as `RecoveryConfig.log_variances`; else ()."""
        noise, loss = self.noise_range, self.loss
        return () if noise is None or not isinstance(loss, RecoveryConfig) else loss.log_variances(noise)

    @model_validator(mode="before")
    @classmethod
    def _levels_of_the_energy(cls, values: Any) -> Any:
        """A sampler that does not name its noise levels has those of the energy."""
        if not isinstance(values, dict):
            return values
        energy, sampler = values.get("energy"), values.get("sampler")
        levels = energy.get("noise_conditional") if isinstance(energy, dict) else None
        if isinstance(levels, dict) and isinstance(sampler, dict) and sampler.get("kind") == "noise_levels":
            named = {key: levels[key] for key in ("sigma_min", "sigma_max") if key in levels}
            values = {**values, "sampler": named | sampler}
        return values

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        streams, batch, parts = self.data.streams, self.train.batch_size, self.train.accumulate
        size = self.buffer_size
        problems = []
        if batch % (streams * parts):
            below = batch // (streams * parts) * streams * parts
            problems.append(
                f"train.batch_size={batch} is not divisible by data.streams={streams} times train.accumulate={parts}; "
                f"use {f'{below} or ' if below else ''}{below + streams * parts}, or other streams"
            )
        if size % streams:
            problems.append(
                f"buffer.size={size} is not divisible by data.streams={streams}; use {-(-size // streams) * streams}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        classes = self.classes_of_chains
        if self.loss.negatives == "persistent" and classes and size // streams < classes:
            raise ValueError(
                f"buffer.size={size} is {size // streams} chains for each of data.streams={streams}, fewer than "
                f"energy.num_classes={classes}: raise buffer.size to {streams * classes} or more"
            )
        if self.loss.negatives == "persistent" and size < batch:
            raise ValueError(
                f"buffer.size={size} is below train.batch_size={batch}: a step draws a whole batch of different "
                "chains; raise buffer.size"
            )
        return self

    @model_validator(mode="after")
    def _kinds_go_together(self) -> Self:
        loss, sampler = self.loss, self.sampler
        buffer = self.buffer
        changed = buffer.augment_flip or buffer.augment_crop or buffer.restart == "augmented"
        if changed and (len(self.data.shape) != 3 or sampler.levels > 1):
            raise ValueError(
                "buffer.augment_flip, augment_crop and restart=augmented are for images whose chains are no ladders of "
                "replicas (sampler.kind=tempering); set augment_flip=false, augment_crop=0 and restart=noise"
            )
        latent = isinstance(self.energy, NetworkConfig) and self.energy.latent is not None
        if latent != (loss.kind == "contrastive_latent") or (latent and len(self.data.shape) != 3):
            raise ValueError(
                f"loss.kind={loss.kind} with energy.latent={'{...}' if latent else 'null'} and data.shape="
                f"{list(self.data.shape)}: energy.latent={{}} and loss.kind=contrastive_latent go together, for images"
            )
        if loss.kind == "jem" and not self.energy.num_classes:
            raise ValueError("loss.kind=jem trains a classifier: set energy.num_classes to the number of classes")
        if loss.kind in ("improved_contrastive", "energy_matching") and sampler.kind != "langevin":
            raise ValueError(f"loss.kind={loss.kind} goes with sampler.kind=langevin, not {sampler.kind}")
        check_noise_levels(loss, self.energy.kind, self.noise_range, sampler, self.data.noise_std)
        kept = loss.negatives == "persistent" and self.classes_of_chains and not self.buffer.reinit_prob
        if kept and loss.kind != "dual_score_matching":  # which compares data with chains of their class
            raise ValueError(
                f"buffer.reinit_prob=0 with energy.num_classes={self.energy.num_classes}: chains would keep their "
                "first classes, whose shares are not quite the data's, and the energies of whole classes would drift "
                "apart; set buffer.reinit_prob above 0"
            )
        loss.check(sampler, self.train.batch_size // self.data.streams // self.train.accumulate)
        return self
