"""What all sections of the config share, and those that no step of training reads: checkpoint, tracking, evaluate."""

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A section of the config. It is frozen, and refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def kind_by_default(kind: str) -> BeforeValidator:
    """For a union of sections: values without a `kind` are read as those of `kind`."""

    def complete(values: Any) -> Any:
        return {"kind": kind, **values} if isinstance(values, dict) and "kind" not in values else values

    return BeforeValidator(complete)


def expand_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced by that home directory, also after the kind of a source, as in
    folder:~/pictures. Raises ValueError where there is none."""
    kind, colon, rest = path.partition(":")
    if colon and rest.startswith("~"):
        return f"{kind}:{expand_home(rest)}"
    expanded = os.path.expanduser(path)  # pathlib would change `a//b` and URLs
    if expanded.startswith("~"):
        raise ValueError(f"there is no home directory {path.partition('/')[0]}; write ./{path} for a file of that name")
    return expanded


UserPath = Annotated[str, AfterValidator(expand_home)]


class CheckpointConfig(Section):
    every: int = Field(1000, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="number of newest checkpoints that are kept")


class TrackingConfig(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="Weights & Biases (W&B): auto is what $WANDB_MODE and $WANDB_DISABLED say, else online if you are "
        "logged in and offline if not",
    )
    project: str | None = Field(None, description="W&B project; null: $WANDB_PROJECT, or ebm")
    entity: str | None = Field(None, description="W&B user or team; null: $WANDB_ENTITY, or your default one")
    name: str | None = Field(None, description="W&B run name; null: $WANDB_NAME, or the name of the run directory")
    group: str | None = Field(
        None, description="W&B group, such as the sweep that a run belongs to; null: $WANDB_RUN_GROUP"
    )
    tags: tuple[str, ...] = Field((), description="W&B tags; none: $WANDB_TAGS")
    notes: str | None = Field(None, description="a text on the run that W&B shows; null: $WANDB_NOTES")
    job_type: str | None = Field(
        None, description="W&B job type, by which runs of a group are told apart; null: $WANDB_JOB_TYPE"
    )
    console: bool = Field(False, description="send the output of rank 0's process to W&B, too")
    tensorboard: bool = Field(
        False, description="also write metrics, panels and histograms to RUN/tensorboard; needs ebm[tensorboard]"
    )
    samples_every: int = Field(1000, ge=1, description="steps between two panels of samples")
    num_samples: int = Field(64, ge=1, description="number of images in a panel")
    sample_steps: int = Field(200, ge=1, description="steps of the chains that draw fresh samples for a panel")
    wandb_timeout: float = Field(30.0, gt=0, description="seconds that W&B may take to start, and again to finish")
    offline_part: float = Field(
        1800.0,
        gt=0,
        description="seconds after which an offline run begins a new file, so that the previous one can be "
        "uploaded by ebm sync while the run goes on",
    )
    alerts: bool = Field(True, description="send W&B alerts on divergence, stalls and failure")
    alert_every: float = Field(3600.0, gt=0, description="least number of seconds between two alerts of the same kind")
    stall_after: float = Field(
        300.0,
        gt=0,
        description="seconds without a step after which an alert is sent; set it below train.collective_timeout",
    )
    slow_factor: float = Field(
        3.0, gt=1, description="an alert is sent if steps take this many times as long as before"
    )
    artifacts: Literal["none", "final", "all"] = Field(
        "none",
        description="checkpoints that are uploaded to W&B, as a whole and as a model (averaged weights, config, "
        "metrics): none, the last one together with the samples, or all",
    )
    artifacts_gb: float = Field(10.0, gt=0, description="gigabytes of checkpoints that may wait for their upload")


class EvaluateConfig(Section):
    shards: UserPath | None = Field(None, description="held-out data for ebm evaluate, given as data.shards")
    source: UserPath | None = Field(
        None, description="write evaluate.shards from the test split of this source first, if they do not exist yet"
    )
