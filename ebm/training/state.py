"""The state of a run: all that a step reads and changes, built from the config, taken to and from checkpoints."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm.config import Config, SamplerConfig
from ebm.data import Access, ShardReader, load_manifest
from ebm.data.manifest import check_files
from ebm.energies import FoldedEnergy, build_energy, chain_dtype
from ebm.errors import DataError
from ebm.losses import LossOutput, loss_of
from ebm.runtime import checkpoint
from ebm.runtime.distributed import World
from ebm.samplers import Engine
from ebm.streams import StreamGenerators, derive_seed, owned_streams
from ebm.training import optimizer as optimisation
from ebm.training.buffer import ReplayBuffer
from ebm.training.divergence import Ladder
from ebm.training.negatives import chain_energy


class Objective(nn.Module):
    """Holds the energy; its forward is the whole loss.

    Losses call the energy once, or several times, or its gradient; several forwards of a module that averages its
    gradients over ranks break before one backward, so the wrapping goes around this one. A spectrally normalised
    weight is computed once a forward, with one power iteration, however often the loss uses it.

    Args:
        of_scores: the loss differentiates dE/dx, to which some weights (a bias of the head) may be nothing. They get a
            gradient of 0 then: the ranks wait for every weight's.
    """

    def __init__(self, energy: nn.Module, loss: Callable[..., LossOutput], of_scores: bool = False):
        super().__init__()
        self.energy, self.loss, self.of_scores = energy, loss, of_scores

    def forward(self, x_pos: Tensor, x_neg: Tensor | None, **settings) -> LossOutput:
        with parametrize.cached():
            output = self.loss(self.energy, x_pos, x_neg, **settings)
        if not self.of_scores:
            return output
        nothing = 0.0 * sum(p.sum() for p in self.energy.parameters() if p.requires_grad)
        return output._replace(loss=output.loss + nothing)


class Meters:
    """Means of scalars between two reads. They add up on the device; only `read` waits for it."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """One step's detached scalars; the same names on every rank."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts.update(values.keys())

    def read(self, world) -> dict[str, float]:
        """Each mean over the steps that gave it and over all ranks; starts over."""
        sums = torch.stack([value.float() / self._counts[name] for name, value in self._sums.items()])
        means = dict(zip(self._sums, world.mean(sums).tolist(), strict=True))
        self._sums, self._counts = {}, Counter()
        return means


@dataclass
class TrainState:
    """All that a step reads and changes. `energy` is the bare module, `model` the wrapped `Objective` around it, and
    `ema` has the averages of the energy's weights."""

    config: Config
    world: World
    energy: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: nn.Module
    folded: FoldedEnergy
    engine: Engine
    buffer: ReplayBuffer | None
    reader: ShardReader
    random: StreamGenerators
    ladder: Ladder
    step_size: Tensor | None  # float32 scalar, of a sampler that adapts its own
    step: int = 0
    skipped_steps: Tensor = None  # non-finite steps so far, and in a row; on the device
    skipped_in_row: Tensor = None
    quarantined: Tensor = None  # chains of this rank that were started again for not being finite
    skipped_samples: int = 0
    meters: Meters = field(default_factory=Meters)

    @property
    def sampler(self) -> SamplerConfig:
        """The chain's settings, with the step size that the ladder has left."""
        return self.config.sampler.scaled(self.ladder.step_scale)


def build_state(config: Config, world: World) -> TrainState:
    """The state of a run at step 0: a function of the config alone."""
    streams = owned_streams(config.data.streams, world.rank, world.size)
    manifest = load_manifest(config.data.shards, Access.of(config.data))
    check_files(manifest)
    energy = build_energy(config.energy, config.data.shape, config.run.seed).to(world.device).train()
    # Copies before `prepare`: accelerate replaces the forward of the module it is given.
    ema = copy.deepcopy(energy).requires_grad_(False)
    folded = FoldedEnergy(energy, chain_dtype(world.autocast_dtype(), world.device))
    objective = Objective(energy, loss_of(config.loss), of_scores=config.loss.of_scores)
    model = world.prepare(objective)
    buffer, levels = None, config.sampler.levels
    if config.loss.negatives == "persistent":
        buffer = ReplayBuffer(
            (config.data.shape if levels == 1 else (levels, *config.data.shape)),
            config.buffer.size // config.data.streams,
            streams,
            config.run.seed,
            device=world.device,
            dtype=getattr(torch, config.buffer.dtype),
            start=config.sampler.start_range,
        )
    zero = torch.zeros((), dtype=torch.int64, device=world.device)
    adapts = config.loss.negatives is not None and config.sampler.adapt
    return TrainState(
        config,
        world,
        energy,
        model,
        optimisation.build_optimizer(config.optim, energy),
        ema,
        folded,
        Engine(chain_energy(config, folded)),
        buffer,
        reader=open_reader(config, manifest, streams, {}),
        random=StreamGenerators(config.run.seed, streams, world.device),
        ladder=Ladder(config.health),
        step_size=torch.tensor(config.sampler.step_size, device=world.device) if adapts else None,
        skipped_steps=zero,
        skipped_in_row=zero,
        quarantined=zero,
    )


