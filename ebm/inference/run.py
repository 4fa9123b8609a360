"""A trained run, opened to score, sample and evaluate: what `ebm.load` gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebm.config import Config, load_config
from ebm.config.losses import DenoisingConfig, MultilevelDenoisingConfig
from ebm.config.samplers import LangevinConfig, NoiseLevelsConfig, OwnSamplerConfig
from ebm.energies import FoldedEnergy, build_energy, marginal_energy, split_noise_level
from ebm.errors import ConfigError, DataError
from ebm.losses import log_normaliser
from ebm.runtime import checkpoint
from ebm.runtime.distributed import set_numerics
from ebm.samplers import Engine, LangevinDynamics, advance, chain_shape, chains_of_lengths, cold_states
from ebm.samplers.base import MixtureStart
from ebm.samplers.factory import sampler_in_use
from ebm.streams import stream_sources

log = logging.getLogger(__name__)

BLOCK = 512  # states computed at a time
MAX_INITIAL = 0.05  # weight of the initial weights in the averaged ones, above which it is said


@dataclass(frozen=True)
class TrainedRun:
    """The energy of a training run, p(x) ~ exp(-E(x) / T), with its averaged weights in float32.

    States are float32: images (B, C, H, W) in [-1, 1] (in `config.sampler.bounds`, where chains go further), or vectors
    (B, D). They are given and returned on the host unless they come from another device; the network computes on
    `device`, a block at a time.
    """

    config: Config  # of the run, with the step size that training left
    network: FoldedEnergy  # the energy as a function of states on `device`
    checkpoint: Path
    device: torch.device
    persistent: PersistentChains | None  # None where training keeps none
    mixture: MixtureStart | None = None  # where the chains of sampler.start=mixture begin

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.checkpoint.parent.parent

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a state: (C, H, W) of an image, (D,) of a vector."""
        return tuple(self.config.data.shape)

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional energy; None of any other."""
        return self.config.energy.num_classes

    @property
    def step(self) -> int:
        """The optimizer step of the checkpoint."""
        return checkpoint.step_of(self.checkpoint)

    @property
    def temperature(self) -> float:
        """T of the learned density exp(-E / T): the one that the chains sample, or the objective's."""
        loss, sampler = self.config.loss, self.config.sampler
        return loss.temperature if loss.negatives is None else sampler.implied_temperature

    @property
    def data_noise(self) -> float:
        """Standard deviation of the noise whose convolution with the data the energy learns: data.noise_std, with the
        noise of a denoising objective, or the lowest noise level of energy.noise_conditional."""
        loss, own = self.config.loss, self.config.data.noise_std
        if self.config.noise_range is not None:
            return math.hypot(own, self.config.noise_range.sigma_min)
        return math.hypot(own, loss.sigma) if isinstance(loss, DenoisingConfig | MultilevelDenoisingConfig) else own

    @property
    def chain_noise(self) -> float:
        """Standard deviation of the noise of the data that fresh chains keep: `data_noise`, or 0 where their sampler
        takes it away."""
        sampler = self.config.fresh_sampler
        return 0.0 if isinstance(sampler, OwnSamplerConfig) and sampler.denoises else self.data_noise

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """E(x), (B,) float32 on the device of `x`, for states (B, *shape) and, of a class-conditional run, labels (B,).

        Without labels a class-conditional run gives the energy of x whatever its class, -log sum_y exp(-E(x, y)).
        Raises ValueError where the shape is not the run's.
        """
        return self._in_blocks(torch.no_grad()(self._function(labels)), x, labels)

    def marginal(self, x: Tensor) -> Tensor:
        """-log sum_y exp(-E(x, y)) of a class-conditional run, (B,) on `device`, for states there; differentiable."""
        return marginal_energy(self.network.class_energies(x))

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y of a class-conditional run, (B, num_classes) float32 on the device of `x`."""
        return self._in_blocks(torch.no_grad()(self.network.class_energies), x, None)

    def score(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The score of the learned density, -dE/dx / T, (B, *shape) float32 on the device of `x`.

        Raises ConfigError where the run's temperature is 0: its chains take no noise, and there is no density.
        """
        if self.temperature <= 0:
            raise ConfigError(
                "sampler.noise_scale=0 has temperature 0, at which exp(-E / T) has no score; use the gradient of "
                "run.network, or a run with noise"
            )
        return self.gradient(x, labels).div_(-self.temperature)

    def gradient(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """dE/dx, (B, *shape) float32 on the device of `x`."""
        function = self._function(labels)

        def gradient(x: Tensor, *labels: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                return torch.autograd.grad(function(x, *labels).sum(), x)[0]

        return self._in_blocks(gradient, x, labels)

    def log_normaliser(self, data: Tensor, seed: int = 0) -> float:
        """C with -log p(x) = E(x) + C in nats, for a run trained by dual score matching, whose energies at the highest
        level of noise tell it: `ebm.losses.log_normaliser` of states `data`. Raises ConfigError for another run."""
        sampler = self.config.sampler
        if not isinstance(sampler, NoiseLevelsConfig):
            raise ConfigError(f"loss.kind={self.config.loss.kind}: log_normaliser is of runs by dual_score_matching")
        function = self._function(None)

        def energies(z: Tensor) -> Tensor:
            return torch.cat([function(block) for block in torch.split(z, BLOCK)])

        x, noise = data.to(self.device, torch.float32), stream_sources(seed, "normaliser", device=self.device)
        return float(log_normaliser(energies, x, sampler.sigma_max**2, generator=noise))

    def denoised(self, x: Tensor) -> Tensor:
        """x - sigma^2 dE/dx / T with sigma = `data_noise`: the mean of the clean data given their noisy state x
        (Miyasawa 1961; Robbins 1956), where the energy is the density of data with that noise. (B, *shape)."""
        return x + self.data_noise**2 * self.score(x)

    def sample(
        self, n: int, *, steps: int | None = None, seed: int = 0, labels: int | Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """`n` fresh chains of `steps` steps (default: tracking.sample_steps), from noise, by the run's own sampler:
        (n, *shape) float32 on the host, images in [-1, 1] or what sampler.bounds says.

        A function of `seed`; the first chains do not depend on `n`. `labels`: a class for all, or one a chain; the
        chains of a class-conditional run go through the classes in turn without. Raises ConfigError for labels that
        the run does not have.
        """
        steps = self.config.tracking.sample_steps if steps is None else steps
        return self.chains(n, [steps], seed=seed, labels=labels)[0][steps]

    def chains(
        self,
        n: int,
        lengths: Sequence[int],
        *,
        seed: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,
        moved: Callable[[int], None] | None = None,
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Fresh chains after each of `lengths` steps, {length: (n, *shape)}, and their labels (n,), on the host;
        `moved` hears how many chain steps were done."""
        if n < 1 or min(lengths) < 0:
            raise ConfigError(f"{n} chains of {min(lengths)} steps: ask for 1 or more of 0 or more")
        states, given = chains_of_lengths(
            self.network,
            self.config.fresh_sampler,
            self.shape,
            n,
            lengths,
            seed=seed,
            device=self.device,
            num_classes=self.num_classes,
            labels=self._labels(labels, n),
            mixture=self.mixture,
            moved=moved,
        )
        return {length: x.cpu() for length, x in states.items()}, None if given is None else given.cpu()

    def continued(self, x: Tensor, steps: int, *, seed: int = 0, labels: Tensor | None = None) -> Tensor:
        """The run's chains from states `x` (B, *shape) on, `steps` steps later, on the device of `x`."""
        if steps == 0:
            return x
        if self.num_classes and labels is None:
            labels = torch.arange(len(x)) % self.num_classes
        y = () if labels is None else (labels.to(self.device),)
        engine, noise = Engine(self.network, capture=False), stream_sources(seed, "chain", device=self.device)
        states = advance(engine, self.config.sampler, x.to(self.device), *y, num_steps=steps, generator=noise)
        return states.to(x.device)

    def dynamics(self) -> LangevinDynamics:
        """A sampler to use from Python, with the energy of this run and the first step size, the noise, the clamp, the
        bounds and the boundary of its chains. It starts at N(0, I) inside the bounds, or at `initial_points`.

        Raises ConfigError where the run's own chains are no Langevin chains."""
        sampler = self.config.sampler
        if not isinstance(sampler, LangevinConfig):
            raise ConfigError(f"sampler.kind={sampler.kind}: only runs with langevin chains have such a sampler")
        return LangevinDynamics(
            self.network,
            step_size=sampler.step_size,
            noise_scale=sampler.noise,
            grad_clamp=sampler.grad_clamp,
            bounds=sampler.bounds,
            boundary=sampler.boundary,
        )

    def _labels(self, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
        if labels is None:
            return None
        if not self.num_classes:
            raise ConfigError("labels: the run has none (energy.num_classes=null); sample without")
        each = torch.as_tensor(labels, dtype=torch.int64).cpu().flatten()
        each = each.expand(n) if each.numel() == 1 else each
        if len(each) != n or not ((each >= 0) & (each < self.num_classes)).all():
            raise ConfigError(f"labels: must be one or {n} numbers from 0 to {self.num_classes - 1}")
        return each

    def _function(self, labels: Tensor | None) -> Callable[..., Tensor]:
        if not self.num_classes or labels is not None:
            return self.network
        return self.marginal

    def _in_blocks(self, function: Callable[..., Tensor], x: Tensor, labels: Tensor | None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"states of shape {tuple(x.shape)}: must be (B, {', '.join(map(str, self.shape))})")
        parts = []
        for start in range(0, max(len(x), 1), BLOCK):
            y = () if labels is None else (labels[start : start + BLOCK].to(self.device),)
            block = x[start : start + BLOCK].to(self.device, torch.float32)
            parts.append(function(block, *y).to(x.device))
        return torch.cat(parts)


@dataclass(frozen=True)
class PersistentChains:
    """The states of a replay buffer, read from a checkpoint's files when asked for: never whole in memory or on a
    device. The files are open from the start, so that training may remove the checkpoint meanwhile."""

    files: tuple[safe_open, ...]  # one a stream
    names: tuple[str, ...]  # of the files, for messages
    slots: int  # chains a file
    config: Config

    def __len__(self) -> int:
        return self.slots * len(self.files)

    def take(self, indices: Tensor) -> Tensor:
        """The chains of these ascending numbers, (n, *shape) float32 on the host; of tempered ones the cold replicas.
        Chain i is in slot i % slots of stream i // slots."""
        parts = [cold_states(self.config.sampler, part) for part in self._parts("x", indices)]
        return torch.cat(parts).float() if parts else torch.empty(0, *self.config.data.shape)

    def labels(self, indices: Tensor) -> Tensor | None:
        """The classes of these chains, (n,) int64, -1 for one that was never drawn; None where chains have no class."""
        if "labels" not in self.files[0].keys():  # noqa: SIM118 - a file, not a dictionary
            return None
        parts = self._parts("labels", indices)
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def samples(self) -> Tensor:
        """The numbers of the chains that sample the run's density, ascending: all of them, or, where chains move over
        noise levels, those at the lowest."""
        everything = torch.arange(len(self))
        sampler = self.config.sampler
        if not isinstance(sampler, NoiseLevelsConfig):
            return everything
        middle = sum(sampler.log_variances[:2]) / 2
        blocks = (everything[start : start + BLOCK] for start in range(0, len(self), BLOCK))
        levels = [split_noise_level(part)[1] for block in blocks for part in self._parts("x", block)]
        return everything[torch.cat(levels) < middle]

    def spread(self, most: int) -> Tensor:
        """Up to `most` of `samples`, evenly over streams and slots, (n, *shape) float32 on the host."""
        numbers = self.samples()
        count = min(most, len(numbers))
        return self.take(numbers[torch.arange(count) * len(numbers) // max(count, 1)])

    def _parts(self, key: str, indices: Tensor) -> list[Tensor]:
        """The rows of a tensor for ascending chain numbers, up to BLOCK slots of a file at a time."""
        parts = []
        places = indices // self.slots * self.slots + indices % self.slots // BLOCK * BLOCK  # first chain of a block
        for first in sorted(set(places.tolist())):
            number, low = divmod(first, self.slots)
            slots = indices[places == first] % self.slots
            try:
                rows = self.files[number].get_slice(key)[low : int(slots.max()) + 1]
            except (SafetensorError, OSError) as error:
                raise DataError(f"{self.names[number]}: {error}; use another checkpoint of the run") from error
            parts.append(rows[slots - low])
        return parts


def open_run(
    path: str | Path, device: str | torch.device | None = None, weights: Literal["ema", "raw"] = "ema"
) -> TrainedRun:
    """RUN, a run directory (its newest checkpoint that verifies) or one checkpoint inside it.

    `device`: what torch calls it; default: cuda where there is one. `weights`: the averaged ones ("ema"), or those of
    the optimizer ("raw"). Raises DataError where there is no run or checkpoint, ConfigError for a config or device that
    can't be used.
    """
    path, place = Path(path), device_of(device)
    one = (path / "manifest.json").is_file() and path.parent.name == "checkpoints"
    run = path.parent.parent if one else path
    if not (run / "config.yaml").is_file():
        raise DataError(f"{path}: no run directory (it has no config.yaml); give the run.dir of a training run")
    config = load_config(run / "config.yaml")
    while True:
        seen = checkpoint.checkpoints(run / "checkpoints")
        chosen = path if one else checkpoint.newest_valid(run / "checkpoints")
        if chosen is None:
            if checkpoint.checkpoints(run / "checkpoints") != seen:
                continue  # training replaced the checkpoint while it was verified
            raise DataError(f"{run}/checkpoints holds no valid checkpoint yet; train on, or lower checkpoint.every")
        try:
            if one and (problem := checkpoint.problem_of(path)):
                raise DataError(f"{path}: {problem}; use another checkpoint of the run")
            return _open(config, chosen, place, weights)
        except DataError:
            if one or chosen.is_dir():
                raise  # otherwise training removed it meanwhile, and has a newer one


def _open(config: Config, chosen: Path, device: torch.device, weights: Literal["ema", "raw"]) -> TrainedRun:
    set_numerics(device, config.train.deterministic, config.train.tf32)
    state = checkpoint.read_state(chosen)
    sampler = sampler_in_use(config.sampler, state.adapted_step, state.divergence["step_scale"])
    config = config.model_copy(update={"sampler": sampler})
    energy = build_energy(config.energy, config.data.shape, config.run.seed)
    name = {"ema": "ema", "raw": "model"}[weights]
    energy.load_state_dict(checkpoint.read_tensors(chosen, name, energy.state_dict()))
    if weights == "ema" and (share := config.optim.initial_share(state.step)) > MAX_INITIAL:
        log.warning(initial_weights(share, state.step))
    network, persistent = FoldedEnergy(energy.to(device)).refresh(), _persistent(config, chosen)
    return TrainedRun(config, network, chosen, device, persistent, _mixture(config, chosen, device))


def initial_weights(share: float, step: int) -> str:
    """What to say of averaged weights in which the initial ones have this share."""
    return (
        f"the averaged weights of step {step} are still {share:.0%} the initial ones: train longer, lower "
        "optim.ema_decay, or take the last weights (--weights raw)"
    )


def _mixture(config: Config, path: Path, device: torch.device) -> MixtureStart | None:
    if config.sampler.start != "mixture":
        return None
    mixture = MixtureStart.empty(math.prod(config.data.shape), config.classes_of_chains, config.sampler.bounds)
    tensors = checkpoint.read_tensors(path, "start", mixture.tensors())
    return MixtureStart(**tensors, bounds=mixture.bounds).to(device)


def _persistent(config: Config, path: Path) -> PersistentChains | None:
    """Open the chains that the config says there are: one file a stream. Raises DataError where one is missing."""
    if config.loss.negatives != "persistent":
        return None
    slots = config.buffer_size // config.data.streams
    expected = [slots, *chain_shape(config.sampler, config.data.shape)]
    names = [str(path / f"stream_{stream:04d}.safetensors") for stream in range(config.data.streams)]
    with ExitStack() as opened:
        files = []
        for name in names:
            try:
                file = opened.enter_context(safe_open(name, framework="pt"))
                found = file.get_slice("x").get_shape()
            except (SafetensorError, OSError) as error:
                raise DataError(f"{name}: {error}; use another checkpoint of the run") from error
            if found != expected:
                raise DataError(f"{name}: its chains are {found}, and this run's are {expected}")
            files.append(file)
        opened.pop_all()  # they stay open for as long as the chains are in use
    return PersistentChains(tuple(files), tuple(names), slots, config)


def device_of(name: str | torch.device | None) -> torch.device:
    """A device by torch's name for it; None: cuda where there is one, else cpu. Raises ConfigError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch raises depends on its build
        first = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name}: {first}; use cpu, or leave it out") from error
    if device.type == "meta":
        raise ConfigError(f"--device {name}: computes nothing; use cpu, or leave it out")
    return device
