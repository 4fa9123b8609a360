"""loss.*: one section for each kind of objective."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ebm.config.energies import NoiseRangeConfig
from ebm.config.samplers import (
    AnnealedConfig,
    DescentConfig,
    DescentOfRun,
    FlowConfig,
    FreshConfig,
    HMCConfig,
    LangevinConfig,
    MALAConfig,
    NesterovConfig,
    NoiseLevelsConfig,
    OwnSampler,
    SamplerConfig,
    spaced_log_variances,
)
from ebm.config.section import Section, UserPath, kind_by_default

OWN_SAMPLER = "sampler of fresh chains; null: as in training, by the section sampler"
Negatives = Literal["persistent", "data", "noise", "recovery"]  # where the chains of a step start


def check_field(path: str) -> str:
    """Raises ValueError for what is neither module:function nor the name of a safetensors file."""
    if not re.fullmatch(r"[\w.]+:\w+|.+\.safetensors", path):
        raise ValueError("must be module:function, a velocity v(x, t), or FILE.safetensors, the weights of a U-Net")
    return path


FieldPath = Annotated[UserPath, AfterValidator(check_field)]


class ObjectiveConfig(Section):
    # Whether the loss may differentiate dE/dx alone, which does not depend on a bias of the head.
    of_scores: ClassVar[bool] = False
    # Whether the loss, but for a gradient penalty, calls the energy once and never for a gradient in x.
    of_energies: ClassVar[bool] = False
    l2: float = Field(0.0, ge=0, description="weight of E(x_pos)^2 + E(x_neg)^2 (Du & Mordatch 2019)")
    gradient_penalty: float = Field(
        0.0, ge=0, description="weight of |dE/dx|^2 / 2 on data (R1, Mescheder et al. 2018)"
    )

    @property
    def conditional_chains(self) -> bool:
        """Whether each chain of a conditional energy has a label."""
        return True

    @property
    def starts_at_data(self) -> bool:
        """Whether the first half of a part's chains start at data, while the others follow a schedule."""
        return False

    @property
    def own_sampler(self) -> OwnSampler | None:
        """The sampler of fresh chains that the objective's paper has; None: the run's sampler."""
        return None

    @property
    def trained_field(self) -> str | None:
        """What names a trained velocity for the loss, as loss.field does; None: the loss takes none."""
        return None

    def fresh_sampler(self, sampler: SamplerConfig, noise: NoiseRangeConfig | None) -> FreshConfig:
        """The sampler of fresh chains: the objective's own where the run's `sampler` is Langevin, `sampler` otherwise.
        `noise`: the levels of the energy, if it has any."""
        own = self.own_sampler
        return sampler if own is None or sampler.kind != "langevin" else own.within(sampler.bounds)

    def ema_decay_at(self, step: int, decay: float) -> float:
        """The decay of the weights' averages at a step, where optim.ema_decay is `decay`."""
        return decay

    def check(self, sampler: SamplerConfig, share: int) -> None:
        """Raises ValueError where the objective does not go with the run's sampler, or with `share` data a stream that
        are computed at a time."""


class ContrastiveFamily(ObjectiveConfig):
    """What contrastive divergence, its improved form and JEM share."""

    negatives: Literal["persistent", "data", "noise"] = Field(
        "persistent",
        description="where chains start: the replay buffer (Tieleman 2008), data (CD-k, Hinton 2002), "
        "or fresh noise (Nijkamp et al. 2019)",
    )
    l2: float = Field(0.1, ge=0, description="weight of E(x_pos)^2 + E(x_neg)^2 (Du & Mordatch 2019)")
    gradient_penalty_at: Literal["data", "interpolates"] = Field(
        "data", description="interpolates: between data and chains (Gulrajani et al. 2017)"
    )

    def negatives_at(self, step: int) -> Negatives | None:
        """Where the chains of a step start; None where the step needs no chains."""
        return self.negatives


class ContrastiveConfig(ContrastiveFamily):
    """Contrastive divergence (Hinton 2002)."""

    of_energies: ClassVar[bool] = True
    kind: Literal["contrastive"] = "contrastive"


class ContrastiveLatentConfig(ContrastiveFamily):
    """Contrastive divergence; a latent of the energy is drawn to the code of an encoder that learns to tell data apart
    (CLEL, Lee et al. 2023). Needs energy.latent, and images."""

    kind: Literal["contrastive_latent"] = "contrastive_latent"
    of_energies: ClassVar[bool] = False
    l2: float = Field(1.0, ge=0, description="weight of E(x_pos)^2 + E(x_neg)^2 (Du & Mordatch 2019)")
    latent_weight: float = Field(0.01, ge=0, description="weight of the cosine of projected latent and code")
    similarity_temperature: float = Field(0.2, gt=0, description="of the encoder's contrastive loss (Chen et al. 2020)")


