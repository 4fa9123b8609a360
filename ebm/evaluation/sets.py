"""The sets of samples that a run is measured by: its data, held-out data, and its chains."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ebm.config import Config, DataConfig
from ebm.data import Access, load_manifest
from ebm.data.decode import describe
from ebm.data.manifest import Manifest, check_files, is_remote, manifest_path
from ebm.data.reader import read_all
from ebm.data.samples import SampleReader
from ebm.errors import DataError
from ebm.evaluation.classifier import Classifier, ruler_of
from ebm.evaluation.metrics import WARM, Comparison, compare
from ebm.inference.images import dequantize, to_levels, to_states
from ebm.inference.inputs import read_states
from ebm.inference.run import TrainedRun
from ebm.streams import generator, normal_

log = logging.getLogger(__name__)

MOST = 50_000  # samples of a set, evenly from all of it: ImageNet's at 64x64 would take 16 GB
FEW = 5000  # samples that are enough for a mean energy
READ_AT_ONCE = 64  # samples that lie side by side in a shard
FEW_SHARDS = 8  # shards that a few held-out samples are taken of


class Labelled(NamedTuple):
    """Samples and their classes. `labels` is None where there are not two or more classes, each sample labelled."""

    data: Tensor  # uint8 images (N, C, H, W), or float32 vectors (N, D)
    labels: Tensor | None  # (N,) int64

    @property
    def num_classes(self) -> int:
        return 0 if self.labels is None else int(self.labels.max()) + 1


class Sets:
    """Each set is read or drawn when it is first asked for, and kept on the host.

    Args:
        run: whose sets.
        num: fresh chains; `steps`: of each; `lengths`: further numbers of steps after which they are looked at.
        seed: of chains, subsets and noise.
        most: samples of each set of data, and persistent chains, at most.
        ruler_directory: where the ruler's classifier is kept; None: not kept.
        moved: hears how many chain steps were done.
    """

    def __init__(
        self,
        run: TrainedRun,
        *,
        num: int,
        steps: int,
        lengths: Sequence[int] = (),
        seed: int = 0,
        most: int = MOST,
        ruler_directory: Path | None = None,
        moved: Callable[[int], None] | None = None,
    ):
        self.run, self.num, self.steps, self.lengths, self.seed = run, num, steps, sorted(set(lengths)), seed
        self.most, self._ruler_directory, self._moved = most, ruler_directory, moved

    @property
    def of_images(self) -> bool:
        return len(self.run.shape) == 3

    @property
    def noise(self) -> float:
        """Standard deviation of the noise that chains keep from the data they were trained on: none at the low
        temperatures at which they run down to clean images."""
        return self.run.chain_noise if self.run.temperature >= WARM else 0.0

    @cached_property
    def train(self) -> Labelled:
        return _labelled(*read_evaluation_data(self.run.config, "train", self.most))

    @cached_property
    def heldout(self) -> Labelled | None:
        if self.run.config.evaluate.shards is None:
            return None
        return _labelled(*read_evaluation_data(self.run.config, "test", self.most))

    @cached_property
    def data_states(self) -> Tensor:
        """States of training data as training saw them: with the run's noise, in the chains' bounds."""
        x = to_states(self.train.data[:: -(-len(self.train.data) // FEW)])
        x = x + self.run.data_noise * normal_(torch.empty_like(x), generator(self.seed, "evaluate/data"))
        bounds = self.run.config.sampler.bounds
        return x if bounds is None else x.clamp(*bounds)

    def with_run_noise(self, images: Tensor, purpose: str) -> Tensor:
        """uint8 images as states, dequantised and with the noise of the run's data: what its density is of."""
        x = dequantize(images, generator(self.seed, f"evaluate/dequantise/{purpose}"))
        return x.add_(
            normal_(torch.empty_like(x), generator(self.seed, f"evaluate/{purpose}")), alpha=self.run.data_noise
        )

    @cached_property
    def persistent(self) -> Tensor | None:
        """States (n, *shape) of the replay buffer; None where training keeps none, or where they move over the noise
        levels, of which few are at the lowest."""
        if self.run.persistent is None or self.run.config.sampler.kind == "noise_levels":
            return None
        return self.run.persistent.spread(self.most)

    @cached_property
    def of_lengths(self) -> tuple[dict[int, Tensor], Tensor | None]:
        """Fresh chains after each of `lengths` and after `steps` steps, (num, *shape), and their labels (num,)."""
        asked = [self.steps, *self.lengths]
        return self.run.chains(self.num, asked, seed=self.seed, moved=self._moved)

    @property
    def fresh(self) -> Tensor:
        return self.of_lengths[0][self.steps]

    @property
    def chains(self) -> dict[str, Tensor]:
        """States by name: persistent, where there are any, and fresh."""
        persistent = {} if self.persistent is None else {"persistent": self.persistent}
        return persistent | {"fresh": self.fresh}

    @cached_property
    def ruler(self) -> Classifier:
        """The classifier whose features are compared, of all runs on the same data."""
        images, labels = self.train
        assert labels is not None, "the caller checks that there are labels"
        shards = self.run.config.data.shards
        beside = None if is_remote(shards) else manifest_path(shards).parent
        return ruler_of(images, labels, self._ruler_directory, beside)

    @cached_property
    def comparison(self) -> Comparison:
        """All chains beside data with the noise that chains keep."""
        states = self.chains | {length_name(length): self.of_lengths[0][length] for length in self.lengths}
        features = {name: self.ruler.features(self.as_data(x, f"{name} chains")) for name, x in states.items()}
        assert self.heldout is not None, "the caller checks that there is held-out data"
        train, heldout = (self.ruler.features(self.noisy(part.data)) for part in (self.train, self.heldout))
        return compare(train, heldout, features, self.seed)

    def as_data(self, x: Tensor, what: str) -> Tensor:
        """States of chains as data: images as levels, uint8; vectors as they are. Raises DataError, which calls them
        `what`, where one is not finite."""
        if self.of_images:
            return to_levels(x, what)
        if not x.isfinite().all():
            raise DataError(f"{what} hold non-finite values; evaluate an earlier checkpoint of the run")
        return x

    def noisy(self, data: Tensor) -> Tensor:
        """Data with the noise that chains keep: what they are compared with."""
        if not self.noise:
            return data
        x = to_states(data)
        noise = normal_(torch.empty_like(x), generator(self.seed, "evaluate/noise"))
        return self.as_data(x + self.noise * noise, "noisy data")

    def energies(self, data: Tensor) -> Tensor:
        """E, (N,) float32, of data or of states. Raises DataError where one is not finite."""
        values = torch.cat([self.run.energy(to_states(data[i : i + 4096])) for i in range(0, len(data), 4096)])
        if not values.isfinite().all():
            raise DataError(f"{self.run.checkpoint}: gives non-finite energies; evaluate an earlier checkpoint")
        return values

    def __str__(self) -> str:
        """What was read or drawn so far."""
        found = {name: self.__dict__.get(name) for name in ("train", "heldout")}
        counts = [f"{len(part.data)} {name}" for name, part in found.items() if part is not None]
        if self.__dict__.get("persistent") is not None:
            counts.append(f"{len(self.__dict__['persistent'])} persistent")
        if "of_lengths" in self.__dict__:
            counts.append(f"{self.num} fresh")
        return ", ".join(counts)


