"""What is read off a running step: its health, metrics, trace and pictures. Each waits for the device."""

import logging
import re
import time
from dataclasses import dataclass, field
from operator import itemgetter

import torch
from torch import Tensor, nn

from ebm.data import Batch
from ebm.energies import FoldedEnergy
from ebm.errors import UserError
from ebm.evaluation.metrics import auc
from ebm.evaluation.sets import few_heldout
from ebm.inference.images import dequantize, to_states
from ebm.runtime.process import to_device
from ebm.samplers import fresh_chains
from ebm.samplers.base import saturated
from ebm.samplers.factory import cold_states
from ebm.tracking import Tracker
from ebm.training.cost import peak_flops
from ebm.training.divergence import ChainReading, Reading, drift
from ebm.training.negatives import Draw
from ebm.training.state import TrainState, learning_rate
from ebm.training.step import StepResult

log = logging.getLogger(__name__)

MAX_CLASSES = 16  # panels of single classes
COARSE = 4  # fields along each side of an image, by whose means chains are compared


@dataclass
class Interval:
    """What the loop adds up between two lines of metrics."""

    step: int
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0  # seconds for data
    reinit: float = 0.0  # sum of the steps' shares of restarted chains

    def add(self, result: StepResult) -> None:
        if result.draw is not None:
            self.reinit += result.draw.reinit.float().mean().item()  # on the host


def read_health(state: TrainState, result: StepResult) -> Reading:
    """This step's numbers over all ranks."""
    world = state.world
    weights = torch.stack([p.detach().double().sum() for p in state.energy.parameters()]).sum()
    weights = world.concatenate(weights[None])
    skipped = int(state.skipped_in_row)
    return Reading(
        skipped_in_row=skipped,
        replicas_agree=bool(torch.isfinite(weights).all() and (weights == weights[0]).all()),
        chains=None if skipped or not result.has_chains else _read_chains(state, result),
    )


def _read_chains(state: TrainState, result: StepResult) -> ChainReading:
    world, step = state.world, result.scalars
    assert result.e_pos is not None and result.e_neg is not None
    e_pos, e_neg = world.concatenate(result.e_pos), world.concatenate(result.e_neg)
    saturated = step["sampler/saturated"] - step["data/saturated"]
    excess, grad_norm = world.mean(torch.stack([saturated, step["sampler/grad_norm"]])).tolist()
    return ChainReading(
        gap=(e_neg.mean() - e_pos.mean()).item(),
        spread=torch.cat([e_pos, e_neg]).std().item(),
        auc=auc(e_pos, e_neg).item(),
        saturated=excess,
        drift=drift(grad_norm, state.sampler_in_use(), state.config.data.shape),
    )


def measure(state: TrainState, result: StepResult, interval: Interval, flops: int | None = None) -> dict[str, float]:
    """The metrics of an interval's steps, equal on all ranks but for perf/. Waits for the device. `flops`: of a step
    over all ranks, where they are known."""
    config, world, monitor, steps = state.config, state.world, state.divergence, state.step - interval.step
    metrics = state.meters.read(world)
    if result.e_pos is not None and result.e_neg is not None:
        metrics["energy/gap"] = metrics["energy/neg_mean"] - metrics["energy/pos_mean"]
        metrics["energy/auc"] = auc(world.concatenate(result.e_pos), world.concatenate(result.e_neg)).item()
    sampler = state.sampler_in_use()
    metrics["sampler/temperature"] = sampler.implied_temperature
    if state.adapted_step is not None:
        metrics["sampler/step_size"] = sampler.step_size
    ages = torch.zeros(1, device=world.device) if state.buffer is None else state.buffer.age.float().mean()[None]
    sums = torch.tensor([interval.reinit / steps, float(state.skipped_samples)], device=world.device)
    age, reinit, skipped, reset = world.mean(torch.cat([ages, sums, state.reset_chains[None].float()])).tolist()
    metrics |= {"buffer/age_mean": age, "buffer/reinit_frac": reinit, "data/skipped": round(skipped * world.size)}
    metrics["data/epoch"] = state.reader.epoch
    metrics["optim/lr"] = learning_rate(config, state.step) * monitor.lr_scale
    metrics |= {"health/skipped_steps": int(state.skipped_steps), "health/reset_chains": round(reset * world.size)}
    metrics |= {"health/warning": min(monitor.warning, 1e6), "health/rollbacks": monitor.rollbacks}
    metrics |= {"health/lr_scale": monitor.lr_scale, "health/step_scale": monitor.step_scale}
    return metrics | speed(state, interval, steps, sampler.num_steps if result.has_chains else 0, flops)


