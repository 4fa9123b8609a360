"""The other sections, and the whole: every key, its type, default and meaning, once."""

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from ebm.config.energies import EnergyConfig, ResNetConfig
from ebm.config.losses import ContrastiveConfig, LossConfig
from ebm.config.samplers import LangevinConfig, SamplerConfig
from ebm.config.section import Section


class RunConfig(Section):
    dir: str = Field("runs/run", description="run directory; the same command with the same directory resumes")
    seed: int = Field(0, ge=0, lt=2**63, description="all randomness of the run follows from it")


ObjectStore = Literal["s3", "gs", "az", "abfs", "oss", "hf", "hdfs", "webhdfs", "sftp", "ftp", "memory"]  # to fsspec


class DataConfig(Section):
    shards: str = Field(
        description="directory with manifest.json, or the manifest itself: a path, or a URL of https://"
    )
    source: str | None = Field(
        None,
        description="write `shards` from this source first where they do not exist yet "
        "(digits, mnist, cifar10, svhn, celeba, four_peaks, eight_gaussians, rings, two_moons, folder:PATH, npy:PATH)",
    )
    shape: tuple[int, ...] = Field(
        (3, 32, 32), description="channels, height, width of every image; or [D] for vectors of D values"
    )
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
    schemes: tuple[ObjectStore, ...] = Field(
        (), description="URLs that shards may have beside file, http and https; read through fsspec"
    )
    cache_dir: str | None = Field(
        None,
        description="where shards with a URL are kept, on a disk of the node; null: a directory of the user in /tmp",
    )
    cache_bytes: int = Field(32 << 30, ge=1, description="size of the cache, which all processes of a node share")
    retries: int = Field(5, ge=0, le=100, description="further tries of a shard that stalls, breaks off or is altered")
    timeout: float = Field(60.0, gt=0, le=3600, description="seconds in which each MiB of a shard must arrive")

    @field_validator("shape")
    @classmethod
    def _shape(cls, shape):
        if len(shape) not in (1, 3) or min(shape) < 1:
            raise ValueError(
                "must be three positive numbers, channels, height, width, or one, the number of a vector's values"
            )
        return shape

    @model_validator(mode="after")
    def _vectors_are_not_images(self):
        if len(self.shape) == 1 and (self.augment_flip or self.augment_crop):
            raise ValueError(
                f"shape={list(self.shape)} is of vectors, which can't be flipped or cropped; set augment_flip=false "
                "and augment_crop=0"
            )
        return self


