"""--dry-run: the resolved config, an estimate of what a step costs, and whether what a run keeps fits the machine,
before anything is allocated or written."""

import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ebm.config import Config, TrainConfig, differences, to_yaml
from ebm.config.losses import LossConfig, ScoreMatchingConfig
from ebm.data.reader import reader_bytes
from ebm.energies import BaseEnergyFunction, FoldedEnergy, build_energy
from ebm.energies.factory import chain_dtype
from ebm.errors import ConfigError
from ebm.inference.images import strongly_augmented
from ebm.losses import field_of, loss_of
from ebm.runtime.distributed import World, choose_device
from ebm.samplers.base import evaluate
from ebm.samplers.factory import chain_shape, negative_states, sampler_of, with_replicas
from ebm.streams import generator, uniform_
from ebm.training.negatives import ChainStart, chain_energy, recovery_over_levels, reinit_probabilities
from ebm.training.state import Objective, TrainState

log = logging.getLogger(__name__)

STREAM_BYTES = 2000  # of the generators and positions of a stream


class Demand(NamedTuple):
    """What grows with a key, in bytes of one rank."""

    key: str
    value: int
    size: int


def check_memory(config: Config, world: World) -> None:
    """Raises ConfigError where one key alone asks for more memory than there is."""
    available = memory_of(world.device)
    for key, value, size in demands(config, world.size):
        if size > available:
            fits = f"; at most {int(value * available / size)} fits" if value > 1 else ""
            auto = key == "buffer.size" and config.buffer.size == "auto"
            raise ConfigError(
                f"{key}={f'auto, which is {value},' if auto else value} takes {size / 1e9:.3g} GB on each rank, and "
                f"there are {available / 1e9:.3g} GB{fits}: {'raise buffer.age' if auto else f'lower {key}'}, or use "
                "more ranks"
            )


