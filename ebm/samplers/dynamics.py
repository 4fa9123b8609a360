"""Samplers as objects, with the names of the guide this project grew from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ebm.config.samplers import noise_scale_of, temperature_of
from ebm.samplers.base import Bounds, ChainInfo, Energy, Info, check_domain, mean_info
from ebm.samplers.langevin import BOUNDARIES as BOUNDARIES_OF_LANGEVIN
from ebm.samplers.langevin import langevin
from ebm.samplers.levels import TemperingInfo, tempering
from ebm.samplers.metropolis import BOUNDARIES, MetropolisInfo, adapted, hmc, mala
from ebm.streams import Generators, normal_

AnyInfo = TypeVar("AnyInfo", MetropolisInfo, TemperingInfo)


class Dynamics(ABC, Generic[Info]):
    """Starts chains and keeps states; a subclass says in `_call` how chains move.

    After `sample_chain`, `info` tells what happened after burn-in: a named tuple of means over the stretches between
    two kept states (`displacement` is the distance of kept states), or None if there was no step.
    """

    energy_function: Energy
    step_size: float
    bounds: Bounds
    boundary: str
    info: Info | None

    def sample_chain(
        self,
        *,
        dim: int | None = None,
        shape: Sequence[int] | None = None,
        initial_points: Tensor | None = None,
        n_samples: int = 1,
        n_steps: int = 100,
        burn_in: int = 0,
        thin: int = 1,
        return_trajectory: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """The states after `n_steps` steps, (n_samples, *shape) float32.

        With `return_trajectory`, every `thin`-th state after the first `burn_in` of the `n_steps` steps,
        (n_kept, n_samples, *shape), n_kept = (n_steps - burn_in) // thin. Chains start at `initial_points`
        (n_samples, *shape), else at N(0, I) of `shape`, or (`dim`,), inside the bounds. `dtype` is the type the
        network computes in (autocast), never the state's.
        """
        if not 0 <= burn_in <= n_steps or thin < 1:
            raise ValueError(f"burn_in={burn_in} must be in [0, n_steps={n_steps}] and thin={thin} at least 1")
        shape = (dim,) if shape is None and dim is not None else shape
        x = self._start(initial_points, shape, n_samples, device, generator)
        kept: list[Tensor] = []
        infos: list[Info] = []
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype not in (None, torch.float32)):
            x = self._burn_in(x, burn_in, generator)
            stretch, done = (thin if return_trajectory else n_steps - burn_in), burn_in
            while stretch and done + stretch <= n_steps:
                x, info = self._call(x, stretch, done, self.step_size, generator)
                done += stretch
                infos.append(info)
                kept.append(self._state(x))
        self.info = mean_info(infos) if infos else None
        if not return_trajectory:
            return self._state(x)
        return torch.stack(kept) if kept else x.new_empty(0, *self._state(x).shape)

    @abstractmethod
    def _call(
        self, x: Tensor, num_steps: int, done: int, step_size: float | Tensor, generator: Generators
    ) -> tuple[Tensor, Info]:
        """The states and info after `num_steps` more steps; `done` steps have been taken before."""

    def _burn_in(self, x: Tensor, num_steps: int, generator: Generators) -> Tensor:
        return self._call(x, num_steps, 0, self.step_size, generator)[0] if num_steps else x

    def _state(self, x: Tensor) -> Tensor:
        """The part of the moving state `x` that is kept."""
        return x

    def _start(
        self,
        points: Tensor | None,
        shape: Sequence[int] | None,
        n_samples: int,
        device: torch.device | str | None,
        generator: Generators,
    ) -> Tensor:
        if points is not None and shape is None:
            return points.detach().to(device or points.device, torch.float32)
        if points is not None or shape is None:
            raise ValueError("say where chains start by initial_points, or by one of shape and dim")
        x = normal_(torch.empty(n_samples, *shape, device=device or self._device()), generator)
        return x if self.bounds is None else x.clamp_(*self.bounds)

    def _device(self) -> torch.device:
        """The device of the energy's parameters; the CPU for an energy that has none."""
        parameters = self.energy_function.parameters() if isinstance(self.energy_function, torch.nn.Module) else ()
        return next((parameter.device for parameter in parameters), torch.device("cpu"))

    def _settings(self, step_size: float | Tensor, generator: Generators) -> dict[str, Any]:
        """The arguments that all samplers take."""
        return {"step_size": step_size, "bounds": self.bounds, "boundary": self.boundary, "generator": generator}


