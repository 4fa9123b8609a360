"""python -m ebm init --data DIR"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ebm.commands.shard import tell
from ebm.config import TrackingConfig, load_config
from ebm.data.decode import describe
from ebm.data.items import Conversion, select
from ebm.data.manifest import FILE_NAME, Manifest, is_remote, load_manifest
from ebm.data.shards import write_shards
from ebm.data.sources import open_source
from ebm.errors import ConfigError, DataError
from ebm.runtime.distributed import choose_device
from ebm.runtime.files import replace

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
        Choice("sampler.start", "mixture", "in Gaussians fitted to the data; from noise chains find one colour first"),
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


SHARE, ENOUGH = 0.1, 64  # of the images that are held out; at least this number, up to half of them
MAX_COPY = 4 << 30  # bytes of shards that are written again to hold some images out
HELD_OUT = ("val", "valid", "test")  # names of splits that are not for training, and of shards beside others
SPLITS = ("train", *HELD_OUT)
TRIAL_STEPS, FIRST = 5, 2  # of a measurement; its first steps, which warm up, do not count
BF16_GAIN = 1.2  # bfloat16 is chosen on a CPU if it is so many times as fast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="shards to train on, or a folder of pictures with --shards"
    )
    parser.add_argument(
        "--val",
        metavar="DIR",
        help="held-out shards (default: those beside DIR, or a tenth of DIR, written beside it)",
    )
    parser.add_argument("--out", metavar="FILE", help="the config (default: NAME.yaml after DIR)")
    parser.add_argument("--shards", action="store_true", help="write the pictures in DIR to shards beside it first")
    parser.add_argument("--size", type=int, metavar="N", help="with --shards: resize pictures to N x N pixels")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="M", help="how long training may take (default: 10)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")


def run(arguments: argparse.Namespace) -> int:
    if arguments.minutes <= 0:
        raise ConfigError(f"--minutes {arguments.minutes:g}: must be above 0")
    where = arguments.data.rstrip("/")
    folder = Path(where)
    out = Path(arguments.out or f"{name_of(where)}.yaml")
    if out.exists() and not arguments.overwrite:
        raise ConfigError(f"{out} is there already; give --out another name, or --overwrite")
    sets = None if arguments.val is None else (where, arguments.val)
    if not is_remote(where) and folder.is_dir() and not (folder / FILE_NAME).is_file():
        if not arguments.shards:
            raise ConfigError(f"{where} has no {FILE_NAME}: {advice_on_pictures(folder)}")
        if sets:
            raise ConfigError(f"--val {arguments.val}: goes with shards; of pictures a part is held out by itself")
        sets = shards_of_pictures(folder, arguments.size)
    train, heldout = sets or held_out(load_manifest(where), where)
    data = described(train, heldout, name_of(where))
    write_config(data, out, arguments.minutes)
    return 0


def name_of(where: str) -> str:
    """A short name of a data set: of data/birds/train and data/birds it is birds."""
    parts = [part for part in where.split("/") if part.strip(".")]
    while len(parts) > 1 and parts[-1].lower() in (*SPLITS, "shards"):
        parts.pop()
    name = parts[-1].removesuffix("-train").removesuffix("-shards") if parts else "run"
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name) or "run"


def free_name(name: str) -> str:
    """`name`, or with a number such that runs/NAME is not there."""
    names = (name if n == 1 else f"{name}-{n}" for n in itertools.count(1))
    return next(found for found in names if not Path("runs", found).exists())


# Data


def advice_on_pictures(folder: Path) -> str:
    """The commands that make shards of a folder of pictures, as a continuation of a sentence."""
    spec, out = shlex.quote(f"folder:{folder}"), shlex.quote(f"{folder}-shards")
    split = split_beside(str(folder))
    share = "" if split else f" --holdout {SHARE}"
    return (
        "if it holds pictures, write them to shards, some of them apart:\n"
        f"  python -m ebm shard --source {spec}{share} --out {out}/train\n"
        f"  python -m ebm shard --source {spec}{share} --split {split or 'test'} --out {out}/test\n"
        f"  python -m ebm init --data {out}/train --val {out}/test\n"
        "or let this command do it: add --shards, and --size N unless all have the same size"
    )


def split_beside(folder: str) -> str | None:
    """The split of a folder of pictures that is not for training; None where it has none."""
    for split in HELD_OUT:
        try:
            open_source(f"folder:{folder}", split)
            return split
        except DataError:  # there is no such split
            continue
    return None


def shards_of_pictures(folder: Path, size: int | None) -> tuple[str, str]:
    """Writes shards of a folder's pictures beside it: those to train on, and those held out. Returns where."""
    spec, split = f"folder:{folder}", split_beside(str(folder))
    source = open_source(spec)
    if split is None:
        share = share_of(len(source))
        sources = [select(source, holdout=(share, part)) for part in ("train", "test")]
    else:
        sources = [source, open_source(spec, split)]
    paths = [f"{folder}-shards/{part}" for part in ("train", "test")]
    for one, path in zip(sources, paths, strict=True):
        tell(write_shards(one, path, conversion=Conversion(size=size)), path)
    return paths[0], paths[1]