def speed(state: TrainState, interval: Interval, steps: int, chain_steps: int, flops: int | None) -> dict[str, float]:
    """The metrics perf/ of `steps` steps, whose chains have `chain_steps` each."""
    config, device = state.config, state.world.device
    seconds = time.perf_counter() - interval.started
    images = config.train.batch_size * steps / seconds
    metrics = {
        "perf/step_s": seconds / steps,
        "perf/data_wait_frac": interval.waited / seconds,
        "perf/chain_steps_per_s": chain_steps * images,
        "perf/images_per_s": images,
    }
    if device.type == "cuda":
        metrics["perf/gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    if flops and (peak := peak_flops(state.world.device_name, config.train)):
        metrics["perf/mfu"] = flops * steps / seconds / (peak * state.world.size)
    return metrics


def trace(state: TrainState, batch: Batch, draw: Draw | None, tracker: Tracker | None) -> None:
    """One line of trace.jsonl: the samples and chains of the global batch, by stream."""
    chains: list[tuple[int, int, bool]] = []  # stream, slot, restarted
    if draw is not None and state.buffer is not None:
        for stream, slots, reinit in zip(state.buffer.streams, draw.slots.tolist(), draw.reinit.tolist(), strict=True):
            chains += [(stream, slot, fresh) for slot, fresh in zip(slots, reinit, strict=True)]
    per_rank = state.world.gather((batch.keys, chains))
    if tracker is not None:
        by_stream = itemgetter(0)
        samples = sorted((key for keys, _ in per_rank for key in keys), key=by_stream)
        tracker.trace(state.step, samples, sorted((chain for _, own in per_rank for chain in own), key=by_stream))


Heldout = tuple[Tensor, Tensor]  # states (N, *shape) and labels (N,), on the device


def read_heldout(state: TrainState) -> Heldout | None:
    """As many held-out images as a panel shows, on rank 0; None without any. What keeps them from being read is
    logged, and no reason to end a training."""
    config = state.config
    if config.evaluate.shards is None or not state.world.is_main:
        return None
    try:
        data, labels = few_heldout(config, config.tracking.num_samples)
    except (UserError, OSError) as error:
        log.warning(f"evaluate.shards={config.evaluate.shards} can't be read ({error}): no metrics heldout/")
        return None
    if config.energy.num_classes and not ((labels >= 0) & (labels < config.energy.num_classes)).all():
        log.warning(f"evaluate.shards={config.evaluate.shards} has no label for every image: no metrics heldout/")
        return None
    return to_states(data).to(state.world.device), labels.to(state.world.device)


def panels(
    state: TrainState, batch: Batch, result: StepResult, tracker: Tracker | None, heldout: Heldout | None
) -> dict[str, float]:
    """Shows fresh chains (as `ebm sample` draws them: from noise, averaged weights, float32), persistent chains and
    data, and histograms of energies. Returns the metrics of the fresh chains and of `heldout`, on rank 0 alone."""
    config, n = state.config, state.config.tracking.num_samples
    data, data_labels = first_data(state, batch)
    if tracker is None:
        return {}
    folded = FoldedEnergy(state.ema).refresh()
    fresh, labels = fresh_chains(
        folded,
        config.model_copy(update={"sampler": state.sampler_in_use()}).fresh_sampler,
        config.data.shape,
        n,
        config.tracking.sample_steps,
        seed=config.run.seed + state.step,
        device=state.world.device,
        num_classes=config.energy.num_classes,
        mixture=state.mixture,
    )
    show_panels(state, tracker, fresh, labels, data[:n])

    @torch.no_grad()
    def energy(x: Tensor, y: Tensor | None) -> Tensor:
        return folded(x, *(() if labels is None else (y,)))

    e_fresh, e_data = energy(fresh, labels), energy(data, data_labels)
    energies = {"energy/pos": result.e_pos, "energy/neg": result.e_neg, "energy/fresh": e_fresh}
    metrics = {
        "fresh/energy_mean": e_fresh.mean().item(),
        "fresh/auc": auc(e_data, e_fresh).item(),
        "fresh/saturated": saturated(fresh, config.sampler.bounds).item(),
        "fresh/spread": relative_spread(fresh, data),
    }
    if heldout is not None:
        energies["energy/heldout"] = e_heldout = energy(*heldout)
        metrics |= {"heldout/energy_mean": e_heldout.mean().item(), "heldout/auc": auc(e_data, e_heldout).item()}
    tracker.histograms(state.step, {name: e for name, e in energies.items() if e is not None})
    return metrics


def show_panels(state: TrainState, tracker: Tracker, fresh: Tensor, labels: Tensor | None, data: Tensor) -> None:
    config, steps = state.config, state.config.tracking.sample_steps
    panels, captions = {"samples/fresh": fresh}, {"samples/fresh": f"{steps} steps from noise, averaged weights"}
    if state.buffer is not None:
        panels["samples/buffer"] = cold_states(config.sampler, state.buffer.x[: len(fresh)].float())
        captions["samples/buffer"] = f"persistent chains, {config.sampler.num_steps} steps at each draw"
    panels["samples/data"], captions["samples/data"] = data, "training data"
    classes: dict[str, Tensor] = {}
    if labels is not None and config.energy.num_classes:
        names = state.reader.manifest.classes or ()
        for y in range(min(config.energy.num_classes, MAX_CLASSES, len(fresh))):
            title = names[y] if y < len(names) else str(y)
            key = f"samples/class_{re.sub(r'[^A-Za-z0-9_-]', '_', title)}"
            classes[key], captions[key] = fresh[labels == y], f"class {title}, {captions['samples/fresh']}"
    tracker.panels(state.step, panels, {key: f"step {state.step}: {text}" for key, text in captions.items()}, classes)


def first_data(state: TrainState, batch: Batch) -> tuple[Tensor, Tensor]:
    """The first data of each stream's part of this step, in all as many as a panel shows or a few more, as states
    (N, *shape), and their labels (N,). They do not depend on the number of ranks."""
    streams = state.config.data.streams
    each = -(-state.config.tracking.num_samples // streams)
    own = streams // state.world.size
    images, labels = (
        to_device(x.reshape(own, -1, *x.shape[1:])[:, :each].flatten(0, 1), state.world.device)
        for x in (batch.images, batch.labels)
    )
    images, labels = state.world.concatenate(images), state.world.concatenate(labels)
    return dequantize(images, None) if images.dtype == torch.uint8 else images, labels


def relative_spread(chains: Tensor, data: Tensor) -> float:
    """How much `chains` (N, *shape) differ from each other, as a share of how much `data` (M, *shape) do: the ratio of
    the standard deviations, root mean square over the components. 0: the chains are all alike.

    Images are compared by the means of COARSE x COARSE fields: chains keep noise in each pixel, which would make one
    picture look like many.
    """
    ours, theirs = (coarse(x.float()).var(dim=0, correction=0).mean().sqrt() for x in (chains, data))
    return (ours / theirs).item()


def coarse(x: Tensor) -> Tensor:
    """The means of an image's fields, (N, C, COARSE, COARSE); of smaller images and of vectors, all their values."""
    if x.ndim != 4:
        return x
    return nn.functional.adaptive_avg_pool2d(x, (min(x.shape[2], COARSE), min(x.shape[3], COARSE)))
