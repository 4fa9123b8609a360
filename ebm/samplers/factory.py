"""From a config to the call of a sampler, and to fresh chains."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ebm.config import LangevinConfig, NoiseLevelsConfig, SamplerConfig
from ebm.config.samplers import (
    AnnealedConfig,
    DescentOfRun,
    FlowConfig,
    FreshConfig,
    NesterovConfig,
    OwnSampler,
    OwnSamplerConfig,
    noise_scale_of,
)
from ebm.energies.base import conditioned_on_noise, split_noise_level, with_noise_level
from ebm.energies.factory import FoldedEnergy
from ebm.samplers.base import ChainInfo, MixtureStart, Start, initial_
from ebm.samplers.engine import Engine
from ebm.samplers.langevin import flow, langevin, nesterov
from ebm.samplers.levels import (
    NoiseLevelsInfo,
    Proposal,
    TemperingInfo,
    annealed,
    noise_levels,
    tempering,
    tied,
    tied_start,
    untied,
)
from ebm.samplers.metropolis import MetropolisInfo, hmc, mala
from ebm.streams import StreamSources, stream_sources

STRETCH = 100  # steps of `chains_of_lengths` between two calls of `moved`
CAPTURED = 5  # stretches of a chain from which on one is captured on a GPU
Sampler = Callable[..., tuple[Tensor, ChainInfo | MetropolisInfo | TemperingInfo | NoiseLevelsInfo]]


def sampler_of(
    config: FreshConfig, num_steps: int | None = None, step_size: float | Tensor | None = None
) -> tuple[Sampler, dict[str, Any]]:
    """The sampler that a config asks for and its keyword arguments; its states have `chain_shape`.

    `num_steps` and `step_size` replace those of the config, at the same temperature: with `langevin` the noise and the
    end of a schedule follow the step size (`LangevinConfig.scaled`). The samplers with a Metropolis test also take a
    scalar tensor on the device, as adapted step sizes are.
    """
    if isinstance(config, OwnSamplerConfig):
        assert num_steps is not None and step_size is None, "the steps of an objective's own sampler are asked for"
        if isinstance(config, DescentOfRun):
            return sampler_of(config.chain, num_steps)
        return _own_sampler_of(config, num_steps)
    if config.kind == "langevin":
        assert not isinstance(step_size, Tensor), "Langevin's noise follows its step size, which must be a number"
        config = config if step_size is None else config.scaled(step_size / config.step_size)
        return langevin, settings_of(config, num_steps)
    settings: dict[str, Any] = {
        "num_steps": config.num_steps if num_steps is None else num_steps,
        "step_size": config.step_size if step_size is None else step_size,
    }
    if config.kind == "noise_levels":
        settings["log_variances"] = config.log_variances
        if config.level_moves == "annealed":
            return annealed, settings | {"anneal_steps": config.anneal_steps}
        return noise_levels, settings | {"lowest_share": config.lowest_share}
    settings |= {
        "bounds": config.bounds,
        "boundary": config.boundary,
    }
    if config.kind == "tempering":
        return tempering, settings | {"temperatures": config.temperatures, "swap_every": config.swap_every}
    settings["temperature"] = config.temperature
    if config.kind == "hmc":
        return hmc, settings | {"num_leapfrog": config.num_leapfrog}
    return mala, settings


def _own_sampler_of(config: OwnSampler, num_steps: int) -> tuple[Sampler, dict[str, Any]]:
    settings = {"num_steps": num_steps, "bounds": config.bounds}
    if isinstance(config, FlowConfig):
        return flow, settings | {"end": config.end, "method": config.method, "tolerance": config.tolerance}
    if isinstance(config, NesterovConfig):
        names = ("step_size", "momentum", "tolerance")
        return nesterov, settings | {name: getattr(config, name) for name in names}
    return langevin, settings | annealing(config, num_steps) | {"boundary": "end"}


def annealing(config: AnnealedConfig, num_steps: int) -> dict[str, Any]:
    """The steps of an annealed chain, as keyword arguments of `langevin`: the temperature falls geometrically from
    `hottest` times the last to the last, in the share `cooling` of the steps; the last step denoises.

    An energy trained by `multilevel_denoising` has at the level sigma_i the score of the data with that noise times
    (sigma_i / sigma)^2, so that a chain at that multiple of the temperature samples them (Li, Chen & Sommer 2019).
    """
    assert config.hottest is not None and config.sigma is not None and config.temperature is not None, "the loss's"
    whole = config.sigma**2 / config.temperature  # the step that denoises
    cooling = max(config.cooling * (num_steps - 1), 1)
    fractions = [min(1.0, k / cooling) for k in range(num_steps)]
    temperatures = [config.temperature * config.hottest ** (1 - f) for f in fractions]
    steps = [config.relative_step * whole] * num_steps
    noises = [noise_scale_of(step, t) for step, t in zip(steps, temperatures, strict=True)]
    if config.denoise:
        steps[-1], noises[-1] = whole, 0.0
    return {"step_size": steps, "noise_scale": noises}


def chain_shape(config: FreshConfig, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one chain's state, where a sample has `shape`: (levels, *shape) for `tempering`, which moves a
    replica a temperature; one plane more, of the noise level, for `noise_levels`; `shape` itself for all others."""
    if config.kind == "noise_levels":
        return (shape[0] + 1, *shape[1:])
    return tuple(shape) if config.levels == 1 else (config.levels, *shape)