def share_of(samples: int) -> float:
    """The share of images to hold out. Raises ConfigError where there are too few."""
    if samples < 2 * ENOUGH:
        raise ConfigError(f"{samples} images are too few to hold some out: {2 * ENOUGH} are needed, or give --val")
    return min(0.5, max(SHARE, ENOUGH / samples))


def held_out(manifest: Manifest, where: str) -> tuple[str, str]:
    """Shards to train on and shards held out: those beside `where`, or about a tenth of them, written beside it by a
    hash of their keys, so that all classes are in both."""
    check_for_training(manifest, where)
    if is_remote(where):
        raise ConfigError(f"{where}: give held-out shards, as --val; remote shards are not written anew")
    directory = Path(where).parent if where.endswith(".json") else Path(where)
    if directory.name == "train":
        for split in HELD_OUT:
            if (directory.parent / split / FILE_NAME).is_file():
                return where, str(directory.parent / split)
    paths = f"{directory}-train", f"{directory}-heldout"
    share, size = share_of(manifest.samples), sum(shard.bytes for shard in manifest.shards)
    if size > MAX_COPY:
        raise ConfigError(
            f"{where}: {size / 1e9:.1f} GB are more than is written again to hold images out; write held-out shards "
            f"with `python -m ebm shard --source ... --holdout {SHARE} --split test`, and give them as --val"
        )
    source = open_source(f"shards:{where}")
    for path, split in zip(paths, ("train", "test"), strict=True):
        part = select(source, holdout=(share, split))
        if not (Path(path) / FILE_NAME).is_file():
            write_shards(part, path)
        elif load_manifest(path).samples != len(part):
            raise ConfigError(f"{path} has other images than {where}: remove it, or give --val")
    print(f"held out: {share:.0%} of {where}, by a hash of their names; both parts are written to shards of their own")
    return paths


def check_for_training(manifest: Manifest, where: str) -> None:
    """Raises ConfigError for shards of a split that is not for training."""
    if manifest.source is not None and manifest.source.split in HELD_OUT:
        raise ConfigError(
            f"--data {where}: these shards are the split {manifest.source.split}, which is for scores; give those of "
            f"the split train as --data, and these as --val"
        )


def described(train: str, heldout: str, name: str) -> Data:
    """Says what the data are. Raises ConfigError where no recipe is known for them."""
    ours, theirs = load_manifest(train), load_manifest(heldout)
    check_for_training(ours, train)
    if len(ours.shape) == 1:
        raise ConfigError(
            f"{train}: {describe(ours.shape)}; the recipes here are for images. For vectors begin with "
            "configs/four_peaks.yaml, data.source=null, and your data.shards and data.shape"
        )
    if ours.shape != theirs.shape:
        raise ConfigError(f"--val {heldout}: {describe(theirs.shape)}, but the data are {describe(ours.shape)}")
    print(f"to train: {ours.samples} {describe(ours.shape)} in {train}")
    print(f"held out: {theirs.samples} in {heldout}")
    gpu = choose_device().type == "cuda"
    return Data(free_name(name), train, heldout, ours.shape, ours.samples, gpu)