def demands(config: Config, ranks: int) -> list[Demand]:
    """The least that a rank needs for each key that bounds what it keeps."""
    datum = math.prod(config.data.shape)
    per_stream = Demand("data.streams", config.data.streams, STREAM_BYTES * config.data.streams // ranks)
    batch = config.train.batch_size // ranks // config.train.accumulate
    found = [per_stream, Demand("train.batch_size", config.train.batch_size, 4 * datum * batch)]
    found.append(Demand("tracking.num_samples", config.tracking.num_samples, 4 * datum * config.tracking.num_samples))
    if config.loss.negatives == "persistent":
        itemsize = getattr(torch, config.buffer.dtype).itemsize
        chain = math.prod(chain_shape(config.sampler, config.data.shape)) * itemsize + 4  # and its age
        found.append(Demand("buffer.size", config.buffer_size, config.buffer_size // ranks * chain))
    return found


# Dense peak of common GPUs by their data sheets, in TFLOP/s: bf16 and fp16, and float32 without TF32.
PEAKS = {"B200": (2250, 75), "H200": (989, 67), "GH200": (989, 67), "H100 PCIe": (756, 51), "H100": (989, 67),
         "A100": (312, 19.5), "L40S": (362, 92), "A40": (150, 37), "A10": (125, 31), "L4": (121, 30)}  # fmt: skip


def peak_flops(device: str, config: TrainConfig) -> float | None:
    """FLOP/s that a GPU of this name reaches at most in the run's precision; None where it is not known."""
    found = next((peaks for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
    if found is None:
        return None
    half, single = found
    return 1e12 * (half if config.mixed_precision != "no" else half / 2 if config.tf32 else single)


def run_facts(state: TrainState, beat: Callable[[], None]) -> dict[str, Any]:
    """What the run computes on, how large it is, and its data: what its W&B config has beside the config. All ranks
    together. The FLOPs of a step are counted where anybody asks for them, by rank 0, while all call `beat`."""
    config, world = state.config, state.world
    hosts = world.gather(socket.gethostname())
    facts: dict[str, Any] = {
        "world_size": world.size,
        "nodes": len(set(hosts)),
        "device": world.device_name,
        "precision": world.precision,
        "parameters": sum(p.numel() for p in state.energy.parameters()),
        "data": state.data.name,
        "data_identity": state.data.identity,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    if config.tracking.wandb != "disabled" or peak_flops(world.device_name, config.train):
        facts["flops_per_step"] = world.on_main(lambda: step_flops(config), beat)
    return facts


def step_flops(config: Config) -> int | None:
    """FLOPs of one optimizer step over all ranks; None where they can't be counted."""
    try:
        cost = measure_cost(config)
    except Exception as error:  # an energy of the user's own may do what can't be counted: no reason to end a run
        log.info(f"the FLOPs of a step can't be counted ({error})")
        return None
    return (cost.chain + cost.loss) * config.train.batch_size


def memory_of(device: torch.device) -> int:
    """Bytes that one rank may use: those of its GPU, or its share of the machine's. Ranks that share a GPU are not
    counted."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


MEASURED = 64  # data, at most, on which a time is measured
FEW = 4  # data that a loss is measured on; those that compare chains need more than one


class Cost(NamedTuple):
    """The work for one datum, and for the chain beside it."""

    parameters: int
    forward: int  # FLOPs of the energy
    chain: int  # FLOPs of a chain; 0 where the objective has none
    loss: int  # FLOPs of the loss, forward and backward
    saved: int  # bytes that the loss's forward keeps for its backward, float32


def dry_run(config: Config) -> None:
    """Prints what differs from the defaults, what a step costs, how long it takes on this machine, and the whole
    config."""
    print("# differs from the defaults that --help tells:")
    for key, (default, value) in differences(config).items():
        print(f"#   {key}={json.dumps(value)}" + ("" if default is None else f" (default {json.dumps(default)})"))
    print(flush=True)
    for name, value in estimate(config).items():
        print(f"{name:<24}{value}")
    device = choose_device(config.train.device)
    seconds = step_seconds(config, device)
    if seconds is not None:
        threads = torch.get_num_threads()
        cpu = f"{threads} CPU thread{'s' * (threads > 1)} of this machine"
        where = "this GPU" if device.type == "cuda" else cpu
        print(
            f"{'time':<24}about {seconds:.2g} s a step on {where}, {_clock(seconds * config.train.steps)} for "
            f"{config.train.steps:,} steps (one process; measured on the gradient of the energy)"
        )
    print(f"\n{to_yaml(config)}")


def step_seconds(config: Config, device: torch.device) -> float | None:
    """About how long a step of one process takes here: its FLOPs at the rate of the energy's gradient, of which it
    mostly consists, measured for about a second. None where the energy has no FLOPs that count."""
    cost, batch = measure_cost(config), config.train.batch_size // config.train.accumulate
    precision = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.mixed_precision]
    energy = build_energy(config.energy, config.data.shape, config.run.seed).to(device)
    folded = FoldedEnergy(energy, chain_dtype(precision, device)).refresh()
    x = uniform_(torch.empty(min(batch, MEASURED), *config.data.shape), generator(0, "cost"), -1, 1).to(device)
    labels = torch.zeros(len(x), dtype=torch.int64, device=device) if config.energy.num_classes else None

    def gradient() -> None:
        evaluate(_chain_function(config, folded, x, labels), x)
        if device.type == "cuda":
            torch.cuda.synchronize()

    each = flops(gradient) / len(x)
    times: list[float] = []
    if not each:
        return None
    while len(times) < 2 or sum(times) < 0.5:
        began = time.perf_counter()
        gradient()
        times.append(time.perf_counter() - began)
    return (cost.chain + cost.loss) * config.train.batch_size / (each * len(x)) * median(times)


def _clock(seconds: float) -> str:
    """A duration in the unit that it is read in."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def estimate(config: Config) -> dict[str, str]:
    """Model size, FLOPs and memory of one optimizer step: measured on a few data, scaled to the batch."""
    cost, batch = measure_cost(config), config.train.batch_size
    halved = 0.5 if config.train.mixed_precision != "no" else 1.0
    persistent, step = config.loss.negatives == "persistent", cost.chain + cost.loss
    itemsize = getattr(torch, config.buffer.dtype).itemsize
    state = torch.Size(chain_shape(config.sampler, config.data.shape)).numel() * itemsize + 4  # and its age
    chains = f"{config.buffer_size:,} chains, {_human(config.buffer_size * state, 'B')} over all processes"
    return {
        "parameters": f"{cost.parameters:,}",
        "forward": f"{_human(cost.forward, 'FLOP')} an image",
        "step": f"{_human(step * batch, 'FLOP')} ({cost.chain / step:.0%} in the chain)",
        "weights and optimizer": f"{_human(cost.parameters * 24, 'B')} a process (weights, gradient, Adam, EMA, chain)",
        "activations": f"about {_human(cost.saved * halved * batch / config.train.accumulate, 'B')} over all processes",
        "replay buffer": chains if persistent else "none",
        "age of its chains": chain_ages(config) if persistent else "none",
        "data reader": f"at most {_human(reader_memory(config), 'B')} (one process; data.window bounds it)",
    }


def oldest_chains(config: Config) -> int:
    """Steps that a chain of the replay buffer has taken by the end of the run if it never restarts: an energy is
    trained for chains up to this age, however rarely they restart."""
    return config.chain_steps // config.buffer_size


def chain_ages(config: Config) -> str:
    """The age of `oldest_chains`, and after how many steps a chain restarts on average where that is sooner: num_steps
    / reinit_prob, from the slot that restarts most to the one that restarts least where they differ."""
    oldest, buffer, steps = oldest_chains(config), config.buffer, config.sampler.num_steps
    told = f"up to {oldest:,} steps at the end of the run"
    if buffer.reinit_prob * oldest <= steps:
        return told
    slots = config.buffer_size // config.data.streams
    likely = reinit_probabilities(buffer.reinit_prob, buffer.reinit_spread, slots)
    first, last = (f"{steps / probability:,.0f}" for probability in likely[[0, -1]].tolist())
    lives = first if buffer.reinit_spread == 1 else f"{first} (first slot) to {last} (last)"
    return f"{told}; a chain restarts after {lives} on average"


def reader_memory(config: Config) -> int:
    """Bytes, for one process with all streams: several processes have a part of the streams each."""
    data = config.data
    return reader_bytes(
        data.shape,
        streams=data.streams,
        per_stream=config.train.batch_size // data.streams,
        window=data.window,
        workers=data.workers,
    )


def measure_cost(config: Config) -> Cost:
    """The cost of the objective at a step that has chains, where any has."""
    energy = build_energy(config.energy, config.data.shape, config.run.seed)
    x = uniform_(torch.empty(FEW, *config.data.shape), generator(0, "cost"), -1, 1)
    labels = torch.zeros(FEW, dtype=torch.int64) if config.energy.num_classes else None
    step = config.train.steps  # the last: objectives with a warm-up have their chains there
    chains = config.loss.negatives_at(step) is not None
    with torch.no_grad():
        forward = flops(lambda: energy(x, *(() if labels is None else (labels,)))) // FEW
    loss, saved = loss_cost(config, energy, x, labels, step)
    folded = FoldedEnergy(energy).refresh()
    return Cost(
        parameters=sum(p.numel() for p in energy.parameters()),
        forward=forward,
        chain=chain_flops(config, folded, x, labels) if chains else 0,
        loss=loss,
        saved=saved,
    )


def chain_flops(config: Config, folded: FoldedEnergy, x: Tensor, labels: Tensor | None) -> int:
    """FLOPs of one chain: its gradients of the energy, one after the other, and what an initialiser proposes."""
    function = _chain_function(config, folded, x, labels)
    start = flops(lambda: _tied_to_levels(config, folded, x, labels))
    return (flops(lambda: evaluate(function, x)) * config.sampler.evaluations + start) // FEW


def _tied_to_levels(config: Config, folded: FoldedEnergy, x: Tensor, labels: Tensor | None) -> ChainStart | None:
    """The start of recovery chains over levels of noise for data `x`; None for others."""
    if not config.recovery_levels:
        return None
    return recovery_over_levels(config.recovery_levels, x, labels, [generator(0, "cost")], folded.proposal)


def _chain_function(
    config: Config, folded: FoldedEnergy, x: Tensor, labels: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """The energy of a chain's states (B, *shape), whose other inputs are as `x` and `labels`."""
    energy = chain_energy(config, folded)
    start = _tied_to_levels(config, folded, x, labels)
    if start is not None:
        return lambda z: energy(z, *start.extra_inputs)
    extra = [x] if config.loss.negatives == "recovery" else []
    extra += [labels] if labels is not None and config.loss.conditional_chains else []
    return lambda z: energy(z, *extra)


def loss_cost(
    config: Config, energy: BaseEnergyFunction, x: Tensor, labels: Tensor | None, step: int
) -> tuple[int, int]:
    """FLOPs and saved bytes of a loss and its gradient, a datum. The trace of exact score matching takes a backward a
    component: those are counted from Hutchinson's estimate, which takes one a projection."""
    section = config.loss
    if isinstance(section, ScoreMatchingConfig) and section.method == "exact":
        one, two = (
            loss_cost_of(section.model_copy(update={"method": "hutchinson", "num_projections": n}), config, energy, x,
                         labels, step)
            for n in (1, 2)
        )  # fmt: skip
        more = x[0].numel() - 1
        return one[0] + more * (two[0] - one[0]), one[1] + more * (two[1] - one[1])
    return loss_cost_of(section, config, energy, x, labels, step)


def loss_cost_of(
    section: LossConfig, config: Config, energy: BaseEnergyFunction, x: Tensor, labels: Tensor | None, step: int
) -> tuple[int, int]:
    field = field_of(section, config.energy, config.data.shape, torch.device("cpu"))
    objective = Objective(energy.train(), loss_of(section, strongly_augmented, field), of_scores=section.of_scores)
    chains = with_replicas(config.sampler, x.clone())
    x_neg = negative_states(config.sampler, chains) if section.negatives_at(step) is not None else None
    y_neg = labels if section.conditional_chains else None
    noise, chain = [generator(0, "cost")], sampler_of(config.sampler)[1]
    start = _tied_to_levels(config, FoldedEnergy(energy).refresh(), x, labels)
    if start is not None and start.data is not None:
        x, x_neg, chain = start.data, start.data.clone(), chain | start.for_initialiser(config)
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        return tensor

    def run() -> None:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = objective(x, x_neg, y_pos=labels, y_neg=y_neg, step=step, generator=noise, chain=chain)
        output.loss.backward()

    counted = flops(run)
    return counted // FEW, saved // FEW


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of all operations, backward passes included, by torch's formulas. (Its FlopCounterMode, which
    also tells modules apart, refuses gradients of inputs.)"""

    total: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops(action: Callable[[], object]) -> int:
    with FlopCounter() as counter:
        action()
    return counter.total


def _human(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