class LangevinDynamics(Dynamics[ChainInfo]):
    """Samples p(x) ~ exp(-E(x) / T) by the unadjusted Langevin algorithm (`ebm.samplers.langevin`).

    `noise_scale` and `temperature` are two ways to say the same, T = noise_scale**2 / (2 * step_size); without either,
    T = 1 (exact noise).
    """

    def __init__(
        self,
        energy_function: Energy,
        step_size: float = 0.01,
        *,
        noise_scale: float | None = None,
        temperature: float | None = None,
        grad_clamp: float | None = None,
        bounds: Bounds = None,
        boundary: str = "clamp",
    ):
        _check_positive(step_size=step_size)
        check_domain(bounds, boundary, BOUNDARIES_OF_LANGEVIN)
        if noise_scale is not None and temperature is not None:
            raise ValueError("give noise_scale or temperature, not both")
        if min(noise_scale or 0, temperature or 0) < 0:
            raise ValueError(f"noise_scale={noise_scale} and temperature={temperature} must be at least 0")
        if noise_scale is None:
            noise_scale = noise_scale_of(step_size, 1.0 if temperature is None else temperature)
        self.energy_function, self.step_size, self.noise_scale = energy_function, step_size, noise_scale
        self.grad_clamp, self.bounds, self.boundary, self.info = grad_clamp, bounds, boundary, None

    @property
    def temperature(self) -> float:
        """T of exp(-E / T), which these steps sample with this noise."""
        return temperature_of(self.step_size, self.noise_scale)

    def _call(
        self, x: Tensor, num_steps: int, done: int, step_size: float | Tensor, generator: Generators
    ) -> tuple[Tensor, ChainInfo]:
        settings = self._settings(step_size, generator) | {"grad_clamp": self.grad_clamp}
        return langevin(self.energy_function, x, num_steps=num_steps, noise_scale=self.noise_scale, **settings)