def with_replicas(config: FreshConfig, x: Tensor) -> Tensor:
    """States (B, *chain_shape) in which all replicas of a chain are at `x` (B, *shape)."""
    if config.kind == "noise_levels":
        return with_noise_level(x, x.new_full((len(x),), config.log_variances[0]))
    return x if config.levels == 1 else x.unsqueeze(1).expand(-1, config.levels, *x.shape[1:]).contiguous()


def cold_states(config: FreshConfig, x: Tensor) -> Tensor:
    """The states (B, *shape) that sample the energy at the sampler's own temperature, of chains (B, *chain_shape)."""
    if config.kind == "noise_levels":
        return split_noise_level(x)[0]
    return x if config.levels == 1 else x[:, 0]


def negative_states(config: SamplerConfig, x: Tensor) -> Tensor:
    """The states of the negative phase, of chains (B, *chain_shape): those of `noise_levels` keep their levels, since
    the joint density of states and levels is trained; of others, `cold_states`."""
    return x if config.kind == "noise_levels" else cold_states(config, x)


def sampler_in_use(config: SamplerConfig, adapted_step: float | None, scale: float) -> SamplerConfig:
    """`config` with the step size in use: `adapted_step`, where the sampler adapts it, times `scale`, what divergence
    has left of it."""
    return config.scaled(scale if adapted_step is None else scale * adapted_step / config.step_size)


def schedule(kind: str, start: float, end: float | None, num_steps: int) -> list[float]:
    """`num_steps` values from `start` to `end` by a "linear", "cosine" or "geometric" schedule; all of them `start` for
    "constant" and "flow", and where `end` is None."""
    if kind in ("constant", "flow") or end is None or num_steps == 1:
        return [start] * num_steps
    fractions = [k / (num_steps - 1) for k in range(num_steps)]
    if kind == "geometric":
        return [start * (end / start) ** f for f in fractions]
    if kind == "cosine":
        fractions = [(1 - math.cos(math.pi * f)) / 2 for f in fractions]
    return [start + (end - start) * f for f in fractions]


def flow_temperature(time: float, start: float, maximum: float) -> float:
    """The temperature of a flow's chain at `time`: 0 before `start`, then rising linearly to `maximum` at time 1, and
    constant from there on (Balcerak et al. 2025, eq. 10)."""
    return maximum * min(max(0.0, time - start) / (1 - start), 1.0)


def settings_of(config: LangevinConfig, num_steps: int | None = None) -> dict[str, Any]:
    """The keyword arguments of `langevin` that a config asks for; `num_steps` replaces the config's."""
    num_steps = config.num_steps if num_steps is None else num_steps
    steps = schedule(config.schedule, config.step_size, config.step_size_end, num_steps)
    noises = schedule(config.schedule, config.noise, config.noise_scale_end, num_steps)
    if config.temperature is not None and config.noise_scale_end is None:
        temperatures = schedule(config.schedule, config.temperature, config.temperature_end, num_steps)
        if config.schedule == "flow":
            times = (k * config.step_size for k in range(num_steps))
            temperatures = [flow_temperature(t, config.flow_end, config.temperature) for t in times]
        noises = [noise_scale_of(step, t) for step, t in zip(steps, temperatures, strict=True)]
    return {
        "num_steps": num_steps,
        "step_size": steps,
        "noise_scale": noises,
        "grad_clamp": config.grad_clamp,
        "bounds": config.bounds,
        "boundary": config.boundary,
    }