def length_name(length: int) -> str:
    """What fresh chains of so many steps are called."""
    return f"length {length}"


def _labelled(data: Tensor, labels: Tensor) -> Labelled:
    return Labelled(data, labels if labels.min() >= 0 and labels.max() > 0 else None)


def read_evaluation_data(config: Config, split: Literal["train", "test"], most: int) -> tuple[Tensor, Tensor]:
    """Samples and labels of a run's training data, or of its held-out data, up to `most` of them.

    Nothing is written: a config may come from a stranger. Where shards that training writes from a source are not
    there, the source itself is read.
    """
    section = config.data if split == "train" else config.evaluate
    shards, source = section.shards, section.source
    assert shards is not None, "the caller checks evaluate.shards"
    if source is not None and _are_missing(shards):
        log.info("no shards in %s: reading the %s split of %s instead", shards, split, source)
        return read_states(source, config, split, most)
    return read_spread(shards, config.data, most)


def few_heldout(config: Config, count: int) -> tuple[Tensor, Tensor]:
    """`count` held-out samples, or all, and their labels, as quickly as they can be had: evenly from up to FEW_SHARDS
    shards, or from the first one where they are remote. Raises DataError."""
    shards, source = config.evaluate.shards, config.evaluate.source
    assert shards is not None, "the caller checks evaluate.shards"
    if source is not None and _are_missing(shards):
        return read_states(source, config, "test", count)
    manifest = _load_fitting(shards, config.data)
    reader = SampleReader(manifest, tuple(config.data.shape), config.data.max_pixels)
    total, opened = len(manifest.shards), 1 if manifest.remote else min(len(manifest.shards), FEW_SHARDS)
    decoded = []
    for shard in sorted({i * total // opened for i in range(opened)}):
        samples = manifest.shards[shard].samples
        each = min(-(-count // opened), samples)
        for start in (k * samples // each for k in range(each)):
            decoded += [reader.decode(shard, sample) for sample in reader.samples(shard, start, start + 1)]
    if not decoded:
        raise DataError(f"{shards}: holds no samples; give data that does")
    kept = decoded[:count]
    return torch.stack([torch.from_numpy(sample[0]) for sample in kept]), torch.tensor([sample[1] for sample in kept])


def _are_missing(shards: str) -> bool:
    return not is_remote(shards) and not manifest_path(shards).is_file()


def _load_fitting(shards: str, data: DataConfig) -> Manifest:
    """Raises DataError where the shards are of another shape than the run, which can't change any more."""
    manifest = load_manifest(shards, Access.of(data))
    if manifest.shape != tuple(data.shape):
        raise DataError(
            f"{shards}: holds {describe(manifest.shape)}, and the run is one of {describe(tuple(data.shape))}: these "
            "are other data than it was trained on; set evaluate.shards in its config.yaml to held-out data of its "
            "own, or to null"
        )
    return manifest


def read_spread(shards: str, data: DataConfig, most: int) -> tuple[Tensor, Tensor]:
    """All samples and labels of a set of shards; of more than `most`, runs of neighbours evenly from each shard, since
    shards may be sorted by class."""
    manifest = _load_fitting(shards, data)
    if manifest.samples <= most:
        blocks = list(read_all(manifest, data.shape, max_pixels=data.max_pixels))
        images, labels = (torch.cat([block[part] for block in blocks]) for part in (0, 1))  # type: ignore[misc]
        return images, labels
    log.info("%s: %d of %d samples are used, evenly from all shards", shards, most, manifest.samples)
    check_files(manifest)
    reader = SampleReader(manifest, tuple(data.shape), data.max_pixels)
    decoded = []
    for shard, entry in enumerate(manifest.shards):
        runs = -(-entry.samples * most // manifest.samples // READ_AT_ONCE) or 1
        for k in range(runs):
            start = k * entry.samples // runs // READ_AT_ONCE * READ_AT_ONCE
            stop = min(start + READ_AT_ONCE, entry.samples)
            decoded += [reader.decode(shard, sample) for sample in reader.samples(shard, start, stop)]
    kept = [i * len(decoded) // most for i in range(most)] if len(decoded) > most else range(len(decoded))
    images = torch.stack([torch.from_numpy(decoded[i][0]) for i in kept])
    return images, torch.tensor([decoded[i][1] for i in kept])