@dataclass(eq=False, repr=False)
class AdaptiveDynamics(Dynamics[AnyInfo]):
    """What the samplers with a Metropolis test share. With `adapt`, the burn-in of `sample_chain` moves `step_size`
    towards `target_acceptance`, and the steps after it keep the step size that it left. A stretch between two kept
    states costs one gradient more than its steps.
    """

    energy_function: Energy
    step_size: float = 0.01
    _: KW_ONLY
    bounds: Bounds = None
    boundary: str = "reject"
    adapt: bool = True
    target_acceptance: float = 0.574
    info: AnyInfo | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _check_positive(step_size=self.step_size)
        check_domain(self.bounds, self.boundary, BOUNDARIES)
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance={self.target_acceptance} must be between 0 and 1")

    @property
    def acceptance(self) -> float:
        """Mean acceptance probability after burn-in, in the last `sample_chain`; NaN before."""
        return float("nan") if self.info is None else self.info.acceptance.item()

    def _burn_in(self, x: Tensor, num_steps: int, generator: Generators) -> Tensor:
        if not (self.adapt and num_steps):
            return super()._burn_in(x, num_steps, generator)
        block = 5  # steps between two adaptations
        step_size, tried = torch.full((), self.step_size, device=x.device), []
        for k, done in enumerate(range(0, num_steps, block), start=1):
            x, info = self._call(x, min(block, num_steps - done), done, step_size, generator)
            step_size = adapted(step_size, info.acceptance, self.target_acceptance, 3 / k**0.6)
            tried.append(step_size.log())
        # Large changes find the step size; the mean of the last quarter averages their noise (Polyak & Juditsky 1992).
        self.step_size = torch.stack(tried[len(tried) * 3 // 4 :]).mean().exp().item()
        return x


@dataclass(eq=False, repr=False, kw_only=True)
class MetropolisAdjustedLangevin(AdaptiveDynamics[MetropolisInfo]):
    """Samples p(x) ~ exp(-E(x) / T) exactly by the Metropolis-adjusted Langevin algorithm (`ebm.samplers.mala`)."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(temperature=self.temperature)

    def _call(
        self, x: Tensor, num_steps: int, done: int, step_size: float | Tensor, generator: Generators
    ) -> tuple[Tensor, MetropolisInfo]:
        settings = self._settings(step_size, generator) | {"temperature": self.temperature}
        return mala(self.energy_function, x, num_steps=num_steps, **settings)


@dataclass(eq=False, repr=False, kw_only=True)
class HamiltonianMonteCarlo(MetropolisAdjustedLangevin):
    """Samples p(x) ~ exp(-E(x) / T) exactly by Hamiltonian Monte Carlo (`ebm.samplers.hmc`); `step_size` is that of the
    leapfrog."""

    step_size: float = field(default=0.1, kw_only=False)
    num_leapfrog: int = 5
    boundary: str = "reflect"
    target_acceptance: float = 0.65

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_leapfrog < 1:
            raise ValueError(f"num_leapfrog={self.num_leapfrog} must be at least 1")

    def _call(
        self, x: Tensor, num_steps: int, done: int, step_size: float | Tensor, generator: Generators
    ) -> tuple[Tensor, MetropolisInfo]:
        settings = self._settings(step_size, generator) | {"temperature": self.temperature}
        return hmc(self.energy_function, x, num_steps=num_steps, num_leapfrog=self.num_leapfrog, **settings)


@dataclass(eq=False, repr=False, kw_only=True)
class ParallelTempering(AdaptiveDynamics[TemperingInfo]):
    """Samples p(x) ~ exp(-E(x) / temperatures[0]) exactly by parallel tempering (`ebm.samplers.levels`), where
    single chains do not cross between modes. All replicas of a chain start at one point; the states of the cold ones
    are kept. `step_size` adapts to the mean acceptance of all levels.
    """

    temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0)
    swap_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperatures or any(hot <= cold for cold, hot in pairwise(self.temperatures)):
            raise ValueError(f"temperatures={self.temperatures} must be numbers that ascend")
        _check_positive(temperature=self.temperature)
        if self.swap_every < 1:
            raise ValueError(f"swap_every={self.swap_every} must be at least 1")

    @property
    def temperature(self) -> float:
        """T of the density that the kept states sample."""
        return self.temperatures[0]

    @property
    def swap_acceptance(self) -> float:
        """Mean probability of a swap after burn-in, in the last `sample_chain`; NaN before."""
        return float("nan") if self.info is None else self.info.swap_acceptance.item()

    def _call(
        self, x: Tensor, num_steps: int, done: int, step_size: float | Tensor, generator: Generators
    ) -> tuple[Tensor, TemperingInfo]:
        settings = self._settings(step_size, generator) | {"temperatures": self.temperatures}
        settings |= {"swap_every": self.swap_every, "steps_before": done}
        return tempering(self.energy_function, x, num_steps=num_steps, **settings)

    def _state(self, x: Tensor) -> Tensor:
        return x[:, 0].contiguous()

    def _start(
        self,
        points: Tensor | None,
        shape: Sequence[int] | None,
        n_samples: int,
        device: torch.device | str | None,
        generator: Generators,
    ) -> Tensor:
        x = super()._start(points, shape, n_samples, device, generator)
        return x.unsqueeze(1).expand(-1, len(self.temperatures), *x.shape[1:])


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name}={value} must be above 0")