def advance(
    engine: Engine,
    config: FreshConfig,
    x: Tensor,
    *labels: Tensor,
    num_steps: int,
    generator: StreamSources,
) -> Tensor:
    """States (B, *shape) after `num_steps` steps from `x` (B, *shape). With `tempering` all replicas of a chain start
    at `x`, and the states of the cold ones are returned. With `noise_levels` it is MALA at the lowest level, and of a
    descent what follows it there."""
    if isinstance(config, NoiseLevelsConfig):
        steps = {"num_steps": num_steps, "step_size": config.step_size}
        return engine(mala, x, *labels, generator=generator, **steps)[0]
    sampler, settings = sampler_of(config, num_steps)
    states, _ = engine(sampler, with_replicas(config, x), *labels, generator=generator, **settings)
    return cold_states(config, states)


def descended(
    engine: Engine,
    config: DescentOfRun,
    x: Tensor,
    *labels: Tensor,
    num_steps: int,
    generator: StreamSources,
    proposal: Proposal | None = None,
) -> Tensor:
    """States (B, *shape) of the lowest level from states `x` of the highest: at each level a chain of `engine`, whose
    energy is `tied`, that starts as `tied_start` says (Gao et al. 2021, algorithm 2). `num_steps`: in all, spread
    evenly over the levels; a level without a step is passed over."""
    count = len(config.log_variances) - 1
    for number in range(count):
        steps = num_steps * (number + 1) // count - num_steps * number // count
        if not steps:
            continue
        level = x.new_full((len(x),), config.log_variances[count - 1 - number])
        start = tied_start(x, level, config.log_variances, proposal, labels, generator)
        sampler, settings = sampler_of(config.chain, steps)
        u, _ = engine(sampler, start, x, level, *labels, generator=generator, **settings)
        x = untied(u, x, level, config.log_variances)
    return x


def fresh_chains(
    energy: Callable[..., Tensor],
    config: FreshConfig,
    shape: Sequence[int],
    num: int,
    num_steps: int,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    num_classes: int | None = None,
    labels: Tensor | None = None,
    mixture: MixtureStart | None = None,
    block: int = 512,
) -> tuple[Tensor, Tensor | None]:
    """Runs `num` chains of `num_steps` steps from states drawn as `config.start` says, where "mixture" stands for
    `mixture`. Returns the final states (num, *shape), and their labels (num,) or None.

    Every 32 chains have generators of their own, so the first chains depend neither on `num` nor on `block`, the
    number of chains computed at a time. The chains of a conditional energy have the given `labels` (num,), or run
    through the classes in turn.
    """
    states, labels = chains_of_lengths(
        energy, config, shape, num, (num_steps,), seed=seed, device=device, num_classes=num_classes, labels=labels,
        mixture=mixture, block=block,
    )  # fmt: skip
    return states[num_steps], labels