class ImprovedContrastiveConfig(ContrastiveFamily):
    """Contrastive divergence with the gradient through the chain's end (Du et al. 2021)."""

    kind: Literal["improved_contrastive"] = "improved_contrastive"
    kl_steps: int = Field(1, ge=1, description="Langevin steps, beyond the chain's, that are differentiated")
    kl_weight: float = Field(1.0, ge=0, description="weight of the energy at the chain's end, under frozen weights")
    entropy_weight: float = Field(
        0.3, ge=0, description="weight of the log distance to the nearest chain; components * temperature is exact"
    )


class JEMConfig(ContrastiveFamily):
    """A classifier as an energy-based model (Grathwohl et al. 2020); energy.num_classes must be set."""

    kind: Literal["jem"] = "jem"
    joint: bool = Field(False, description="chains of p(x, y), each with its label; false: of p(x)")
    contrastive_weight: float = Field(1.0, ge=0, description="weight of -log p(x) beside that of -log p(y | x)")
    bounded: bool = Field(
        False, description="tell data from chains by a logistic loss, which can't diverge, in place of -log p(x)"
    )

    @property
    def conditional_chains(self) -> bool:
        """Whether each chain has a label."""
        return self.joint


class RecoveryConfig(ObjectiveConfig):
    """Recovery likelihood (Gao et al. 2021); needs chains at temperature 1. With energy.noise_conditional it goes over
    levels of noise, which it adds itself; sampler.step_size is then that of the lowest level."""

    of_energies: ClassVar[bool] = True
    kind: Literal["recovery"] = "recovery"
    negatives: ClassVar[Negatives] = "recovery"  # at a noisy copy of the data, to which they are tied
    sigma: float = Field(0.3, gt=0, description="noise of the copy that each chain starts from and is tied to")
    levels: int | None = Field(
        None,
        ge=1,
        description="levels of noise at which the energy is learned, evenly spaced in log from sigma_min of "
        "energy.noise_conditional; chains of each are tied to the next, the last to sigma_max; null: sigma alone",
    )
    sampler: DescentConfig | None = Field(DescentConfig(), description=f"with levels: {OWN_SAMPLER}")

    def check(self, sampler: SamplerConfig, share: int) -> None:
        """Raises ValueError for chains that are not at temperature 1."""
        if sampler.kind == "tempering" or abs(sampler.implied_temperature - 1) > 1e-6:
            raise ValueError(
                "loss.kind=recovery ties chains to noisy data at temperature 1: set sampler.temperature=1 and "
                "sampler.kind=langevin, mala or hmc"
            )

    def log_variances(self, noise: NoiseRangeConfig) -> tuple[float, ...]:
        """The levels and, last, the one to which chains of the highest are tied; ascending and evenly spaced."""
        assert self.levels is not None, "there are levels where the energy has a range of them"
        return spaced_log_variances(noise.sigma_min, noise.sigma_max, self.levels + 1)

    def fresh_sampler(self, sampler: SamplerConfig, noise: NoiseRangeConfig | None) -> FreshConfig:
        """The run's chains, level by level down to the lowest; without levels, those of `sampler`."""
        if noise is None or self.sampler is None or not isinstance(sampler, LangevinConfig | MALAConfig | HMCConfig):
            return sampler
        levels = self.log_variances(noise)
        return DescentOfRun(chain=sampler, log_variances=levels, steps_a_level=self.sampler.steps_a_level)

    def negatives_at(self, step: int) -> Negatives | None:
        """Where the chains of a step start."""
        return self.negatives


