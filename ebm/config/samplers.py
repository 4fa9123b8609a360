"""sampler.*: one section for each kind of sampler, and what its numbers imply."""

import math
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ebm.config.section import Section, kind_by_default


def noise_scale_of(step_size: float, temperature: float) -> float:
    """The noise with which Langevin steps of `step_size` sample exp(-E / T): sqrt(2 step_size T)."""
    return math.sqrt(2 * step_size * temperature)


def temperature_of(step_size: float, noise_scale: float) -> float:
    """T of exp(-E / T), which Langevin steps with this noise sample: noise_scale**2 / (2 step_size)."""
    return noise_scale**2 / (2 * step_size)


def spaced_log_variances(sigma_min: float, sigma_max: float, num: int) -> tuple[float, ...]:
    """`num` log variances, ascending and evenly spaced, of noise from `sigma_min` to `sigma_max`."""
    low, high = 2 * math.log(sigma_min), 2 * math.log(sigma_max)
    return tuple(low + (high - low) * k / (num - 1) for k in range(num))


def check_interval(name: str, interval: tuple[float, float]) -> None:
    """Raises ValueError where `interval` is empty."""
    if not interval[0] < interval[1]:
        raise ValueError(f"{name} {interval} must be (low, high) with low < high")


class ChainConfig(Section):
    """What all samplers share."""

    bounds: tuple[float, float] | None = Field((-1.0, 1.0), description="states stay in this interval; null: free")
    start: tuple[float, float] | Literal["normal", "mixture"] | None = Field(
        None,
        description="interval that chains begin in, uniformly; normal: N(0, 1); mixture: Gaussians fitted to the data, "
        "one a class or ten without classes; null: the bounds, or [-1, 1]",
    )

    @model_validator(mode="after")
    def _intervals(self) -> Self:
        for name, interval in (("bounds", self.bounds), ("start", self.start)):
            if isinstance(interval, tuple):
                check_interval(name, interval)
        return self

    @property
    def start_range(self) -> tuple[float, float] | None:
        """The interval that chains begin in; None: N(0, 1). A mixture is kept by the run."""
        if isinstance(self.start, str):
            return None
        return self.start or self.bounds or (-1.0, 1.0)

    @property
    def levels(self) -> int:
        """Number of replicas of each chain."""
        return 1