def chains_of_lengths(
    energy: Callable[..., Tensor],
    config: FreshConfig,
    shape: Sequence[int],
    num: int,
    lengths: Sequence[int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    num_classes: int | None = None,
    labels: Tensor | None = None,
    mixture: MixtureStart | None = None,
    block: int = 512,
    moved: Callable[[int], None] | None = None,
) -> tuple[dict[int, Tensor], Tensor | None]:
    """The states of `fresh_chains` after each of `lengths` steps, {length: states (num, *shape)}, and their labels.

    Where a long chain passes through the states of the short ones (see `can_be_continued`), one chain gives all lengths
    at the cost of the longest. `moved` is called with the number of chain steps that were taken since its last call.
    """
    group, lengths = 32, sorted(set(lengths))
    groups, at_once = range(-(-num // group)), max(1, block // group)
    # On a GPU, capturing a stretch takes as long as three of them, and pays off where it is replayed several times.
    once, engine = Engine(energy, capture=False), Engine(energy, capture=lengths[-1] >= CAPTURED * STRETCH)
    if num_classes:
        padding = torch.arange(len(groups) * group, device=device) % num_classes
        labels = padding if labels is None else torch.cat([labels.to(padding), padding[len(labels) :]])
    where = start_of(config, mixture)
    begin = partial(_start, once, config, shape, group=group, seed=seed, device=device, where=where)
    states: dict[int, list[Tensor]] = {length: [] for length in lengths}
    for first in range(0, len(groups), at_once):
        numbers = groups[first : first + at_once]
        y = () if labels is None else (labels[first * group : (first + len(numbers)) * group],)
        done = None
        for length in lengths:
            if done is None or not can_be_continued(config, done):
                x, noise, done = begin(y, numbers, num_steps=length)
                if done and moved is not None:
                    moved(done * len(x))
            while done < length:
                steps = min(length - done, STRETCH) if can_be_continued(config, done) else length
                x = advance(engine if steps == STRETCH else once, config, x, *y, num_steps=steps, generator=noise)
                done += steps
                if moved is not None:
                    moved(steps * len(x))
            states[length].append(x)
    kept = {length: torch.cat(parts)[:num] for length, parts in states.items()}
    return kept, None if labels is None else labels[:num]


def can_be_continued(config: FreshConfig, steps: int | None = None) -> bool:
    """Whether n steps and then m more give the chain of n + m steps. They do not where a schedule spans the whole
    chain, nor in tempering, whose hot replicas are dropped at the end of a call, nor in an objective's own sampler. A
    descent can be continued from its end on, after the given number of `steps`."""
    if isinstance(config, DescentOfRun):
        return steps is not None and steps >= config.length
    if isinstance(config, OwnSamplerConfig):
        return False
    return config.levels == 1 and not (isinstance(config, LangevinConfig) and config.schedule != "constant")


def start_of(config: FreshConfig, mixture: MixtureStart | None) -> Start:
    """Where the sampler's chains begin. Raises ValueError where the mixture is asked for and not there."""
    if config.start != "mixture":
        return config.start_range
    if mixture is None:
        raise ValueError("sampler.start=mixture: give the mixture that the run's chains start in")
    return mixture


def _start(
    engine: Engine,
    config: FreshConfig,
    shape: Sequence[int],
    labels: Sequence[Tensor],
    numbers: Sequence[int],
    *,
    num_steps: int,
    group: int,
    seed: int,
    device: torch.device | str,
    where: Start,
) -> tuple[Tensor, StreamSources, int]:
    """The initial states of the groups `numbers` of fresh chains of `num_steps` steps, what draws their noise, and how
    many of the steps are done. Those of `noise_levels` are annealed through the levels, in `anneal_steps` that do not
    count as the chain's; a descent is done, and counts."""
    start, noise = (stream_sources(seed, purpose, numbers, device=device) for purpose in ("start", "chain"))
    x = torch.empty(len(numbers) * group, *shape, device=device)
    x = initial_(x, start, where, labels[0] if labels else None)
    if isinstance(config, DescentOfRun):
        energy, done = engine.energy, min(num_steps, config.length)
        proposal = energy.proposal if isinstance(energy, FoldedEnergy) else None
        module = energy.module if isinstance(energy, FoldedEnergy) else energy
        x = conditioned_on_noise(module).noisiest(x)
        chains = Engine(tied(energy, config.log_variances), capture=False)
        x = descended(chains, config, x, *labels, num_steps=done, generator=noise, proposal=proposal)
        return x, noise, done
    if isinstance(config, NoiseLevelsConfig):
        settings = {name: getattr(config, name) for name in ("step_size", "log_variances", "anneal_steps")}
        z, _ = engine(
            annealed, at_highest_level(config, x), *labels, generator=noise, num_steps=config.anneal_steps, **settings
        )
        x = cold_states(config, z)
    return x, noise, 0


def at_highest_level(config: NoiseLevelsConfig, x: Tensor) -> Tensor:
    """Where chains that are annealed begin: N(0, sigma_max^2), from draws `x` (B, *shape) of N(0, 1), and the level."""
    high = config.log_variances[-1]
    return with_noise_level(x * math.exp(high / 2), x.new_full((len(x),), high))
