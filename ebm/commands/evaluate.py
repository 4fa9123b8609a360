"""python -m ebm evaluate RUN [--metrics frechet,classes,ood,energy,accuracy,likelihood] [--json FILE]"""

import json
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ebm import evaluation
from ebm.config import DataConfig
from ebm.data import Access
from ebm.data.reader import read_all
from ebm.data.shards import ensure_shards
from ebm.data.sources import DENSITIES, known_density
from ebm.errors import ConfigError, DataError
from ebm.inference.pictures import landscape
from ebm.inference.run import TrainedRun, open_run
from ebm.samplers import fresh_chains

METRICS = ("frechet", "classes", "ood", "energy", "accuracy", "likelihood")
OF_IMAGES = ("frechet", "classes", "ood")
OF_SOME_RUNS = ("accuracy", "likelihood")  # left out of the others without a word


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, or one checkpoint inside it")
    parser.add_argument("--metrics", help=f"some of {','.join(METRICS)} (default: all that the run supports)")
    parser.add_argument("--json", metavar="FILE", help="write the values to this file as one object")
    parser.add_argument("--num", type=int, default=2000, help="fresh chains (default 2000)")
    parser.add_argument("--steps", type=int, default=200, help="steps of a fresh chain (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of fresh chains and made-up images (default 0)")


def run(arguments) -> int:
    names = METRICS if arguments.metrics is None else tuple(arguments.metrics.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"--metrics {arguments.metrics}: {unknown[0]!r} is none of {', '.join(METRICS)}")
    if arguments.num < 2 or arguments.steps < 1:
        raise ConfigError(f"--num {arguments.num} must be at least 2 and --steps {arguments.steps} at least 1")
    trained = open_run(arguments.run)
    sets = Sets(trained, arguments.num, arguments.steps, arguments.seed)
    values = {}
    for name in names:
        problem = sets.problem_with(name)
        if problem is None:
            values |= sets.measure(name)
        elif arguments.metrics is None and name not in OF_SOME_RUNS:
            print(f"{name}: left out: {problem}")
        elif arguments.metrics is not None:
            raise problem
    if arguments.json:
        _write(Path(arguments.json), values)
    print(f"{trained.checkpoint}: {sets}")
    print(table(values))
    return 0


def table(values: dict) -> str:
    """A line a value; the shares of the classes, of which there are many, on one line a set, in per cent."""
    lines, shares = {}, {}
    for key, value in values.items():
        name, is_share, _ = key.partition("_share_")
        if is_share:
            shares.setdefault(f"{name}_shares (%)", []).append(f"{100 * value:.1f}")
        else:
            lines[key] = str(value) if isinstance(value, int) else f"{value:.4f}"
    width = max(map(len, [*lines, *shares]), default=0)
    return "\n".join(
        [f"{key:<{width}}  {value:>10}" for key, value in lines.items()]
        + [f"{key:<{width}}  {' '.join(row)}" for key, row in shares.items()]
    )