class LangevinConfig(ChainConfig):
    kind: Literal["langevin"] = "langevin"
    adapt: ClassVar[bool] = False
    num_steps: int = Field(20, ge=1, description="Langevin steps a training step")
    step_size: float = Field(10.0, gt=0, description="x <- x - step_size * dE/dx + noise_scale * z")
    noise_scale: float | None = Field(0.005, ge=0, description="see step_size; null where temperature is given")
    temperature: float | None = Field(None, ge=0, description="sets noise_scale = sqrt(2 step_size temperature)")
    grad_clamp: float | None = Field(0.03, gt=0, description="each component of dE/dx is clamped to +- this")
    boundary: Literal["clamp", "reflect", "end"] = Field(
        "clamp", description="how bounds are kept; end: chains are free, and clamped after their last step"
    )
    schedule: Literal["constant", "linear", "cosine", "geometric", "flow"] = Field(
        "constant",
        description="how step_size and noise_scale go to their ends in a chain; flow, for energy matching: no noise up "
        "to the time flow_end, then a temperature rising to `temperature` at time 1, a step taking step_size of it",
    )
    flow_end: float = Field(0.9, ge=0, lt=1, description="time from which a flow is noisy (schedule)")
    step_size_end: float | None = Field(None, gt=0, description="last step size of a chain (schedule)")
    noise_scale_end: float | None = Field(None, ge=0, description="last noise scale of a chain (schedule)")
    temperature_end: float | None = Field(
        None, ge=0, description="last temperature of a chain (schedule): annealing from `temperature`"
    )

    @model_validator(mode="before")
    @classmethod
    def _temperature_replaces_noise_scale(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("temperature") is not None and "noise_scale" not in values:
            values = {**values, "noise_scale": None}
        return values

    @model_validator(mode="after")
    def _one_noise(self) -> Self:
        if (self.noise_scale is None) == (self.temperature is None):
            raise ValueError("give exactly one of noise_scale and temperature, and set the other to null")
        if self.temperature_end is not None and (self.temperature is None or self.noise_scale_end is not None):
            raise ValueError("temperature_end goes with temperature, and noise_scale_end is null then")
        ends = (self.step_size_end, self.noise_scale_end, self.temperature_end)
        if any(end is not None for end in ends) != (self.schedule not in ("constant", "flow")):
            raise ValueError(
                "step_size_end or noise_scale_end or temperature_end go together with a schedule other than constant"
            )
        if self.schedule == "flow" and self.temperature is None:
            raise ValueError("a flow schedule needs a temperature in the place of noise_scale")
        if self.schedule == "geometric" and 0 in (self.noise_scale, self.temperature, *ends):
            raise ValueError("a geometric schedule needs noise scales above 0; use linear or cosine")
        return self

    @property
    def noise(self) -> float:
        """The first noise scale of a chain, as given or from the temperature."""
        if self.temperature is not None:
            return noise_scale_of(self.step_size, self.temperature)
        assert self.noise_scale is not None, "the validator wants one of the two"
        return self.noise_scale

    @property
    def implied_temperature(self) -> float:
        """T of exp(-E / T), which the first steps of a chain sample with their noise."""
        return temperature_of(self.step_size, self.noise) if self.temperature is None else self.temperature

    @property
    def last_step_size(self) -> float:
        """The factor of dE/dx in a chain's last step."""
        return self.step_size if self.step_size_end is None else self.step_size_end

    @property
    def evaluations(self) -> int:
        """Gradients of the energy that a chain takes."""
        return self.num_steps

    def scaled(self, factor: float) -> Self:
        """This sampler with its step sizes times `factor`, at the same temperature: noise scales change by its root.
        A flow takes more steps in return, so that it still ends at the time num_steps * step_size or just after it."""

        def times(value: float | None, by: float) -> float | None:
            return None if value is None else value * by

        root = math.sqrt(factor)
        changes: dict[str, Any] = {
            "step_size": self.step_size * factor,
            "step_size_end": times(self.step_size_end, factor),
            "noise_scale": times(self.noise_scale, root),
            "noise_scale_end": times(self.noise_scale_end, root),
        }
        if self.schedule == "flow":
            # A quotient that is whole but for rounding is not rounded up.
            changes["num_steps"] = math.ceil(round(self.num_steps / factor, 6))
        return self.model_copy(update=changes)


class MetropolisConfig(ChainConfig):
    """What all samplers with a Metropolis test share."""

    step_size: float
    num_steps: int = Field(20, ge=1, description="steps (proposals and their tests) a training step")
    boundary: Literal["reflect", "reject"] = Field(
        "reflect", description="fold proposals beyond the bounds back, or refuse them; both are exact"
    )
    adapt: bool = Field(True, description="move step_size towards target_acceptance while training")
    adapt_rate: float = Field(0.05, gt=0, description="log step_size moves by this share of acceptance off the target")

    def scaled(self, factor: float) -> Self:
        """This sampler with its step size times `factor`. The test keeps the density whatever the step is."""
        return self.model_copy(update={"step_size": self.step_size * factor})

    @property
    def last_step_size(self) -> float:
        """The factor of dE/dx in a chain's last step."""
        return self.step_size

    @property
    def evaluations(self) -> int:
        """Gradients of the energy that a chain takes."""
        return self.num_steps + 1


class MALAConfig(MetropolisConfig):
    kind: Literal["mala"] = "mala"
    temperature: float = Field(1.0, gt=0, description="T of exp(-E / T), which is sampled exactly")
    step_size: float = Field(0.01, gt=0, description="x' = x - step_size * dE/dx + sqrt(2 step_size T) z")
    target_acceptance: float = Field(0.574, gt=0, lt=1, description="share of proposals to accept (adapt)")

    @property
    def implied_temperature(self) -> float:
        """T of exp(-E / T), which is sampled exactly."""
        return self.temperature


class HMCConfig(MetropolisConfig):
    kind: Literal["hmc"] = "hmc"
    temperature: float = Field(1.0, gt=0, description="T of exp(-E / T), which is sampled exactly")
    step_size: float = Field(0.1, gt=0, description="length of a leapfrog step, in lengths of x")
    num_leapfrog: int = Field(5, ge=1, description="leapfrog steps a proposal")
    target_acceptance: float = Field(0.65, gt=0, lt=1, description="share of proposals to accept (adapt)")

    @property
    def implied_temperature(self) -> float:
        """T of exp(-E / T), which is sampled exactly."""
        return self.temperature

    @property
    def last_step_size(self) -> float:
        """The factor of dE/dx in a chain's last step: a leapfrog step is a Langevin step of step_size**2 / 2."""
        return self.step_size**2 / 2

    @property
    def evaluations(self) -> int:
        """Gradients of the energy that a chain takes."""
        return self.num_steps * self.num_leapfrog + 1


class TemperingConfig(MetropolisConfig):
    kind: Literal["tempering"] = "tempering"
    step_size: float = Field(0.01, gt=0, description="x' = x - step_size * dE/dx + sqrt(2 step_size T) z at each level")
    target_acceptance: float = Field(0.574, gt=0, lt=1, description="share of proposals to accept (adapt)")
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1.0, 2.0, 4.0, 8.0), min_length=2, description="T of the replicas of a chain, ascending; the first is sampled"
    )
    swap_every: int = Field(1, ge=1, description="steps between swaps of neighbours; at most num_steps")

    @model_validator(mode="after")
    def _ladder(self) -> Self:
        if any(hot <= cold for cold, hot in pairwise(self.temperatures)):
            raise ValueError(f"temperatures {self.temperatures} must ascend")
        if self.swap_every > self.num_steps:
            raise ValueError(
                f"swap_every={self.swap_every} is above num_steps={self.num_steps}: no replicas would ever be swapped"
            )
        return self

    @property
    def implied_temperature(self) -> float:
        """T of exp(-E / T), which the cold replicas sample."""
        return self.temperatures[0]

    @property
    def levels(self) -> int:
        """Number of replicas of each chain."""
        return len(self.temperatures)

    @property
    def evaluations(self) -> int:
        """Gradients of the energy that a chain takes."""
        return (self.num_steps + 1) * self.levels


