"""The trainer: its state, one step, and the loop."""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebm import checkpoint, optimisation
from ebm.config import Config
from ebm.data import Batch, ShardReader, augment, load_manifest
from ebm.data.manifest import check_files
from ebm.distributed import World
from ebm.energies import FoldedEnergy, build_energy
from ebm.errors import EXIT_STOPPED, DivergenceError
from ebm.health import Meters, auc
from ebm.losses import contrastive_divergence
from ebm.replay_buffer import Draw, ReplayBuffer
from ebm.run_directory import RunDirectory
from ebm.samplers import fresh_chains, langevin, settings_of
from ebm.stopping import StopRequest
from ebm.streams import StreamGenerators, owned_streams, uniform_
from ebm.tracking import Tracker


@dataclass
class TrainState:
    """All that a step reads and changes. `energy` is the bare module, `model` its wrapping for several ranks."""

    config: Config
    world: World
    energy: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: AveragedModel
    folded: FoldedEnergy
    buffer: ReplayBuffer | None
    reader: ShardReader
    random: StreamGenerators
    step: int = 0
    skipped_steps: Tensor = None  # non-finite steps so far, and in a row; on the device
    skipped_in_row: Tensor = None
    skipped_samples: int = 0
    meters: Meters = field(default_factory=Meters)


def train_step(state: TrainState, batch: Batch) -> tuple[Draw | None, dict[str, Tensor]]:
    """One optimizer step on this rank's part of the global batch. Reads no device memory on the host."""
    config, world, random, step = state.config, state.world, state.random, state.step + 1
    parts = config.train.accumulate

    # Data: uint8 -> [-1, 1], dequantised, augmented, noised.
    x_pos = positives(config, batch.images.to(world.device, non_blocking=True), random, step)
    y_pos = batch.labels.to(world.device, non_blocking=True) if config.energy.num_classes else None

    # Where the chains start.
    draw, x_init, y_neg = initial_states(state, x_pos, y_pos, step)

    # Part by part (one, unless train.accumulate says more): chain, then loss and gradient of both phases together.
    state.folded.refresh()
    noise = random("chain", step)
    settings = settings_of(config.sampler) | {"grad_scale": 1024.0 if state.folded.dtype == torch.float16 else 1.0}
    x_neg, scalars, energies = [], [], []
    for part in range(parts):
        take = partial(_part, part=part, parts=parts, streams=len(random.streams))
        labels = () if y_pos is None else (take(y_neg),)
        x, info = langevin(lambda x, y=labels: state.folded(x, *y), take(x_init), generator=noise, **settings)
        with world.accumulating(state.model, last=part == parts - 1):
            loss, terms = contrastive_divergence(
                state.model, take(x_pos), x, l2=config.loss.l2, y_pos=take(y_pos), y_neg=take(y_neg)
            )
            world.backward(loss / parts)
        x_neg.append(x)
        energies.append(terms)
        scalars.append(torch.stack([loss.detach(), *info]))

    # Update. The gradient is averaged over the ranks, so its norm tells every rank alike whether any had a NaN;
    # torch's fused Adam leaves weights and state alone where found_inf is 1, without the host having to look.
    grad_norm = world.clip_grad_norm(state.model, config.optim.grad_clip)
    finite = torch.isfinite(grad_norm)
    optimisation.set_learning_rate(state.optimizer, config, step)
    optimisation.step_if(state.optimizer, finite)
    state.optimizer.zero_grad()
    state.ema.update_parameters(state.energy)

    # Chains go back to their slots.
    if draw is not None:
        state.buffer.write(draw, _join(x_neg, len(random.streams)), config.sampler.num_steps, finite)

    # Meters, on the device.
    state.step = step
    state.skipped_steps = state.skipped_steps + ~finite
    state.skipped_in_row = torch.where(finite, 0, state.skipped_in_row + 1)
    e_pos, e_neg = (torch.cat([terms[name] for terms in energies]) for name in ("e_pos", "e_neg"))
    names = ("train/loss", "sampler/grad_norm", "sampler/displacement", "sampler/saturated")
    state.meters.add(
        dict(zip(names, torch.stack(scalars).mean(0), strict=True))
        | {"energy/pos_mean": e_pos.mean(), "energy/neg_mean": e_neg.mean(), "optim/grad_norm": grad_norm}
    )
    return draw, {"energy/pos": e_pos, "energy/neg": e_neg}


