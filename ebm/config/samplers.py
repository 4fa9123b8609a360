"""sampler.*: a section a kind of sampler."""

from typing import Literal

from pydantic import Field, model_validator

from ebm.config.section import Section


class LangevinConfig(Section):
    kind: Literal["langevin"] = "langevin"
    num_steps: int = Field(20, ge=1, description="Langevin steps a training step")
    step_size: float = Field(10.0, gt=0, description="x <- x - step_size * dE/dx + noise_scale * z")
    noise_scale: float | None = Field(0.005, ge=0, description="see step_size; null where temperature is given")
    temperature: float | None = Field(None, ge=0, description="sets noise_scale = sqrt(2 step_size temperature)")
    grad_clamp: float | None = Field(0.03, gt=0, description="each component of dE/dx is clamped to +- this")
    bounds: tuple[float, float] | None = Field((-1.0, 1.0), description="states stay in this interval; null: free")
    boundary: Literal["clamp", "reflect"] = Field("clamp", description="how bounds are kept")
    schedule: Literal["constant", "linear", "cosine", "geometric"] = Field(
        "constant", description="how step_size and noise_scale go to step_size_end and noise_scale_end in a chain"
    )
    step_size_end: float | None = Field(None, gt=0, description="last step size of a chain (schedule)")
    noise_scale_end: float | None = Field(None, ge=0, description="last noise scale of a chain (schedule)")

    @model_validator(mode="before")
    @classmethod
    def _temperature_replaces_noise_scale(cls, values):
        if isinstance(values, dict) and values.get("temperature") is not None and "noise_scale" not in values:
            values = {**values, "noise_scale": None}
        return values

    @model_validator(mode="after")
    def _one_noise(self):
        if (self.noise_scale is None) == (self.temperature is None):
            raise ValueError("give exactly one of noise_scale and temperature, and set the other to null")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds {self.bounds} must be (low, high) with low < high")
        ends = self.step_size_end is not None or self.noise_scale_end is not None
        if ends != (self.schedule != "constant"):
            raise ValueError("step_size_end or noise_scale_end go together with a schedule other than constant")
        starts_at_zero = self.noise_scale == 0 or self.temperature == 0
        if self.schedule == "geometric" and (self.noise_scale_end == 0 or starts_at_zero):
            raise ValueError("a geometric schedule needs noise scales above 0; use linear or cosine")
        return self

    def scaled(self, factor: float) -> "LangevinConfig":
        """With step sizes times `factor`; the noise follows where a temperature sets it."""
        end = None if self.step_size_end is None else self.step_size_end * factor
        return self.model_copy(update={"step_size": self.step_size * factor, "step_size_end": end})

    @property
    def noise(self) -> float:
        """The noise scale, given or from the temperature: sqrt(2 step_size T)."""
        return self.noise_scale if self.noise_scale is not None else (2 * self.step_size * self.temperature) ** 0.5