def _write(file: Path, values: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {file}: {error}") from error


class Sets:
    """The sets of images of a run that are measured, each uint8 (N, C, H, W), read or drawn when first asked for."""

    def __init__(self, trained: TrainedRun, num: int, steps: int, seed: int):
        self.trained, self.config = trained, trained.config
        self.num, self.steps, self.seed = num, steps, seed

    @cached_property
    def train(self) -> tuple[Tensor, Tensor | None]:
        data = self.config.data
        return _read(data.shards, data.source, "train", data)

    @cached_property
    def heldout(self) -> tuple[Tensor, Tensor | None] | None:
        evaluate = self.config.evaluate
        if evaluate.shards is None:
            return None
        return _read(evaluate.shards, evaluate.source, "test", self.config.data)

    @cached_property
    def chains(self) -> dict[str, Tensor]:
        """`persistent`, all of the replay buffer, where the run has one; `fresh`, from noise."""
        trained, config = self.trained, self.config
        sets = {}
        if any(trained.checkpoint.glob("stream_*.safetensors")):
            sets["persistent"] = self._as_data(trained.persistent_chains(), "persistent chains")
        x, _ = fresh_chains(
            trained.energy,
            config.sampler,
            config.data.shape,
            self.num,
            self.steps,
            seed=self.seed,
            device=trained.device,
            num_classes=config.energy.num_classes,
        )
        return sets | {"fresh": self._as_data(x, f"fresh chains of {self.steps} steps")}

    def _as_data(self, x: Tensor, what: str) -> Tensor:
        return evaluation.to_levels(x, what) if self.of_images else x.cpu()

    def _as_states(self, data: Tensor) -> Tensor:
        return evaluation.from_levels(data) if self.of_images else data

    @property
    def of_images(self) -> bool:
        return len(self.config.data.shape) == 3

    @cached_property
    def classifier(self) -> evaluation.Classifier:
        return evaluation.train_classifier(*self.train)

    def problem_with(self, metric: str) -> ConfigError | DataError | None:
        """Why the run does not support a metric."""
        shape, source = list(self.config.data.shape), self.config.data.source
        if metric in OF_IMAGES and not self.of_images:
            return ConfigError(f"data.shape={shape}: {metric} is of images; use --metrics energy, or likelihood")
        if metric == "likelihood" and source not in DENSITIES:
            return ConfigError(
                f"data.source={source}: likelihood needs a density that is known, on the plane; use one of "
                f"{', '.join(DENSITIES)}"
            )
        if metric == "accuracy" and not self.config.energy.num_classes:
            return ConfigError("energy.num_classes=None: accuracy is of class-conditional energies")
        if metric == "accuracy" and (self.heldout is None or self.heldout[1] is None):
            return ConfigError(f"evaluate.shards={self.config.evaluate.shards}: accuracy needs labelled held-out data")
        if metric in ("frechet", "ood") and self.heldout is None:
            return ConfigError(
                f"evaluate.shards=None: {metric} needs held-out images; set evaluate.shards in the run's config.yaml "
                "to a directory of shards (and evaluate.source to have them written)"
            )
        if metric in ("frechet", "classes") and self.train[1] is None:
            return DataError(
                f"data.shards={self.config.data.shards}: {metric} trains a classifier, which needs images of two or "
                "more classes with a label each; shard a labelled source, or use --metrics ood,energy"
            )
        return None

    def measure(self, metric: str) -> dict:
        if metric == "frechet":
            return evaluation.frechet_metrics(self.classifier, self.train[0], self.heldout[0], self.chains)
        if metric == "classes":
            labelled = self.heldout if self.heldout is not None and self.heldout[1] is not None else None
            return evaluation.class_metrics(self.classifier, int(self.train[1].max()) + 1, self.chains, labelled)
        if metric == "ood":
            return evaluation.ood_metrics(self._energies, self.heldout[0], self.seed)
        if metric == "likelihood":
            return self._likelihood()
        if metric == "accuracy":
            images, labels = self.heldout
            predicted = self.trained.class_energies(self._as_states(images)).argmin(1)
            return {"accuracy/heldout": float((predicted == labels).double().mean())}
        heldout = {} if self.heldout is None else {"heldout": self.heldout[0]}
        return evaluation.energy_metrics(self._energies, {"train": self.train[0], **heldout, **self.chains})

    def _likelihood(self) -> dict:
        """The learned density beside the true one, in numbers; and in RUN/landscape.png, with the fresh chains."""
        energy, modes = known_density(self.config.data.source)
        temperature, file = self.trained.temperature, self.trained.directory / "landscape.png"
        values = evaluation.likelihood_metrics(
            evaluation.density(energy), evaluation.density(self._energies, temperature), modes
        )
        near = 6.0
        true, learned = (evaluation.density(e, t, near) for e, t in ((energy, 1.0), (self._energies, temperature)))
        panels = {"true": (true, None), "learned": (learned, None), "chains": (learned, self.chains["fresh"].numpy())}
        Image.fromarray(landscape({name: (d.energies, x) for name, (d, x) in panels.items()}, near)).save(file)
        print(f"the true density, the learned one, and fresh chains -> {file}")
        return values

    def _energies(self, data: Tensor) -> Tensor:
        """Of images, uint8 (N, C, H, W), or vectors (N, D)."""
        values = torch.cat([self.trained.energies(self._as_states(block)) for block in data.split(4096)])
        if not values.isfinite().all():
            raise DataError(f"{self.trained.checkpoint}: gives non-finite energies; evaluate an earlier checkpoint")
        return values

    def __str__(self) -> str:
        """What was read or drawn so far."""
        read = [(name, self.__dict__[name][0]) for name in ("train", "heldout") if self.__dict__.get(name) is not None]
        chains = self.__dict__.get("chains", {}).items()
        return ", ".join(f"{len(images)} {name}" for name, images in [*read, *chains])


def _read(shards: str, source: str | None, split: str, data: DataConfig) -> tuple[Tensor, Tensor | None]:
    """All images (N, C, H, W) and labels (N,) of a set; None where there are not two or more classes, each labelled."""
    ensure_shards(shards, source, split)
    blocks = list(read_all(shards, data.shape, access=Access.of(data)))
    if not blocks:
        raise DataError(f"{shards}: holds no images; write them again with python -m ebm shard")
    images, labels = (torch.cat([block[part] for block in blocks]) for part in (0, 1))
    return images, labels if labels.min() >= 0 and labels.max() > 0 else None