def positives(config: Config, images: Tensor, random: StreamGenerators, step: int) -> Tensor:
    """uint8 images (B, C, H, W) -> the data of the loss, float32 in [-1, 1] (in the sampler's bounds)."""
    data = config.data
    x = augment.dequantize(images, random("dequantize", step) if data.dequantize else None)
    if data.augment_flip or data.augment_crop:
        x = augment.augment(x, random("augment", step), flip=data.augment_flip, crop=data.augment_crop)
    if data.noise_std:
        x = augment.add_noise(x, data.noise_std, random("data_noise", step))
    # Chains never leave the bounds; data outside would be told apart by that alone.
    return x if config.sampler.bounds is None else x.clamp(*config.sampler.bounds)


def initial_states(state: TrainState, x_pos: Tensor, y_pos: Tensor | None, step: int):
    """(the draw or None, initial states of the chains, their labels or None)."""
    if state.config.loss.negatives == "data":
        return None, x_pos, y_pos
    if state.config.loss.negatives == "noise":
        low, high = state.config.sampler.bounds or (-1.0, 1.0)
        return None, uniform_(torch.empty_like(x_pos), state.random("start", step), low, high), y_pos
    per_stream = len(x_pos) // len(state.random.streams)
    draw = state.buffer.draw(per_stream, step, state.config.buffer.reinit_prob)
    if y_pos is None:
        return draw, draw.x, None
    return draw, draw.x, draw.rows % state.buffer.slots % state.config.energy.num_classes


def _part(x: Tensor | None, part: int, parts: int, streams: int) -> Tensor | None:
    """Part `part` of every stream's share of a stream-major batch."""
    if x is None or parts == 1:
        return x
    return x.unflatten(0, (streams, parts, -1))[:, part].flatten(0, 1)


def _join(xs: list[Tensor], streams: int) -> Tensor:
    """The inverse of `_part` over all parts."""
    return torch.cat([x.unflatten(0, (streams, -1)) for x in xs], dim=1).flatten(0, 1)


def build_state(config: Config, world: World) -> TrainState:
    """The state of a run at step 0: a function of the config alone."""
    streams = owned_streams(config.data.streams, world.rank, world.size)
    manifest = load_manifest(config.data.shards)
    check_files(manifest)
    energy = build_energy(config.energy, config.data.shape, config.run.seed).to(world.device).train()
    # Copies before `prepare`: accelerate replaces the forward of the module it is given.
    ema = AveragedModel(energy, multi_avg_fn=get_ema_multi_avg_fn(config.optim.ema_decay)).requires_grad_(False)
    folded = FoldedEnergy(energy, world.autocast_dtype())
    model, optimizer = world.prepare(energy, optimisation.build_optimizer(config.optim, energy))
    buffer = None
    if config.loss.negatives == "persistent":
        low, high = config.sampler.bounds or (-1.0, 1.0)
        buffer = ReplayBuffer(
            config.data.shape,
            config.buffer.size // config.data.streams,
            streams,
            config.run.seed,
            device=world.device,
            low=low,
            high=high,
        )
    zero = torch.zeros((), dtype=torch.int64, device=world.device)
    return TrainState(
        config,
        world,
        energy,
        model,
        optimizer,
        ema,
        folded,
        buffer,
        reader=open_reader(config, manifest, streams, {}),
        random=StreamGenerators(config.run.seed, streams, world.device),
        skipped_steps=zero,
        skipped_in_row=zero,
    )


def open_reader(config: Config, manifest, streams: list[int], positions: dict[int, int]) -> ShardReader:
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
        max_pixels=data.max_pixels,
        num_classes=config.energy.num_classes,
    )