class NoiseLevelsConfig(ChainConfig):
    """Chains over the noise levels of an energy E(x, t). Fresh chains are annealed through the levels, then sample the
    lowest by MALA; those of training move over the levels, or are annealed too."""

    kind: Literal["noise_levels"] = "noise_levels"
    adapt: ClassVar[bool] = False
    temperature: ClassVar[float] = 1.0
    bounds: None = Field(None, description="noisy states are free")
    start: Literal["normal"] = Field("normal", description="N(0, 1), scaled to the highest level")
    num_steps: int = Field(6, ge=1, description="moves of state and level a training step")
    level_moves: Literal["tested", "annealed"] = Field(
        "tested",
        description="how training's chains change their level. tested: up and down by a Metropolis test, from data on; "
        "annealed: down from noise at the highest level, as fresh chains do, then at the lowest",
    )
    step_size: float = Field(
        0.002, gt=0, description="of MALA at the lowest level, at most a fifth of its variance; elsewhere in proportion"
    )
    sigma_min: float = Field(0.1, gt=0, description="lowest level; by default the energy's")
    sigma_max: float = Field(3.0, gt=0, description="highest level; by default the energy's")
    num_levels: int = Field(32, ge=2, description="levels that chains move over, evenly spaced in log")
    lowest_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of chains and of noisy data at the lowest level; the others have equal ones; 1: all of it. "
        "Has no effect on annealed chains",
    )
    anneal_steps: int = Field(
        200, ge=1, description="steps in which a chain is annealed: four fifths from the highest to the lowest level"
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min:g} must be below sigma_max={self.sigma_max:g}")
        return self

    def scaled(self, factor: float) -> Self:
        """This sampler with its step size times `factor`. The test keeps the density whatever the step is."""
        return self.model_copy(update={"step_size": self.step_size * factor})

    @property
    def last_step_size(self) -> float:
        """The factor of dE/dx in a chain's last step at the lowest level."""
        return self.step_size

    @property
    def implied_temperature(self) -> float:
        """T of exp(-E / T), which is sampled exactly."""
        return self.temperature

    @property
    def evaluations(self) -> int:
        """Gradients of the energy that a chain takes: one a step for the state, and one for a level that is tested."""
        tested = self.level_moves == "tested" and self.lowest_share < 1
        return (2 if tested else 1) * self.num_steps + 1

    @property
    def log_variances(self) -> tuple[float, ...]:
        """The levels, ascending and evenly spaced."""
        return spaced_log_variances(self.sigma_min, self.sigma_max, self.num_levels)


