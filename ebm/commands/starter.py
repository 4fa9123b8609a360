"""Starter recipes for `ebm init`: the config that fits a data set of small images, with the reason for each choice."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

SMALL = 16  # pixels; a network of strided convolutions and a linear layer sees the whole of a smaller image
LAST_SIDE = 8  # pixels that the last stage of a ResNet still has, at most
FEWEST_STEPS, MOST_STEPS = 300, 100_000
PANELS, LINES, CHECKPOINTS = 10, 100, 5  # how many a run has of them
PANEL_IMAGES = 32


class Choice(NamedTuple):
    key: str  # dotted
    value: Any
    why: str


class Data(NamedTuple):
    """What a recipe depends on."""

    name: str  # of the run directory, below runs/
    train: str  # shards
    heldout: str
    shape: tuple[int, ...]
    samples: int
    gpu: bool


def recipe(data: Data) -> list[Choice]:
    """Everything but the precision and what follows from the number of steps."""
    channels, side = data.shape[0], max(data.shape[1:])
    small_grey = channels == 1 and side <= SMALL
    chosen = [
        Choice("run.dir", f"runs/{data.name}", "the results; the same command with the same directory resumes the run"),
        Choice("data.shards", data.train, f"{data.samples} images to train on"),
        Choice("data.shape", list(data.shape), "channels, height, width, as the shards have it"),
        Choice("data.streams", 8 if data.gpu else 4, "the run can use this number of processes, or a divisor of it"),
        Choice("data.augment_flip", False, "true where the mirror image of each picture could be one of yours, too"),
        Choice("evaluate.shards", data.heldout, "images that are never trained on, for scores"),
    ]
    return chosen + (_small_grey() if small_grey else _natural(data))


def _small_grey() -> list[Choice]:
    """configs/digits.yaml, which says what it reached."""
    return [
        Choice("energy.kind", "conv", "for small images of centred objects"),
        Choice("energy.features", [16, 32, 32, 64], "channels of each convolution"),
        Choice("energy.hidden_dim", 64, "width of the linear layer after them"),
        *_chains(num_steps=10),
        Choice("buffer.size", 4096, "persistent chains: enough that a batch seldom meets the same ones"),
        Choice("buffer.reinit_prob", 0.04, "share of chains that start anew: raise it if persistent chains look alike"),
        Choice("loss.l2", 0.01, "holds energies near 0; raise it if they drift away"),
        Choice("optim.lr", 3e-3, "halve it if the AUC leaves .2 to .9 for good"),
        Choice("optim.grad_clip", 0.1, "no batch moves the weights far"),
        Choice("train.batch_size", 128, "images, and as many chains, in each step"),
    ]


def _natural(data: Data) -> list[Choice]:
    """The recipe that was found on patches of photographs, with a wider network on a GPU."""
    side, stages = max(data.shape[1:]), 3
    while side / 2 ** (stages - 1) > LAST_SIDE:
        stages += 1
    features = [64, 128] if data.gpu else [16, 32]
    features += [features[-1]] * (stages - 2)
    return [
        Choice("energy.kind", "resnet", "residual blocks, for natural images; features are summed over the image"),
        Choice("energy.features", features, f"channels of each stage; {side} pixels are halved after each"),
        Choice("energy.spectral_norm", True, "bounds the slope of the energy; without it colour images run away"),
        *_chains(num_steps=20),
        Choice("buffer.size", 16384 if data.gpu else 2000, "persistent chains, some 30 batches or more"),
        Choice("buffer.reinit_prob", 0.05, "share of chains that start anew: raise it if persistent chains look alike"),
        Choice("loss.l2", 0.1, "holds energies near 0; raise it if they drift away"),
        Choice("optim.lr", 3e-4 if data.gpu else 5e-4, "halve it if the AUC leaves .2 to .9 for good"),
        Choice("optim.warmup_steps", 50, "the first chains are noise, and teach little"),
        Choice("optim.grad_clip", 1.0, "no batch moves the weights far"),
        Choice("train.batch_size", 128 if data.gpu else 64, "images, and as many chains, in each step"),
    ]


def _chains(num_steps: int) -> list[Choice]:
    """Chains that work on images in [-1, 1]. See docs/your_images.md for how their numbers go together."""
    return [
        Choice("data.noise_std", 0.03, "noise added to the data, so that their density is no spike"),
        Choice("sampler.num_steps", num_steps, "steps of a chain in each step of training; the cost is in proportion"),
        Choice("sampler.step_size", 10.0, "with 1 the chains hardly move, and the AUC stays near 1"),
        Choice("sampler.grad_clamp", 0.03, "no step moves a pixel by more than .3 of the 2 between black and white"),
        Choice("sampler.noise_scale", 0.005, "far below what step_size would need at temperature 1: sharp samples"),
    ]


def schedule(steps: int) -> list[Choice]:
    """What follows from the number of steps."""
    decay = min(0.9995, max(0.95, round(1 - 20 / steps, 4)))
    return [
        Choice("train.steps", steps, "see the estimate that ebm init printed"),
        Choice("optim.ema_decay", decay, "averages about the last twentieth of the run; the samples use the average"),
        Choice("train.log_every", max(1, steps // LINES), "steps between two lines of metrics"),
        Choice("checkpoint.every", max(1, steps // CHECKPOINTS), "steps between two checkpoints"),
        Choice("tracking.samples_every", max(1, steps // PANELS), "steps between two pictures of samples"),
        Choice("tracking.num_samples", PANEL_IMAGES, "samples in such a picture; their chains take time, too"),
    ]


def steps_for(minutes: float, step_s: float, panel_s: float) -> int:
    """The number of steps that take about that long, with their panels; at least FEWEST_STEPS."""
    steps = (60 * minutes - PANELS * panel_s) / step_s
    rounded = int(steps) // 50 * 50
    return min(max(rounded, FEWEST_STEPS), MOST_STEPS)


def to_yaml(choices: Sequence[Choice], head: Sequence[str]) -> str:
    """A config with the reason beside each value. `head`: lines of comment before it."""
    sections: dict[str, list[Choice]] = {}
    for choice in choices:
        sections.setdefault(choice.key.partition(".")[0], []).append(choice)
    lines = [f"# {line}" for line in head]
    for name, chosen in sections.items():
        lines.append(f"{name}:")
        for choice in chosen:
            value = f"  {choice.key.partition('.')[2]}: {json.dumps(choice.value)}"
            lines.append(f"{value:<34}  # {choice.why}")
    return "\n".join(lines) + "\n"
