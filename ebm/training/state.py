"""The state of a run: all that a step reads and changes, built from the config, taken to and from checkpoints."""

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.utils import parametrize

from ebm.config import Config, LangevinConfig, OptimConfig, SamplerConfig
from ebm.config.energies import HybridConfig, ImportConfig
from ebm.config.samplers import MetropolisConfig
from ebm.data import Access, Manifest, ShardReader, load_manifest
from ebm.data.manifest import check_files
from ebm.data.reader import read_all
from ebm.energies import (
    BaseEnergyFunction,
    FoldedEnergy,
    NoiseConditionalEnergy,
    SpectralNorms,
    build_energy,
    chain_dtype,
)
from ebm.energies.base import device_of
from ebm.errors import DataError
from ebm.evaluation.sets import read_spread
from ebm.inference.images import dequantize, strongly_augmented, to_states
from ebm.losses import LossOutput, field_of, loss_of
from ebm.losses.factory import StepLoss, pairs_of
from ebm.runtime import checkpoint
from ebm.runtime.distributed import World
from ebm.samplers import Engine, adapted, sampler_of
from ebm.samplers.base import MixtureStart
from ebm.samplers.compiled import TOLERANCE, Compiler, EnergyOfLoss
from ebm.samplers.engine import CapturedFunction, CapturedUpdate
from ebm.samplers.factory import chain_shape, sampler_in_use, start_of
from ebm.streams import StreamGenerators, derive_seed, owned_streams
from ebm.training.divergence import DivergenceMonitor
from ebm.training.negatives import Draw, ReplayBuffer, chain_energy, fitted_mixture

MOMENT_DATA = 50_000  # data whose mean and covariance are taken
MIXTURE_DATA = 10_000  # data that a mixture for chains to start in is fitted to