class OwnSamplerConfig(ChainConfig):
    """The sampler of fresh chains that comes with an objective. Chains are clamped to the bounds after their last step,
    and its number is asked for where they are drawn (`tracking.sample_steps`, `--steps`)."""

    bounds: tuple[float, float] | None = Field(None, description="null: those of sampler.bounds, if there are any")
    start: tuple[float, float] | Literal["normal"] | None = Field(
        "normal", description="where chains begin: N(0, 1), an interval, or null: the bounds"
    )

    @property
    def denoises(self) -> bool:
        """Whether the last step takes away the noise of the data that the energy was trained on."""
        return False

    def within(self, bounds: tuple[float, float] | None) -> Self:
        """This sampler with these bounds, unless it has its own."""
        return self if self.bounds is not None else self.model_copy(update={"bounds": bounds})


TOLERANCE = "a chain stops once the root mean square of dE/dx over its components is at most this; 0: never"


class FlowConfig(OwnSamplerConfig):
    """Follows x' = -dE/dx from time 0 to `end` in equal steps."""

    kind: Literal["flow"] = Field("flow", description="flow is the only one here")
    method: Literal["heun", "euler"] = Field("heun", description="order 2, two gradients a step; or order 1 and one")
    end: float = Field(
        2.0, gt=0, description="time at which the flow ends; data are at 1, and what follows descends the energy there"
    )
    tolerance: float = Field(0.0, ge=0, description=TOLERANCE)


class NesterovConfig(OwnSamplerConfig):
    """Gradient descent with Nesterov's momentum."""

    kind: Literal["nesterov"] = Field("nesterov", description="nesterov is the only one here")
    step_size: float = Field(0.003, gt=0, description="x <- y - step_size * dE/dx(y)")
    momentum: float = Field(0.3, ge=0, lt=1, description="y = x + momentum * (x - the x before); 0: plain descent")
    tolerance: float = Field(0.0, ge=0, description=TOLERANCE)


class AnnealedConfig(OwnSamplerConfig):
    """Langevin steps at a falling temperature, which for an energy of many levels of noise is a falling level."""

    kind: Literal["annealed"] = Field("annealed", description="annealed is the only one here")
    relative_step: float = Field(0.2, gt=0, lt=2, description="step size, in units of sigma^2 / temperature")
    hottest: float | None = Field(
        None, ge=1, description="first temperature, as a multiple of the last; null: (loss.sigma_max / loss.sigma)^2"
    )
    cooling: float = Field(0.8, gt=0, le=1, description="share of the steps in which the temperature falls")
    denoise: bool = Field(True, description="the last step is x - sigma^2 dE/dx / temperature, without noise")
    sigma: float | None = Field(None, gt=0, description="null: loss.sigma")
    temperature: float | None = Field(None, gt=0, description="T of exp(-E / T), the last; null: loss.temperature")

    @property
    def denoises(self) -> bool:
        """Whether the last step takes away the noise of the data that the energy was trained on."""
        return self.denoise


class DescentConfig(OwnSamplerConfig):
    """From the highest level of noise to the lowest, at each level by a chain tied to the state of the level above, as
    in training. Further steps are of the run's sampler at the lowest level."""

    kind: Literal["descent"] = Field("descent", description="descent is the only one here")
    bounds: None = Field(None, description="noisy states are free")
    start: Literal["normal"] = Field("normal", description="the data's Gaussian with the noise of the highest level")
    steps_a_level: int | None = Field(None, ge=1, description="chain steps at each level; null: sampler.num_steps")


class DescentOfRun(DescentConfig):
    """A descent with what it takes from its run: how chains move, and the levels, ascending and evenly spaced."""

    chain: LangevinConfig | MALAConfig | HMCConfig
    log_variances: tuple[float, ...]

    @property
    def length(self) -> int:
        """Chain steps from the highest level to the lowest."""
        return (len(self.log_variances) - 1) * (self.steps_a_level or self.chain.num_steps)


OwnSampler = FlowConfig | NesterovConfig | AnnealedConfig
SamplerConfig = Annotated[
    Annotated[
        LangevinConfig | MALAConfig | HMCConfig | TemperingConfig | NoiseLevelsConfig, Field(discriminator="kind")
    ],
    kind_by_default("langevin"),
]
FreshConfig = SamplerConfig | OwnSampler | DescentOfRun  # of fresh chains