def save(state: TrainState, run: RunDirectory) -> Path:
    files = {}
    if state.world.is_main:
        files = {
            "model": state.energy.state_dict(),
            "ema": state.ema.module.state_dict(),
            "optimizer": checkpoint.pack_optimizer(optimisation.bare(state.optimizer)),
        }
    if state.buffer is not None:
        files |= {f"stream_{v:04d}": state.buffer.stream_state(i) for i, v in enumerate(state.buffer.streams)}
    per_rank = state.world.gather((state.reader.positions, state.skipped_samples))
    positions = {str(v): p for positions, _ in per_rank for v, p in sorted(positions.items())}
    scaler = state.world.scaler
    meta = {
        "step": state.step,
        "positions": positions,
        "skipped_samples": sum(n for _, n in per_rank),
        "skipped_steps": int(state.skipped_steps),
        "skipped_in_row": int(state.skipped_in_row),
        "world_size": state.world.size,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    return checkpoint.save(run.checkpoints, state.step, files, meta, state.world, state.config.checkpoint.keep)


def load(state: TrainState, path: Path) -> None:
    """Take over a checkpoint; every rank reads what its streams need, whatever the world size it was written by."""
    meta = checkpoint.read_state(path)
    state.energy.load_state_dict(checkpoint.read_tensors(path, "model"))
    state.ema.module.load_state_dict(checkpoint.read_tensors(path, "ema"))
    state.step = meta["step"]
    state.ema.n_averaged.fill_(state.step)
    checkpoint.unpack_optimizer(optimisation.bare(state.optimizer), checkpoint.read_tensors(path, "optimizer"))
    if state.buffer is not None:
        for i, v in enumerate(state.buffer.streams):
            state.buffer.load_stream(i, checkpoint.read_tensors(path, f"stream_{v:04d}"))
    state.skipped_steps = state.skipped_steps + meta["skipped_steps"]
    state.skipped_in_row = state.skipped_in_row + meta["skipped_in_row"]
    state.skipped_samples = meta["skipped_samples"] if state.world.is_main else 0
    if meta["scaler"] is not None:
        state.world.scaler.load_state_dict(meta["scaler"])
    positions = {v: meta["positions"][str(v)] for v in state.random.streams}
    state.reader.close()
    state.reader = open_reader(state.config, state.reader.manifest, state.random.streams, positions)


def train(config: Config, world: World, started: float) -> int:
    """Run, or go on with, the training of `config`. Returns the exit code: 0 done, 75 stopped and resumable."""
    run = RunDirectory(config, world)
    if run.done:
        run.say(f"{run.path} is done already; another run.dir begins a new run")
        return 0
    state = build_state(config, world)
    found = run.newest_checkpoint()
    if found is not None:
        load(state, found)
        run.say(f"resuming {run.path} at step {state.step}")
    tracker = Tracker(config, run.path, state.step) if world.is_main else None
    code = 1
    try:
        with StopRequest(run.stop_file, config.train.time_limit, started) as stop:
            code = loop(state, run, tracker, stop)
    finally:
        state.reader.close()
        if tracker is not None:
            tracker.close(code)
    run.finish(code, state.step, time.monotonic() - started)
    return code


def loop(state: TrainState, run: RunDirectory, tracker: Tracker | None, stop: StopRequest) -> int:
    config, world = state.config, state.world
    waited, reinit, window_start, window_step = 0.0, 0.0, time.perf_counter(), state.step
    while state.step < config.train.steps:
        before = time.perf_counter()
        batch = next(state.reader)
        waited += time.perf_counter() - before
        state.skipped_samples += batch.skipped
        draw, energies = train_step(state, batch)
        step, last = state.step, state.step == config.train.steps
        if draw is not None:
            reinit += draw.reinit.float().mean().item()
        if config.data.trace:
            trace(state, batch, draw, tracker)
        if step % config.train.log_every == 0 or last:
            metrics = measure(state, energies, reinit / (step - window_step))
            now = time.perf_counter()
            metrics |= perf(config, now - window_start, waited, step - window_step)
            if tracker is not None:
                tracker.log(step, metrics)
            waited, reinit, window_start, window_step = 0.0, 0.0, now, step
            check_health(state, metrics)
        if step % config.tracking.samples_every == 0 or last:
            panels(state, batch, energies, tracker)
        stopping = world.any(stop.asked() is not None)
        if step % config.checkpoint.every == 0 or last or stopping:
            save(state, run)
        if stopping and not last:
            run.say(f"stopping at step {step}: {stop.reason or 'another rank was asked to'}")
            return EXIT_STOPPED
    return 0


def measure(state: TrainState, energies: dict[str, Tensor], reinit: float) -> dict[str, float]:
    """The metrics of the steps since the last call, equal on all ranks. Waits for the device."""
    config, world = state.config, state.world
    metrics = state.meters.read(world)
    metrics["energy/gap"] = metrics["energy/neg_mean"] - metrics["energy/pos_mean"]
    metrics["energy/auc"] = auc(*(world.concatenate(e) for e in energies.values())).item()
    metrics["sampler/temperature"] = config.sampler.noise**2 / (2 * config.sampler.step_size)
    zero = torch.zeros((), device=world.device)
    age = zero if state.buffer is None else state.buffer.age.float().mean()
    host = torch.tensor([reinit, float(state.skipped_samples)], device=world.device)
    age, reinit, skipped = world.mean(torch.cat([age[None], host])).tolist()
    metrics |= {"buffer/age_mean": age, "buffer/reinit_frac": reinit, "data/skipped": round(skipped * world.size)}
    metrics |= {"data/epoch": state.reader.epoch, "optim/lr": optimisation.learning_rate(config, state.step)}
    return metrics | {"health/skipped_steps": int(state.skipped_steps), "health/rollbacks": 0}


def perf(config: Config, seconds: float, waited: float, steps: int) -> dict[str, float]:
    per_step = seconds / steps
    return {
        "perf/step_s": per_step,
        "perf/data_wait_frac": waited / seconds,
        "perf/chain_steps_per_s": config.sampler.num_steps * config.train.batch_size / per_step,
    }


def check_health(state: TrainState, metrics: dict[str, float]) -> None:
    row, limit = int(state.skipped_in_row), state.config.health.max_skipped_steps
    if row >= limit:
        raise DivergenceError(
            f"the loss or its gradient was not finite in the last {row} steps (health.max_skipped_steps={limit}), step "
            f"{state.step}; lower optim.lr or sampler.step_size, or raise loss.l2; the last checkpoint is kept"
        )


def trace(state: TrainState, batch: Batch, draw: Draw | None, tracker: Tracker | None) -> None:
    """One line of trace.jsonl: the samples and chains of the global batch, by stream."""
    chains = []
    if draw is not None:
        for stream, slots, reinit in zip(state.buffer.streams, draw.slots.tolist(), draw.reinit.tolist(), strict=True):
            chains += [[stream, slot, fresh] for slot, fresh in zip(slots, reinit, strict=True)]
    per_rank = state.world.gather((batch.keys, chains))
    if tracker is not None:
        samples = sorted((list(key) for keys, _ in per_rank for key in keys), key=lambda s: s[0])
        tracker.trace(state.step, samples, sorted((c for _, cs in per_rank for c in cs), key=lambda c: c[0]))


def panels(state: TrainState, batch: Batch, energies: dict[str, Tensor], tracker: Tracker | None) -> None:
    """Pictures of fresh chains (from noise, averaged weights), persistent chains and data; energy histograms."""
    if tracker is None:
        return
    config, n = state.config, state.config.tracking.num_samples
    folded = FoldedEnergy(state.ema.module, state.folded.dtype).refresh()
    fresh, _ = fresh_chains(
        folded,
        config.sampler,
        config.data.shape,
        n,
        config.tracking.sample_steps,
        seed=config.run.seed + state.step,
        device=state.world.device,
        num_classes=config.energy.num_classes,
    )
    images = {"samples/fresh": fresh}
    if state.buffer is not None:
        images["samples/buffer"] = state.buffer.x[:n]
    images["samples/data"] = batch.images[:n].float() / 127.5 - 1
    tracker.panels(state.step, images)
    tracker.histograms(state.step, energies)