def open_reader(config: Config, manifest, streams: list[int], positions: dict[int, list[int]]) -> ShardReader:
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
    )


def snapshot(state: TrainState) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(this rank's tensors by file name, what state.json holds): the arguments of `Saver.start`. All ranks together."""
    files = {}
    if state.world.is_main:
        files = {
            "model": state.energy.state_dict(),
            "ema": state.ema.state_dict(),
            "optimizer": checkpoint.pack_optimizer(state.optimizer),
        }
    if state.buffer is not None:
        files |= {f"stream_{v:04d}": state.buffer.stream_state(i) for i, v in enumerate(state.buffer.streams)}
    per_rank = state.world.gather((state.reader.positions, state.skipped_samples, int(state.quarantined)))
    positions = {str(v): list(p) for positions, _, _ in per_rank for v, p in sorted(positions.items())}
    scaler = state.world.scaler
    return files, {
        "step": state.step,
        "positions": positions,
        "skipped_samples": sum(n for _, n, _ in per_rank),
        "quarantined": sum(n for _, _, n in per_rank),
        "skipped_steps": int(state.skipped_steps),
        "skipped_in_row": int(state.skipped_in_row),
        "ladder": state.ladder.state(),
        "step_size": None if state.step_size is None else state.step_size.item(),
        "good": state.step == 0 or state.ladder.good,
        "world_size": state.world.size,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def load(state: TrainState, path: Path, ladder: dict | None = None) -> None:
    """Take over a checkpoint; every rank reads what its streams need, whatever the world size it was written by.

    `ladder`: what the ladder remembers instead, of a rollback to this checkpoint.
    """
    config = state.config
    meta = checkpoint.read_state(path, config.data.streams)
    for name, module in (("model", state.energy), ("ema", state.ema)):
        own = module.state_dict()
        module.load_state_dict(checkpoint.read_tensors(path, name, own))
    checkpoint.load_optimizer(path, state.optimizer)
    state.step, state.meters = meta["step"], Meters()
    if state.buffer is not None:
        for i, v in enumerate(state.buffer.streams):
            own = state.buffer.stream_state(i)
            state.buffer.load_stream(i, checkpoint.read_tensors(path, f"stream_{v:04d}", own))
    state.skipped_steps = torch.full_like(state.skipped_steps, meta["skipped_steps"])
    state.skipped_in_row = torch.full_like(state.skipped_in_row, meta["skipped_in_row"])
    # Sums over the ranks go on from rank 0.
    state.skipped_samples = meta["skipped_samples"] if state.world.is_main else 0
    state.quarantined = torch.full_like(state.quarantined, meta["quarantined"] if state.world.is_main else 0)
    if state.step_size is not None:
        state.step_size.fill_(meta["step_size"])  # in place: a captured chain reads it where it is
    if (meta["scaler"] is None) != (state.world.scaler is None):
        raise DataError(
            f"{path}/state.json: 'scaler' does not go with train.mixed_precision={config.train.mixed_precision}"
        )
    if meta["scaler"] is not None:
        state.world.scaler.load_state_dict(meta["scaler"])
    state.ladder.load(ladder or meta["ladder"])
    seed, salt = config.run.seed, state.ladder.rollbacks
    noise_seed = derive_seed(seed, "rollback", step=salt) if salt else seed  # the reader's order keeps the run's
    state.random.seed = noise_seed
    if state.buffer is not None:
        state.buffer.reseed(noise_seed)
    positions = {v: meta["positions"][str(v)] for v in state.random.streams}
    state.reader.close()
    state.reader = open_reader(config, state.reader.manifest, state.random.streams, positions)
