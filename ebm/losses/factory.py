"""Makes the loss that a config asks for."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ebm.config import losses as kinds
from ebm.losses.contrastive import (
    GaussianNoise,
    UniformNoise,
    contrastive_divergence,
    contrastive_latent,
    energy_discrepancy,
    improved_contrastive_divergence,
    joint_energy,
    marginal,
    noise_contrastive,
    recovery_likelihood,
)
from ebm.losses.flow_matching import energy_matching, equilibrium_matching
from ebm.losses.output import LossOutput, gradient_penalty, interpolate
from ebm.losses.score_matching import (
    denoising_score_matching,
    dual_score_matching,
    implicit_score_matching,
    multilevel_denoising,
    sliced_score_matching,
)
from ebm.streams import Generators

Views = Callable[[Tensor, Generators], Tensor]


def loss_of(config: kinds.LossConfig, views: Views | None = None) -> Callable[..., LossOutput]:
    """The function of a section `LossConfig`: loss(energy, x_pos, x_neg, *, step, y_pos, y_neg, generator, chain).

    `x_neg` are chains that started where `config.negatives_at(step)` says; None where it says None. `chain` has the
    settings they ran with (`ebm.samplers.settings_of`), with which improved contrastive divergence continues them, and
    where recovery likelihood has an initialiser what it started from.
    `views` draws another view of each of (B, C, H, W) images, which contrastive_latent needs.
    """
    objective = objective_of(config, views)
    at_interpolates = isinstance(config, kinds.ContrastiveFamily) and config.gradient_penalty_at == "interpolates"

    def loss(
        energy: Any,
        x_pos: Tensor,
        x_neg: Tensor | None = None,
        *,
        step: int,
        y_pos: Tensor | None = None,
        y_neg: Tensor | None = None,
        generator: Generators = None,
        chain: Mapping[str, Any] | None = None,
    ) -> LossOutput:
        x_neg = x_neg if config.negatives_at(step) else None
        settings = {"l2": config.l2, "y_pos": y_pos, "y_neg": y_neg, "generator": generator}
        if isinstance(config, kinds.ImprovedContrastiveConfig):
            assert chain is not None
            settings |= _last_step(chain)
        if isinstance(config, kinds.DualScoreMatchingConfig) and chain is not None:
            settings |= {name: chain[name] for name in ("log_variances", "lowest_share")}
        if isinstance(config, kinds.RecoveryConfig) and chain is not None:
            settings |= {name: chain[name] for name in ("centres", "spacing") if name in chain}
        plain = objective(energy, x_pos, x_neg, **settings)
        if not config.gradient_penalty:
            return plain
        x = interpolate(x_pos, x_neg, generator) if at_interpolates and x_neg is not None else x_pos
        of_x, y = (marginal(energy), None) if config.kind == "jem" else (energy, y_pos)
        penalty = gradient_penalty(of_x, x, y)
        terms = plain.terms | {"penalty": penalty.detach().float()}
        return plain._replace(loss=plain.loss + config.gradient_penalty * penalty, terms=terms)

    return loss


def objective_of(config: kinds.LossConfig, views: Views | None = None) -> Callable[..., LossOutput]:
    """The loss function of `config`, with the settings that only this kind has."""
    match config:
        case kinds.ContrastiveConfig():
            return contrastive_divergence
        case kinds.ContrastiveLatentConfig():
            assert views is not None, "the trainer gives them"
            function = partial(contrastive_latent, views=views)
            return _with(function, config, "latent_weight", "similarity_temperature")
        case kinds.ImprovedContrastiveConfig():
            return _with(improved_contrastive_divergence, config, "kl_steps", "kl_weight", "entropy_weight")
        case kinds.JEMConfig():
            return _with(joint_energy, config, "joint", "contrastive_weight", "bounded")
        case kinds.RecoveryConfig():
            return recovery_likelihood
        case kinds.EnergyMatchingConfig():
            return _with(
                energy_matching, config, "flow_weight", "contrastive_weight", "floor", "trim", "separate_batch"
            )
        case kinds.EquilibriumConfig():
            return _with(equilibrium_matching, config, "gradient_scale", "decay_start")
        case kinds.ScoreMatchingConfig(method="sliced"):
            names = ("num_projections", "variance_reduction", "temperature")
            return _with(sliced_score_matching, config, *names)
        case kinds.ScoreMatchingConfig():
            function = partial(implicit_score_matching, trace=config.method)
            return _with(function, config, "num_projections", "temperature")
        case kinds.DenoisingConfig():
            return _with(denoising_score_matching, config, "sigma", "temperature")
        case kinds.MultilevelDenoisingConfig():
            return _with(multilevel_denoising, config, "sigma", "sigma_min", "sigma_max", "temperature")
        case kinds.DualScoreMatchingConfig():
            return _with(dual_score_matching, config, "contrastive_weight")
        case kinds.NoiseContrastiveConfig():
            return _with(partial(noise_contrastive, noise=_noise(config)), config, "ratio")
        case kinds.EnergyDiscrepancyConfig():
            return _with(energy_discrepancy, config, "time", "num_samples", "stabiliser")


def _with(function: Callable[..., LossOutput], config: kinds.ObjectiveConfig, *names: str) -> Callable[..., LossOutput]:
    """`function` with the values that `config` has under `names`."""
    return partial(function, **{name: getattr(config, name) for name in names})


def _noise(config: kinds.NoiseContrastiveConfig) -> GaussianNoise | UniformNoise:
    if config.noise == "uniform":
        return UniformNoise(*config.noise_bounds)
    return GaussianNoise(config.noise_mean, config.noise_std)


def _last_step(chain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a chain's last step."""
    last = {name: chain[name] for name in ("grad_clamp", "bounds", "boundary")}
    return last | {name: chain[name][-1] for name in ("step_size", "noise_scale")}
