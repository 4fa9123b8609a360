"""Samplers as objects, with the names of the guide this project grew from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ebm.samplers.base import mean_info
from ebm.samplers.langevin import langevin
from ebm.samplers.metropolis import adapted, hmc, mala
from ebm.samplers.tempering import tempering
from ebm.streams import Generators, normal_


class Dynamics(ABC):
    """What they share: where chains start, which states are kept. A subclass says in `_call` how chains move.

    `info`, after `sample_chain`: what happened after burn-in, a named tuple of means over the stretches between two
    kept states, each as the sampler tells it (`displacement` is the distance of kept states); None without a step.
    """

    def __init__(
        self,
        energy_function: Callable[[Tensor], Tensor],
        step_size: float,
        bounds: tuple[float, float] | None,
        boundary: str,
        boundaries: tuple[str, str],
    ):
        if step_size <= 0:
            raise ValueError(f"step_size={step_size} must be above 0")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds={bounds} must be (low, high) with low < high")
        if boundary not in boundaries:
            raise ValueError(f"boundary={boundary!r} must be {' or '.join(map(repr, boundaries))}")
        self.energy_function, self.step_size = energy_function, step_size
        self.settings = {"bounds": bounds, "boundary": boundary}
        self.info: tuple | None = None

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
        x = self._start(initial_points, shape if shape is not None else dim, n_samples, device, generator)
        kept, infos = [], []
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
    def _call(self, x: Tensor, num_steps: int, done: int, step_size: float | Tensor, generator: Generators):
        """(states, info) `num_steps` steps on, after `done` of them."""

    def _burn_in(self, x: Tensor, num_steps: int, generator: Generators) -> Tensor:
        return self._call(x, num_steps, 0, self.step_size, generator)[0] if num_steps else x

    def _state(self, x: Tensor) -> Tensor:
        """Of what moves, what is kept."""
        return x

    def _start(self, points, shape, n_samples, device, generator) -> Tensor:
        if (points is None) == (shape is None):
            raise ValueError("say where chains start by initial_points, or by one of shape and dim")
        if points is not None:
            return points.detach().to(device or points.device, torch.float32)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        x = normal_(torch.empty(n_samples, *shape, device=device or self._device()), generator)
        return x if self.settings["bounds"] is None else x.clamp_(*self.settings["bounds"])

    def _device(self) -> torch.device:
        parameters = getattr(self.energy_function, "parameters", None)
        first = next(iter(parameters()), None) if parameters else None
        return torch.device("cpu") if first is None else first.device


class LangevinDynamics(Dynamics):
    """Samples p(x) ~ exp(-E(x) / T) by the unadjusted Langevin algorithm (`ebm.samplers.langevin`).

    `noise_scale` and `temperature` are two ways to say one thing, T = noise_scale**2 / (2 * step_size); with neither,
    T = 1 (exact noise).
    """

    def __init__(
        self,
        energy_function: Callable[[Tensor], Tensor],
        step_size: float = 0.01,
        *,
        noise_scale: float | None = None,
        temperature: float | None = None,
        grad_clamp: float | None = None,
        bounds: tuple[float, float] | None = None,
        boundary: str = "clamp",
    ):
        super().__init__(energy_function, step_size, bounds, boundary, ("clamp", "reflect"))
        if noise_scale is not None and temperature is not None:
            raise ValueError("give noise_scale or temperature, not both")
        if min(noise_scale or 0, temperature or 0) < 0:
            raise ValueError(f"noise_scale={noise_scale} and temperature={temperature} must be at least 0")
        if noise_scale is None:
            noise_scale = (2 * step_size * (1.0 if temperature is None else temperature)) ** 0.5
        self.noise_scale = noise_scale
        self.settings["grad_clamp"] = grad_clamp

    @property
    def temperature(self) -> float:
        return self.noise_scale**2 / (2 * self.step_size)

    def _call(self, x, num_steps, done, step_size, generator):
        settings = self.settings | {"step_size": step_size, "noise_scale": self.noise_scale}
        return langevin(self.energy_function, x, num_steps=num_steps, generator=generator, **settings)


class MetropolisAdjustedLangevin(Dynamics):
    """Samples p(x) ~ exp(-E(x) / T) exactly by the Metropolis-adjusted Langevin algorithm (`ebm.samplers.mala`).

    With `adapt`, the burn-in of `sample_chain` moves `step_size` towards `target_acceptance`; what comes after it is
    sampled with the step size that it left. A stretch between two kept states costs one gradient more than its steps.
    """

    BLOCK = 5  # steps of burn-in between two adaptations

    def __init__(
        self,
        energy_function: Callable[[Tensor], Tensor],
        step_size: float = 0.01,
        *,
        temperature: float = 1.0,
        bounds: tuple[float, float] | None = None,
        boundary: str = "reject",
        adapt: bool = True,
        target_acceptance: float = 0.574,
    ):
        super().__init__(energy_function, step_size, bounds, boundary, ("reject", "reflect"))
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if not 0 < target_acceptance < 1:
            raise ValueError(f"target_acceptance={target_acceptance} must be between 0 and 1")
        self.temperature, self.adapt, self.target_acceptance = temperature, adapt, target_acceptance

    @property
    def acceptance(self) -> float:
        """Share of accepted proposals after burn-in, in the last `sample_chain`."""
        return float("nan") if self.info is None else self.info.acceptance.item()

    def _call(self, x, num_steps, done, step_size, generator):
        settings = self.settings | {"step_size": step_size, "temperature": self.temperature}
        return mala(self.energy_function, x, num_steps=num_steps, generator=generator, **settings)

    def _burn_in(self, x, num_steps, generator):
        if not (self.adapt and num_steps):
            return super()._burn_in(x, num_steps, generator)
        step_size, tried = torch.tensor(self.step_size, device=x.device), []
        for k, done in enumerate(range(0, num_steps, self.BLOCK), start=1):
            x, info = self._call(x, min(self.BLOCK, num_steps - done), done, step_size, generator)
            step_size = adapted(step_size, info.acceptance, self.target_acceptance, 3 / k**0.6)
            tried.append(step_size.log())
        # Long steps to come near, and the mean of the last quarter against their noise (Polyak & Juditsky 1992).
        self.step_size = torch.stack(tried[len(tried) * 3 // 4 :]).mean().exp().item()
        return x


class HamiltonianMonteCarlo(MetropolisAdjustedLangevin):
    """Samples p(x) ~ exp(-E(x) / T) exactly by Hamiltonian Monte Carlo (`ebm.samplers.hmc`).

    `step_size` is that of the leapfrog; it adapts as in `MetropolisAdjustedLangevin`.
    """

    def __init__(
        self,
        energy_function: Callable[[Tensor], Tensor],
        step_size: float = 0.1,
        *,
        num_leapfrog: int = 5,
        temperature: float = 1.0,
        bounds: tuple[float, float] | None = None,
        boundary: str = "reflect",
        adapt: bool = True,
        target_acceptance: float = 0.65,
    ):
        super().__init__(
            energy_function,
            step_size,
            temperature=temperature,
            bounds=bounds,
            boundary=boundary,
            adapt=adapt,
            target_acceptance=target_acceptance,
        )
        if num_leapfrog < 1:
            raise ValueError(f"num_leapfrog={num_leapfrog} must be at least 1")
        self.num_leapfrog = num_leapfrog

    def _call(self, x, num_steps, done, step_size, generator):
        settings = self.settings | {"step_size": step_size, "temperature": self.temperature}
        settings["num_leapfrog"] = self.num_leapfrog
        return hmc(self.energy_function, x, num_steps=num_steps, generator=generator, **settings)


class ParallelTempering(MetropolisAdjustedLangevin):
    """Samples p(x) ~ exp(-E(x) / temperatures[0]) exactly by parallel tempering (`ebm.samplers.tempering`), where
    single chains do not cross between modes. All replicas of a chain start at one point; the cold ones are kept.

    `step_size` adapts as in `MetropolisAdjustedLangevin`, to the mean acceptance of all levels.
    """

    def __init__(
        self,
        energy_function: Callable[[Tensor], Tensor],
        step_size: float = 0.01,
        *,
        temperatures: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
        swap_every: int = 1,
        bounds: tuple[float, float] | None = None,
        boundary: str = "reject",
        adapt: bool = True,
        target_acceptance: float = 0.574,
    ):
        if not temperatures or any(hot <= cold for cold, hot in pairwise(temperatures)):
            raise ValueError(f"temperatures={temperatures} must be numbers that ascend")
        super().__init__(
            energy_function,
            step_size,
            temperature=temperatures[0],
            bounds=bounds,
            boundary=boundary,
            adapt=adapt,
            target_acceptance=target_acceptance,
        )
        if swap_every < 1:
            raise ValueError(f"swap_every={swap_every} must be at least 1")
        self.temperatures, self.swap_every = tuple(temperatures), swap_every

    @property
    def swap_acceptance(self) -> float:
        """Share of accepted swaps after burn-in, in the last `sample_chain`."""
        return float("nan") if self.info is None else self.info.swap_acceptance.item()

    def _call(self, x, num_steps, done, step_size, generator):
        settings = self.settings | {"step_size": step_size, "temperatures": self.temperatures}
        settings |= {"swap_every": self.swap_every, "steps_before": done}
        return tempering(self.energy_function, x, num_steps=num_steps, generator=generator, **settings)

    def _state(self, x):
        return x[:, 0].contiguous()

    def _start(self, *where):
        x = super()._start(*where)
        return x.unsqueeze(1).expand(-1, len(self.temperatures), *x.shape[1:])