class EnergyMatchingConfig(ObjectiveConfig):
    """Energy matching (Balcerak et al. 2025): a flow from N(0, I), then contrastive. Its chains have
    sampler.start=normal and sampler.schedule=flow, and in the paper sampler.boundary=end; epsilon of
    p ~ exp(-E / epsilon) is sampler.temperature."""

    kind: Literal["energy_matching"] = "energy_matching"
    of_scores: ClassVar[bool] = True
    negatives: ClassVar[Negatives] = "noise"
    warmup_steps: int = Field(10_000, ge=0, description="steps of the flow alone, before chains are run")
    flow_weight: float = Field(1.0, ge=0, description="weight of the flow's loss, a mean over components")
    field: FieldPath | None = Field(
        None,
        description="a trained velocity v(x, t), from noise at t = 0 to data at t = 1, that takes the place of data "
        "minus noise until chains are run: module:function, or FILE.safetensors of a U-Net with the energy's sizes",
    )
    contrastive_weight: float = Field(1e-3, ge=0, description="weight of E(x_pos) - E(x_neg)")
    floor: float | None = Field(0.02, gt=0, description="the weighted contrast counts down to minus this; null: no end")
    trim: float = Field(0.1, ge=0, lt=1, description="share of a stream's chains of highest energy that is left out")
    from_data: bool = Field(
        True, description="half of the chains start at data, at the full temperature at once; false: all start at noise"
    )
    separate_batch: bool = Field(
        True, description="once there are chains, half of the data are the flow's, and half are compared with chains"
    )
    second_ema_decay: float | None = Field(
        0.99, ge=0, lt=1, description="takes the place of optim.ema_decay once there are chains; null: it stays"
    )
    sampler: FlowConfig | None = Field(FlowConfig(), description=OWN_SAMPLER)

    @property
    def starts_at_data(self) -> bool:
        """Whether the first half of a part's chains start at data, at the full temperature."""
        return self.from_data

    @property
    def trained_field(self) -> str | None:
        """The velocity that the flow's loss is given until chains are run."""
        return self.field

    @property
    def own_sampler(self) -> FlowConfig | None:
        """The flow, by Heun's method, beyond the time of the data (Balcerak et al. 2025)."""
        return self.sampler

    def negatives_at(self, step: int) -> Negatives | None:
        """Where the chains of a step start; None during the warm-up."""
        return None if step <= self.warmup_steps else self.negatives

    def ema_decay_at(self, step: int, decay: float) -> float:
        """The decay of the weights' averages at a step, where optim.ema_decay is `decay`."""
        return decay if step <= self.warmup_steps or self.second_ema_decay is None else self.second_ema_decay

    def check(self, sampler: SamplerConfig, share: int) -> None:
        """Raises ValueError for chains that are no flow from N(0, I), for a share that has no halves, and for a field
        that is never used."""
        if self.field is not None and not (self.warmup_steps and self.flow_weight):
            raise ValueError(
                f"loss.field={self.field} is for the flow before chains are run, and there is none: set "
                "loss.warmup_steps and loss.flow_weight above 0, or loss.field=null"
            )
        flows = isinstance(sampler, LangevinConfig) and sampler.schedule == "flow" and sampler.start == "normal"
        if not flows:
            raise ValueError(
                "loss.kind=energy_matching flows from N(0, I): set sampler.start=normal and sampler.schedule=flow"
            )
        if share % 2 and (self.from_data or self.separate_batch):
            raise ValueError(
                f"loss.kind=energy_matching halves each stream's part of a batch, which is {share} (train.batch_size / "
                "data.streams / train.accumulate): make it even, or set loss.from_data and loss.separate_batch to false"
            )


class WithoutChains(ObjectiveConfig):
    negatives: ClassVar[None] = None

    def negatives_at(self, step: int) -> Negatives | None:
        """None: no step needs chains."""
        return None


class ScoreMatchingConfig(WithoutChains):
    kind: Literal["score_matching"] = "score_matching"
    of_scores: ClassVar[bool] = True
    method: Literal["exact", "hutchinson", "sliced"] = Field(
        "hutchinson",
        description="trace of the Hessian: exact, a backward a component (Hyvarinen 2005), or estimated (Hutchinson "
        "1990); or sliced score matching (Song et al. 2019)",
    )
    num_projections: int = Field(1, ge=1, description="random directions a datum (hutchinson, sliced)")
    variance_reduction: bool = Field(True, description="sliced: |score|^2 in place of its projections")
    temperature: float = Field(1.0, gt=0, description="T of p ~ exp(-E / T); give the sampler the same")


class DenoisingConfig(WithoutChains):
    """Denoising score matching (Vincent 2011): finds the density smoothed by the noise; set data.noise_std=0."""

    kind: Literal["denoising"] = "denoising"
    of_scores: ClassVar[bool] = True
    sigma: float = Field(0.1, gt=0, description="standard deviation of the noise on data")
    temperature: float = Field(1.0, gt=0, description="T of p ~ exp(-E / T); give the sampler the same")