class Objective(nn.Module):
    """Holds the energy; its forward is the whole loss.

    Losses call the energy once, or several times, or its gradient; several forwards of a module that averages its
    gradients over ranks break before one backward, so the wrapping goes around this one. A spectrally normalised
    weight is computed once a forward, with one power iteration, however often the loss uses it.

    Args:
        of_scores: the loss differentiates dE/dx, to which some weights (a bias of the head) may be nothing. They get a
            gradient of 0 then: the ranks wait for every weight's.
        evaluated: what the loss calls for energies, in place of `energy` itself.
    """

    def __init__(
        self,
        energy: nn.Module,
        loss: Callable[..., LossOutput],
        of_scores: bool = False,
        evaluated: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.energy, self.loss, self.of_scores, self.evaluated = energy, loss, of_scores, evaluated
        self.norms = SpectralNorms(energy)

    def forward(self, x_pos: Tensor, x_neg: Tensor | None, **settings: Any) -> LossOutput:
        with parametrize.cached(), self.norms.computed():
            energy = self.energy if self.evaluated is None else self.evaluated
            output = self.loss(energy, x_pos, x_neg, **settings)
        if not self.of_scores:
            return output
        nothing = 0.0 * torch.stack([p.sum() for p in self.energy.parameters() if p.requires_grad]).sum()
        return output._replace(loss=output.loss + nothing)


class Meters:
    """Means of scalars between two reads. They add up on the device, in float32; only `read` waits for it."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # one vector for all steps that gave the same names
        self._counts: Counter[str] = Counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """One step's detached scalars; the same names on every rank."""
        names, new = tuple(values), torch.stack([value.float() for value in values.values()])
        self._sums[names] = self._sums[names] + new if names in self._sums else new
        self._counts.update(names)

    def read(self, world: World) -> dict[str, float]:
        """Each mean over the steps that gave it and over all ranks; starts over."""
        sums: dict[str, Tensor] = {}
        for names, values in self._sums.items():
            for name, value in zip(names, values.unbind(), strict=True):
                sums[name] = sums[name] + value if name in sums else value
        shares = torch.stack([value / self._counts[name] for name, value in sums.items()])
        means = dict(zip(sums, world.mean(shares).tolist(), strict=True))
        self._sums, self._counts = {}, Counter()
        return means


@dataclass
class TrainState:
    """All that a step reads and changes.

    `energy` is the bare module, `model` the wrapped `Objective` around it, which `loss` runs; `ema` holds the averages
    of the weights and `folded` the frozen copy that chains move on, which `fold` brings up to date.
    """

    config: Config
    world: World
    energy: BaseEnergyFunction
    model: nn.Module
    loss: StepLoss
    optimizer: torch.optim.Optimizer
    ema: BaseEnergyFunction
    folded: FoldedEnergy
    fold: Callable[[], object]
    engine: Engine
    buffer: ReplayBuffer | None
    reader: ShardReader
    data: checkpoint.DataIdentity
    field_sha256: str | None  # of the file that loss.field names
    mixture: MixtureStart | None  # of sampler.start=mixture
    random: StreamGenerators
    divergence: DivergenceMonitor
    adapted_step: Tensor | None  # float32 scalar on the device, of a sampler that adapts its step size
    skipped_steps: Tensor  # steps without a finite gradient so far; int64 scalar on the device
    skipped_in_row: Tensor  # the same, since the last finite one
    reset_chains: Tensor  # chains of this rank that restarted since they were not finite
    step: int = 0
    skipped_samples: int = 0
    meters: Meters = field(default_factory=Meters)

    def chain(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The sampler and its settings for the chains of a step, with the step size in use."""
        scale = self.divergence.step_scale
        if self.adapted_step is None:
            section = self.config.sampler.scaled(scale)
            sampler, settings = sampler_of(section)
            if self.config.loss.starts_at_data and isinstance(section, LangevinConfig):
                settings |= {"noise_scale_from_data": section.noise}
        else:
            sampler, settings = sampler_of(self.config.sampler, step_size=self.adapted_step * scale)
        # Gradients of float16 would vanish without a scale. It is a power of two: exact.
        return sampler, settings | {"grad_scale": 1024.0 if self.folded.dtype == torch.float16 else 1.0}

    def sampler_in_use(self) -> SamplerConfig:
        """The sampler's config with the step size in use. Waits for the device where the step size adapts."""
        adapted = None if self.adapted_step is None else self.adapted_step.item()
        return sampler_in_use(self.config.sampler, adapted, self.divergence.step_scale)

    def write_chains(self, draw: Draw, x: Tensor, energies: Tensor | None, finite: Tensor) -> None:
        """Put a step's chains (B, *chain_shape) back into the buffer. Those that are not finite restart."""
        assert self.buffer is not None and energies is not None
        largest = torch.linalg.vector_norm(x.flatten(1), torch.inf, dim=1)  # inf or NaN where a component is
        broken = ~(torch.stack([largest, energies]).abs() < torch.inf).all(0)
        self.buffer.write(draw, x, self.config.sampler.num_steps, finite, broken)
        self.reset_chains = self.reset_chains + broken.sum()

    def end_step(self, finite: Tensor, scalars: dict[str, Tensor]) -> None:
        """Count a step, add up its scalars, and adapt the step size to its chains."""
        self.step += 1
        self.skipped_steps = self.skipped_steps + ~finite
        self.skipped_in_row = torch.where(finite, 0, self.skipped_in_row + 1)
        self.meters.add(scalars)
        sampler, acceptance = self.config.sampler, scalars.get("sampler/acceptance")
        if self.adapted_step is None or acceptance is None or not isinstance(sampler, MetropolisConfig):
            return
        new = adapted(self.adapted_step, self.world.mean(acceptance), sampler.target_acceptance, sampler.adapt_rate)
        if self.divergence.step_scale < 1:  # a cut would be undone in some hundred steps
            new = torch.minimum(new, self.adapted_step)
        self.adapted_step.copy_(new)


def build_state(config: Config, world: World) -> TrainState:
    """The state of a run at step 0: a function of the config alone."""
    streams = owned_streams(config.data.streams, world.rank, world.size)
    manifest = load_manifest(config.data.shards, Access.of(config.data))
    world.on_main(lambda: check_files(manifest, config.data.on_error, config.data.max_skipped))
    energy = build_energy(config.energy, config.data.shape, config.run.seed)
    if isinstance(energy, NoiseConditionalEnergy):
        energy.fit(moment_data(config, manifest))
    mixture = build_mixture(config, world)
    energy = energy.to(world.device).train()
    # Copies before `prepare`: accelerate replaces the forward of the module it is given.
    ema = copy.deepcopy(energy).requires_grad_(False)
    folded = FoldedEnergy(energy, chain_dtype(world.autocast_dtype(), world.device))
    field = field_of(config.loss, config.energy, config.data.shape, world.device)
    loss = loss_of(config.loss, strongly_augmented, field)
    objective = Objective(energy, loss, config.loss.of_scores, energy_of_loss(config, world, energy))
    model = world.prepare(objective)
    zero = torch.zeros((), dtype=torch.int64, device=world.device)
    adapts = config.loss.negatives is not None and config.sampler.adapt
    return TrainState(
        config,
        world,
        energy,
        model,
        build_loss(config, world, model),
        build_optimizer(config.optim, energy),
        ema,
        folded,
        CapturedUpdate(folded.refresh, device_of(energy)) if can_be_captured(config, world) else folded.refresh,
        Engine(chain_energy(config, folded), compiler=compiler_of(config, world, folded.dtype)),
        build_buffer(config, world, streams, mixture),
        reader=open_reader(config, world, manifest, streams, {}),
        data=checkpoint.DataIdentity(identity=manifest.identity, name=manifest.title),
        field_sha256=sha256_of_field(config.loss.trained_field),
        mixture=mixture,
        random=StreamGenerators(config.run.seed, streams, world.device),
        divergence=DivergenceMonitor(config.health),
        adapted_step=torch.tensor(config.sampler.step_size, device=world.device) if adapts else None,
        skipped_steps=zero,
        skipped_in_row=zero,
        reset_chains=zero,
    )


def sha256_of_field(path: str | None) -> str | None:
    """The sha256 of the file that loss.field names; None for a function, and without any field."""
    if path is None or not path.endswith(".safetensors"):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def moment_data(config: Config, manifest: Manifest) -> Tensor:
    """States (N, *shape) of the first data, MOMENT_DATA or all, whose mean and covariance a noise-conditional energy
    starts from. Every rank reads the same."""
    blocks, count = [], 0
    for data, _, _ in read_all(manifest, config.data.shape, max_pixels=config.data.max_pixels, check=False):
        blocks.append(dequantize(data, None) if data.dtype == torch.uint8 else data)
        count += len(data)
        if count >= MOMENT_DATA:
            break
    return torch.cat(blocks)


def build_mixture(config: Config, world: World) -> MixtureStart | None:
    """What the chains of sampler.start=mixture begin in, fitted by rank 0 to MIXTURE_DATA data from all shards."""
    if config.sampler.start != "mixture":
        return None

    def fitted() -> MixtureStart:
        data, labels = read_spread(config.data.shards, config.data, MIXTURE_DATA)
        return fitted_mixture(config, to_states(data), labels)

    return world.on_main(fitted).to(world.device)


def compiler_of(config: Config, world: World, dtype: torch.dtype) -> Compiler | None:
    """How what computes in `dtype`, the run's chains or its loss, is compiled, where train.compile says so."""
    wish = config.train.compile
    if wish == "false" or (wish == "auto" and world.device.type != "cuda"):
        return None
    return Compiler(
        always=wish == "true",
        tolerance=TOLERANCE[dtype],
        limit=min(120.0, config.train.collective_timeout / 4),  # the ranks wait for each other
        agree=world.all,
        file=Path(config.run.dir) / "compiled.json",
        writes=world.is_main,
    )


def energy_of_loss(config: Config, world: World, energy: BaseEnergyFunction) -> EnergyOfLoss | None:
    """What the loss calls where it may be compiled: a loss of energies alone, as torch.compile has no double backward,
    and a network of the project's, as a class of the user's may change its buffers in training."""
    if not config.loss.of_energies or config.loss.gradient_penalty or has_users_code(config):
        return None
    if config.noise_range is not None and config.noise_range.initialiser is not None:  # which the loss calls besides
        return None
    compiler = compiler_of(config, world, world.autocast_dtype())
    return None if compiler is None else EnergyOfLoss(energy, world.autocast_dtype(), compiler)


def build_loss(config: Config, world: World, model: nn.Module) -> StepLoss:
    """The loss of a step. On a GPU it is captured as a graph, unless gradients are scaled, or summed over ranks or over
    parts of a batch, which is outside of the graph."""
    alone = isinstance(model, Objective) and world.size == 1 and config.train.accumulate == 1 and world.scaler is None
    captures = alone and can_be_captured(config, world)
    return StepLoss(
        model,
        world.backward,
        config.loss.negatives_at,
        CapturedFunction if captures else None,
        TOLERANCE[world.autocast_dtype()],
        pairs_of(config.loss),
    )


def can_be_captured(config: Config, world: World) -> bool:
    """Whether the fold and the loss may be CUDA graphs: no code of the user's may keep state that a graph does not
    see."""
    return world.device.type == "cuda" and not has_users_code(config)


def has_users_code(config: Config) -> bool:
    """Whether the energy, or the network of a hybrid, is a class of the user's (energy.kind=import), or the loss takes
    a function of the user's (loss.field)."""
    networks = [config.energy] + ([config.energy.network] if isinstance(config.energy, HybridConfig) else [])
    return config.loss.trained_field is not None or any(isinstance(network, ImportConfig) for network in networks)


def build_buffer(config: Config, world: World, streams: list[int], mixture: MixtureStart | None) -> ReplayBuffer | None:
    if config.loss.negatives != "persistent":
        return None
    return ReplayBuffer(
        chain_shape(config.sampler, config.data.shape),
        config.buffer_size // config.data.streams,
        streams,
        config.run.seed,
        device=world.device,
        dtype=getattr(torch, config.buffer.dtype),
        start=start_of(config.sampler, mixture),
        labelled=bool(config.classes_of_chains),
    )


def open_reader(
    config: Config, world: World, manifest: Manifest, streams: list[int], positions: Mapping[int, Sequence[int]]
) -> ShardReader:
    data = config.data
    return ShardReader(
        manifest,
        data.shape,
        seed=config.run.seed,
        num_streams=data.streams,
        streams=streams,
        per_stream=config.train.batch_size // data.streams,
        window=data.window,
        workers=data.workers,
        positions=positions,
        on_error=data.on_error,
        max_skipped=data.max_skipped,
        max_pixels=data.max_pixels,
        num_classes=config.energy.num_classes,
        pin_memory=world.device.type == "cuda",
    )


def snapshot(state: TrainState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(this rank's tensors by file name, what state.json holds): the arguments of `Saver.start`. All ranks together."""
    files = {}
    if state.world.is_main:
        files = {
            "model": state.energy.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": checkpoint.pack_optimizer(state.optimizer),
        }
        if state.mixture is not None:
            files["start"] = state.mixture.tensors()
    if state.buffer is not None:
        files |= {f"stream_{v:04d}": state.buffer.stream_state(i) for i, v in enumerate(state.buffer.streams)}
    per_rank = state.world.gather((state.reader.positions, state.skipped_samples, int(state.reset_chains)))
    positions = {str(v): list(p) for positions, _, _ in per_rank for v, p in sorted(positions.items())}
    scaler = state.world.scaler
    return files, {
        "step": state.step,
        "positions": positions,
        "skipped_samples": sum(n for _, n, _ in per_rank),
        "reset_chains": sum(n for _, _, n in per_rank),
        "skipped_steps": int(state.skipped_steps),
        "skipped_in_row": int(state.skipped_in_row),
        "divergence": state.divergence.state(),
        "adapted_step": None if state.adapted_step is None else state.adapted_step.item(),
        "good": state.step == 0 or state.divergence.good,
        "world_size": state.world.size,
        "data": state.data.model_dump(),
        "field_sha256": state.field_sha256,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def load(state: TrainState, path: Path, divergence: dict[str, Any] | None = None) -> None:
    """Take over a checkpoint; every rank reads what its streams need, whatever the world size it was written by.

    `divergence`: what the monitor remembers instead, after a rollback to this checkpoint.
    """
    config = state.config
    meta = checkpoint.read_state(path, config.data.streams)
    for name, module in (("model", state.energy), ("ema", state.ema)):
        own = module.state_dict()
        module.load_state_dict(checkpoint.read_tensors(path, name, own))
    checkpoint.load_optimizer(path, state.optimizer)
    if state.mixture is not None:
        mixture = state.mixture.tensors()
        for name, tensor in checkpoint.read_tensors(path, "start", mixture).items():
            mixture[name].copy_(tensor)
    state.step, state.meters = meta.step, Meters()
    if state.buffer is not None:
        for i, v in enumerate(state.buffer.streams):
            own = state.buffer.stream_state(i)
            state.buffer.load_stream(i, checkpoint.read_tensors(path, f"stream_{v:04d}", own))
    state.skipped_steps = torch.full_like(state.skipped_steps, meta.skipped_steps)
    state.skipped_in_row = torch.full_like(state.skipped_in_row, meta.skipped_in_row)
    # Sums over the ranks go on from rank 0.
    state.skipped_samples = meta.skipped_samples if state.world.is_main else 0
    state.reset_chains = torch.full_like(state.reset_chains, meta.reset_chains if state.world.is_main else 0)
    if state.adapted_step is not None:
        if meta.adapted_step is None:
            raise DataError(f"{path}/state.json: has no 'adapted_step', which sampler.adapt=true needs")
        state.adapted_step.fill_(meta.adapted_step)
    scaler = state.world.scaler
    if (meta.scaler is None) != (scaler is None):
        raise DataError(
            f"{path}/state.json: 'scaler' does not go with train.mixed_precision={config.train.mixed_precision}"
        )
    if scaler is not None and meta.scaler is not None:
        checkpoint.load_scaler(path, scaler, meta.scaler)
    state.divergence.load(divergence or meta.divergence)
    seed, salt = config.run.seed, state.divergence.rollbacks
    noise_seed = derive_seed(seed, "rollback", step=salt) if salt else seed  # the reader's order keeps the run's
    state.random.seed = noise_seed
    if state.buffer is not None:
        state.buffer.reseed(noise_seed)
    positions = {v: meta.positions[str(v)] for v in state.random.streams}
    state.reader.close()
    state.reader = open_reader(config, state.world, state.reader.manifest, state.random.streams, positions)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; biases and scalars are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1 ... train.steps: linear warm-up, constant, then a cosine to lr_end * lr at the last step."""
    optim, steps = config.optim, config.train.steps
    warm = min(1.0, step / (optim.warmup_steps + 1))
    start = optim.decay_start * steps
    done = (step - start) / (steps - start) if steps > start else 0.0
    cosine = optim.lr_end + (1 - optim.lr_end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    return optim.lr * warm * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int, scale: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * scale


def clip_grad_norm(
    optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: GradScaler | None = None
) -> Tensor:
    """The norm of the whole gradient, unscaled, before it is cut to `max_norm`; no host read."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor, scaler: GradScaler | None = None) -> None:
    """One optimizer step, or none where `finite` (bool scalar on the device) is false; no host read."""
    if scaler is None:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read by torch's fused kernels
        optimizer.step()
    else:  # which has seen by itself whether the gradient is finite
        scaler.step(optimizer)
        scaler.update()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, weight by weight; buffers are the model's own. No host read
    (torch's AveragedModel waits for the device at every update)."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    own, new = list(average.buffers()), list(model.buffers())
    if own:
        torch._foreach_copy_(own, new)