class BufferConfig(Section):
    size: int = Field(8192, ge=1, description="persistent chains, over all ranks; divisible by the streams")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="type chains are kept in between draws; float16 takes half the memory (.0005 near 1)"
    )
    reinit_prob: float = Field(0.05, ge=0, le=1, description="share of drawn chains that start again from noise")
    reinit_spread: float = Field(
        1.0,
        ge=1,
        description="largest over smallest probability of a slot's chain to start again; evenly spread in log over the "
        "slots, reinit_prob on average, so that chains of every age are trained on",
    )
    augment_flip: bool = Field(False, description="mirror half of the drawn chains left to right (Du et al. 2021)")
    augment_crop: int = Field(0, ge=0, description="shift drawn chains by up to this many pixels, edges repeated")

    @model_validator(mode="after")
    def _largest_probability(self):
        spread = self.reinit_spread
        largest = self.reinit_prob * (1.0 if spread == 1 else math.log(spread) / (1 - 1 / spread))
        if largest > 1:
            raise ValueError(
                f"reinit_prob={self.reinit_prob:g} with reinit_spread={spread:g}: some chains would start again with "
                f"probability {largest:.3g}; use a reinit_prob of at most {self.reinit_prob / largest:.2g}"
            )
        return self


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
    patience: int = Field(5, ge=1, description="bad checks, less half of the good ones, before the run goes back")
    max_skipped_steps: int = Field(20, ge=1, description="steps in a row without a finite gradient that are too many")
    min_auc: float = Field(0.05, ge=0, lt=0.5, description="P(E(x_neg) > E(x_pos)) below this is bad")
    max_auc: float = Field(0.995, gt=0.5, le=1, description="P(E(x_neg) > E(x_pos)) above this is bad, after grace")
    grace: int = Field(1000, ge=0, description="first steps, in which chains may lie above or below all data")
    max_saturated: float = Field(0.5, gt=0, description="share of chain pixels at the bounds beyond data's that is bad")
    max_drift: float = Field(0.5, gt=0, description="step_size * |dE/dx| as a share of the bounds' width that is bad")
    min_drift: float = Field(1e-8, ge=0, description="step_size * |dE/dx|, as a share of it, below which is bad")
    min_spread: float = Field(
        1e-5, ge=0, description="standard deviation of the energies, as a share of what it was, below which is bad"
    )
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
    group: str | None = Field(None, description="W&B group, such as the sweep a run belongs to; null: $WANDB_RUN_GROUP")
    tags: tuple[str, ...] = Field((), description="W&B tags")
    samples_every: int = Field(1000, ge=1, description="steps between sample panels")
    num_samples: int = Field(64, ge=1, description="images a panel")
    sample_steps: int = Field(200, ge=1, description="chain steps of fresh samples")
    wandb_timeout: float = Field(30.0, gt=0, description="seconds W&B may take to start, and again to finish")
    offline_part: float = Field(
        1800.0,
        gt=0,
        description="seconds after which an offline run begins a new file, so that the one before can be "
        "uploaded (python -m ebm sync) while the run goes on",
    )
    alerts: bool = Field(True, description="W&B alerts on divergence, stalls and failure")
    alert_every: float = Field(3600.0, gt=0, description="seconds between two alerts of the same kind")
    stall_after: float = Field(
        300.0,
        gt=0,
        description="an alert after so many seconds without a step; to be below train.collective_timeout",
    )
    slow_factor: float = Field(3.0, gt=1, description="an alert where steps take this many times as long as they did")
    artifacts: Literal["none", "final", "all"] = Field(
        "none", description="checkpoints uploaded to W&B: the last one, with the samples, or each"
    )
    artifacts_gb: float = Field(10.0, gt=0, description="gigabytes of artifacts that may wait for their upload")


class EvaluateConfig(Section):
    shards: str | None = Field(None, description="held-out shards for python -m ebm evaluate")
    source: str | None = Field(None, description="write evaluate.shards from this source's test split first")


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

    @model_validator(mode="after")
    def _kinds_go_together(self):
        loss, sampler = self.loss, self.sampler
        buffer = self.buffer
        if (buffer.augment_flip or buffer.augment_crop) and (len(self.data.shape) != 3 or sampler.levels > 1):
            raise ValueError(
                "buffer.augment_flip and buffer.augment_crop are of images, and of no ladders of replicas "
                "(sampler.kind=tempering); set augment_flip=false and augment_crop=0"
            )
        if loss.kind == "jem" and not self.energy.num_classes:
            raise ValueError("loss.kind=jem trains a classifier: set energy.num_classes to the number of classes")
        if loss.kind in ("improved_contrastive", "energy_matching") and sampler.kind != "langevin":
            raise ValueError(f"loss.kind={loss.kind} goes with sampler.kind=langevin, not {sampler.kind}")
        if loss.kind == "energy_matching" and (sampler.start, sampler.schedule) != ("normal", "flow"):
            raise ValueError(
                "loss.kind=energy_matching flows from N(0, I): set sampler.start=normal and sampler.schedule=flow"
            )
        if loss.kind == "recovery" and (sampler.kind == "tempering" or abs(sampler.implied_temperature - 1) > 1e-6):
            raise ValueError(
                "loss.kind=recovery ties chains to noisy data at temperature 1: set sampler.temperature=1 and "
                "sampler.kind=langevin, mala or hmc"
            )
        return self