class MultilevelDenoisingConfig(WithoutChains):
    """Denoising at many levels of noise with one target variance (Li, Chen & Sommer 2019); set data.noise_std=0."""

    kind: Literal["multilevel_denoising"] = "multilevel_denoising"
    of_scores: ClassVar[bool] = True
    sigma: float = Field(0.1, gt=0, description="the noise by which the learned density is smoothed near the data")
    sigma_min: float = Field(0.05, gt=0, description="the smallest level of noise on data")
    sigma_max: float = Field(1.2, gt=0, description="the largest level; between them they are spread in the logarithm")
    temperature: float = Field(1.0, gt=0, description="T of p ~ exp(-E / T); give the sampler the same")

    sampler: AnnealedConfig | None = Field(AnnealedConfig(), description=OWN_SAMPLER)

    @property
    def own_sampler(self) -> AnnealedConfig | None:
        """Langevin steps from the temperature at which the energy has the largest level's scale."""
        if self.sampler is None:
            return None
        known = {
            "hottest": (self.sigma_max / self.sigma) ** 2,
            "sigma": self.sigma,
            "temperature": self.temperature,
        }
        missing = {name: value for name, value in known.items() if getattr(self.sampler, name) is None}
        return self.sampler.model_copy(update=missing)

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if not self.sigma_min <= self.sigma <= self.sigma_max:
            raise ValueError(
                f"sigma={self.sigma} must lie between sigma_min={self.sigma_min} and sigma_max={self.sigma_max}"
            )
        return self


class EquilibriumConfig(WithoutChains):
    """Equilibrium matching (Wang & Du 2025): gradient descent on the energy leads from noise to data, but exp(-E) is
    not their density; set data.noise_std=0."""

    kind: Literal["equilibrium"] = "equilibrium"
    of_scores: ClassVar[bool] = True
    temperature: ClassVar[float] = 1.0
    gradient_scale: float = Field(4.0, gt=0, description="length of the gradient, as a multiple of data minus noise")
    decay_start: float = Field(
        0.8, ge=0, lt=1, description="share of the way from noise to data after which the gradient falls to 0"
    )
    field: FieldPath | None = Field(
        None,
        description="a trained velocity v(x, t), from noise at t = 0 to data at t = 1, that takes the place of data "
        "minus noise: module:function, or FILE.safetensors of a U-Net with the energy's sizes",
    )
    sampler: NesterovConfig | None = Field(NesterovConfig(), description=OWN_SAMPLER)

    @property
    def trained_field(self) -> str | None:
        """The velocity whose multiple the gradient is drawn to."""
        return self.field

    @property
    def own_sampler(self) -> NesterovConfig | None:
        """Gradient descent with momentum."""
        return self.sampler


