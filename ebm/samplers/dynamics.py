"""`LangevinDynamics`: the sampler as an object, with the names of the guide this project grew from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebm.samplers.langevin import langevin
from ebm.streams import Generators, normal_


class LangevinDynamics:
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
        if step_size <= 0:
            raise ValueError(f"step_size={step_size} must be above 0")
        if noise_scale is not None and temperature is not None:
            raise ValueError("give noise_scale or temperature, not both")
        self.energy_function, self.step_size = energy_function, step_size
        if min(noise_scale or 0, temperature or 0) < 0:
            raise ValueError(f"noise_scale={noise_scale} and temperature={temperature} must be at least 0")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds={bounds} must be (low, high) with low < high")
        if boundary not in ("clamp", "reflect"):
            raise ValueError(f"boundary={boundary!r} must be 'clamp' or 'reflect'")
        if noise_scale is None:
            noise_scale = (2 * step_size * (1.0 if temperature is None else temperature)) ** 0.5
        self.noise_scale = noise_scale
        self.settings = {"grad_clamp": grad_clamp, "bounds": bounds, "boundary": boundary}

    @property
    def temperature(self) -> float:
        return self.noise_scale**2 / (2 * self.step_size)

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
        if not return_trajectory:
            return self._advance(x, n_steps, dtype, generator)
        x, kept = self._advance(x, burn_in, dtype, generator), []
        for _ in range((n_steps - burn_in) // thin):
            x = self._advance(x, thin, dtype, generator)
            kept.append(x)
        return torch.stack(kept) if kept else x.new_empty(0, *x.shape)

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

    def _advance(self, x: Tensor, n: int, dtype: torch.dtype | None, generator: Generators) -> Tensor:
        if n == 0:
            return x
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype not in (None, torch.float32)):
            return langevin(
                self.energy_function,
                x,
                num_steps=n,
                step_size=self.step_size,
                noise_scale=self.noise_scale,
                generator=generator,
                **self.settings,
            )[0]