# The config


def write_config(data: Data, out: Path, minutes: float) -> None:
    """Measures what a step takes, writes the config, and says what comes next."""
    choices = recipe(data)
    print(f"measuring {TRIAL_STEPS} steps on this machine ...", flush=True)
    step_s, precision = measured(choices, data.gpu)
    settings = {choice.key: choice.value for choice in choices}
    panel_s = panel_seconds(settings["sampler.num_steps"] * settings["train.batch_size"], step_s)
    steps = steps_for(minutes, step_s, panel_s)
    took = (steps * step_s + PANELS * panel_s) / 60
    choices += [precision, *schedule(steps)]
    command = f"python -m ebm train --config {shlex.quote(str(out))}"
    head = [
        command,
        f"Written by ebm init for {data.train}: {data.samples} {describe(data.shape)}.",
        f"Measured on this machine: {step_s:.2g} s a step, so about {took:.0f} minutes for {steps} steps. The result",
        "is not known yet. docs/your_images.md says how to choose the numbers below.",
    ]
    replace(out, to_yaml(choices, head).encode())
    load_config(out)
    print(f"{step_s:.2g} s a step: about {took:.0f} minutes for {steps} steps")
    if took > 1.2 * minutes:
        print(f"fewer than {steps} steps show nothing, so this is more than --minutes {minutes:g}")
    print(f"wrote {out}, with the reason for each value\nnext: {command}")


def panel_seconds(chain_steps: int, step_s: float) -> float:
    """About how long a panel's fresh chains take, where a step of training takes `chain_steps` steps of single chains
    and `step_s` seconds, nearly all of them for chains."""
    return PANEL_IMAGES * TrackingConfig().sample_steps / chain_steps * step_s


def measured(choices: list[Choice], gpu: bool) -> tuple[float, Choice]:
    """Seconds a step, and the precision in which it is that fast."""
    key = "train.mixed_precision"
    if gpu:
        return trial(choices, "bf16"), Choice(
            key, "bf16", "half the memory and twice the speed; chains stay in float32"
        )
    full, half = trial(choices, "no"), trial(choices, "bf16")
    if half * BF16_GAIN < full:
        return half, Choice(key, "bf16", f"{full / half:.1f} times as fast as float32 here; chains stay in float32")
    return full, Choice(key, "no", f"bf16 is {full / half:.1f} times as fast on this machine's CPU")


def trial(choices: list[Choice], precision: str) -> float:
    """Trains some steps in a directory that is removed. Returns the median time of a step."""
    short = {
        "train.mixed_precision": precision,
        "train.steps": TRIAL_STEPS,
        "train.log_every": 1,
        "tracking.wandb": "disabled",
        "tracking.num_samples": 2,
        "tracking.sample_steps": 1,
    }
    environment = {name: value for name, value in os.environ.items() if name != "EBM_EXIT_FILE"}  # of another run
    with tempfile.TemporaryDirectory(prefix="ebm-init-") as place:
        config = Path(place, "trial.yaml")
        config.write_text(to_yaml(choices, []))
        command = [sys.executable, "-m", "ebm", "train", "--config", str(config), f"run.dir={place}/run"]
        command += [f"{key}={value}" for key, value in short.items()]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ConfigError(f"a trial of {TRIAL_STEPS} steps failed:\n{done.stderr.strip()[-2000:]}")
        rows = [json.loads(line) for line in Path(place, "run", "metrics.jsonl").read_text().splitlines()]
    return median(row["perf/step_s"] for row in rows[FIRST:])