class DualScoreMatchingConfig(ObjectiveConfig):
    """Dual score matching over noise levels (Guth et al. 2025), and after the warm-up contrastive divergence of the
    joint density of states and levels as well (Zhang et al. 2023). Needs energy.noise_conditional and
    sampler.kind=noise_levels; it adds the noise itself."""

    kind: Literal["dual_score_matching"] = "dual_score_matching"
    temperature: ClassVar[float] = 1.0
    contrastive_weight: float = Field(
        0.0,
        ge=0,
        description="weight of E(x_pos, t) - E(x_neg, t) with persistent chains over the levels; 0: none",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of dual score matching alone, before chains are run")

    @property
    def negatives(self) -> Negatives | None:
        """Where the chains start: in the replay buffer, if there are any."""
        return "persistent" if self.contrastive_weight else None

    def negatives_at(self, step: int) -> Negatives | None:
        """Where the chains of a step start; None where the step needs no chains."""
        return None if step <= self.warmup_steps else self.negatives


class NoiseContrastiveConfig(WithoutChains):
    """Noise contrastive estimation (Gutmann & Hyvarinen 2010)."""

    of_energies: ClassVar[bool] = True
    kind: Literal["noise_contrastive"] = "noise_contrastive"
    temperature: ClassVar[float] = 1.0
    noise: Literal["gaussian", "uniform"] = Field(
        "gaussian", description="the density of the noise that data is told from"
    )
    noise_mean: float = Field(0.0, description="gaussian: mean of every component")
    noise_std: float = Field(1.0, gt=0, description="gaussian: standard deviation of every component")
    noise_bounds: tuple[float, float] = Field((-1.0, 1.0), description="uniform: interval of every component")
    ratio: int = Field(1, ge=1, description="draws of noise a datum")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if not self.noise_bounds[0] < self.noise_bounds[1]:
            raise ValueError(f"noise_bounds {self.noise_bounds} must be (low, high) with low < high")
        return self


class EnergyDiscrepancyConfig(WithoutChains):
    """Energy discrepancy (Schroeder et al. 2023), at temperature 1."""

    of_energies: ClassVar[bool] = True
    kind: Literal["energy_discrepancy"] = "energy_discrepancy"
    temperature: ClassVar[float] = 1.0
    time: float = Field(0.05, gt=0, description="variance of each of the two steps from a datum to its draws")
    num_samples: int = Field(16, ge=1, description="draws near a datum")
    stabiliser: float = Field(1.0, ge=0, description="w: 1 is consistent at any number of draws")


LossConfig = Annotated[
    Annotated[
        ContrastiveConfig
        | ContrastiveLatentConfig
        | ImprovedContrastiveConfig
        | ScoreMatchingConfig
        | DenoisingConfig
        | MultilevelDenoisingConfig
        | NoiseContrastiveConfig
        | EnergyDiscrepancyConfig
        | RecoveryConfig
        | EnergyMatchingConfig
        | EquilibriumConfig
        | DualScoreMatchingConfig
        | JEMConfig,
        Field(discriminator="kind"),
    ],
    kind_by_default("contrastive"),
]


def check_noise_levels(
    loss: LossConfig, energy_kind: str, levels: NoiseRangeConfig | None, sampler: SamplerConfig, noise_std: float
) -> None:
    """Raises ValueError unless all that knows of noise levels, or nothing, is there. `levels`: the energy's;
    `noise_std`: data.noise_std."""
    if isinstance(loss, RecoveryConfig) and (levels is not None or loss.levels is not None):
        _check_recovery_levels(loss, levels, sampler, noise_std)
        return
    parts = (levels is not None, isinstance(sampler, NoiseLevelsConfig), loss.kind == "dual_score_matching")
    if any(parts) and not all(parts):
        raise ValueError(
            "energy.noise_conditional, sampler.kind=noise_levels and loss.kind=dual_score_matching go together: "
            f"energy.kind={energy_kind} with noise_conditional={levels}, sampler.kind={sampler.kind} and "
            f"loss.kind={loss.kind}; set all three, or none"
        )
    if levels is None or not isinstance(sampler, NoiseLevelsConfig):
        return
    if levels.initialiser is not None:
        raise ValueError(
            f"energy.noise_conditional.initialiser with loss.kind={loss.kind}, which does not train it: set it to "
            "null, or use loss.kind=recovery"
        )
    ours, theirs = (levels.sigma_min, levels.sigma_max), (sampler.sigma_min, sampler.sigma_max)
    if ours != theirs:
        raise ValueError(
            f"the energy has noise of {ours} (energy.noise_conditional.sigma_min, sigma_max) and the sampler of "
            f"{theirs}; set sampler.sigma_min and sigma_max to the energy's"
        )
    if noise_std:
        raise ValueError(
            f"data.noise_std={noise_std:g} beside loss.kind=dual_score_matching, which adds the noise of "
            "its levels itself; set data.noise_std=0"
        )


def _check_recovery_levels(
    loss: RecoveryConfig, noise: NoiseRangeConfig | None, sampler: SamplerConfig, noise_std: float
) -> None:
    """Raises ValueError, with all that is wrong, where recovery likelihood can't go over levels of noise."""
    if noise is None or loss.levels is None:
        raise ValueError(
            f"loss.kind=recovery with loss.levels={loss.levels or 'null'} and energy.noise_conditional="
            f"{'null' if noise is None else '{...}'}: set loss.levels to a number such as 6 and "
            "energy.noise_conditional={} for levels of noise, or both to null for one"
        )
    wrong = []
    if not isinstance(sampler, LangevinConfig | MALAConfig | HMCConfig):
        wrong.append(f"sampler.kind={sampler.kind}: set langevin, mala or hmc")
    elif sampler.last_step_size > noise.sigma_min**2:
        size = f"sampler.step_size={sampler.step_size:g}"
        most = noise.sigma_min**2 if sampler.kind != "hmc" else 2**0.5 * noise.sigma_min
        wrong.append(
            f"{size} overshoots what is as narrow as the noise of the lowest level: set it to {most:g} or less"
        )
    if sampler.bounds is not None:
        wrong.append(f"sampler.bounds={list(sampler.bounds)} would cut off noisy states: set null")
    if isinstance(sampler, LangevinConfig) and sampler.grad_clamp is not None:
        wrong.append(f"sampler.grad_clamp={sampler.grad_clamp:g} would change the chains' density: set null")
    if isinstance(sampler, LangevinConfig) and sampler.schedule != "constant":
        wrong.append(f"sampler.schedule={sampler.schedule}: step sizes follow the levels; set constant")
    if noise_std:
        wrong.append(f"data.noise_std={noise_std:g} beside the noise of the levels: set 0")
    if loss.gradient_penalty:
        wrong.append(f"loss.gradient_penalty={loss.gradient_penalty:g} knows no levels: set 0")
    if wrong:
        raise ValueError(f"loss.kind=recovery with loss.levels={loss.levels}: {'; '.join(wrong)}")
