"""From `config.loss` to a loss."""

from collections.abc import Callable
from functools import partial

from ebm.config import losses as kinds
from ebm.losses.contrastive import (
    contrastive_divergence,
    improved_contrastive_divergence,
    joint_energy,
    marginal,
    recovery_likelihood,
)
from ebm.losses.flow_matching import energy_matching
from ebm.losses.noise_contrastive import GaussianNoise, UniformNoise, energy_discrepancy, noise_contrastive
from ebm.losses.output import LossOutput, gradient_penalty, interpolate
from ebm.losses.score_matching import denoising_score_matching, implicit_score_matching, sliced_score_matching


def loss_of(config) -> Callable[..., LossOutput]:
    """The function of a section `LossConfig`: loss(energy, x_pos, x_neg, *, step, y_pos, y_neg, generator, chain).

    `x_neg`: chains that began as `config.negatives_at(step)` says; None where it says None. `chain`: the settings
    they ran with (`ebm.samplers.settings_of`), which improved contrastive divergence goes on with.
    """
    objective = _objective(config)
    at_interpolates = isinstance(config, kinds.ContrastiveConfig) and config.gradient_penalty_at == "interpolates"

    def loss(energy, x_pos, x_neg=None, *, step, y_pos=None, y_neg=None, generator=None, chain=None) -> LossOutput:
        x_neg = x_neg if config.negatives_at(step) else None
        settings = {"l2": config.l2, "y_pos": y_pos, "y_neg": y_neg, "generator": generator}
        if config.kind == "improved_contrastive":
            settings |= _last_step(chain)
        plain = objective(energy, x_pos, x_neg, **settings)
        if not config.gradient_penalty:
            return plain
        x = interpolate(x_pos, x_neg, generator) if at_interpolates else x_pos
        of_x, y = (marginal(energy), None) if config.kind == "jem" else (energy, y_pos)
        penalty = gradient_penalty(of_x, x, y)
        terms = plain.terms | {"penalty": penalty.detach().float()}
        return plain._replace(loss=plain.loss + config.gradient_penalty * penalty, terms=terms)

    return loss


def _objective(config) -> Callable[..., LossOutput]:
    """The loss of `config` with the settings that are its own."""
    match config:
        case kinds.ImprovedContrastiveConfig():
            function, names = improved_contrastive_divergence, ("kl_steps", "kl_weight", "entropy_weight")
        case kinds.JEMConfig():
            function, names = joint_energy, ("joint", "contrastive_weight")
        case kinds.ContrastiveConfig():
            function, names = contrastive_divergence, ()
        case kinds.RecoveryConfig():
            function, names = recovery_likelihood, ()
        case kinds.EnergyMatchingConfig():
            function, names = energy_matching, ("flow_weight", "contrastive_weight", "floor", "trim")
        case kinds.ScoreMatchingConfig(method="sliced"):
            function, names = sliced_score_matching, ("num_projections", "variance_reduction", "temperature")
        case kinds.ScoreMatchingConfig():
            function = partial(implicit_score_matching, trace=config.method)
            names = ("num_projections", "temperature")
        case kinds.DenoisingConfig():
            function, names = denoising_score_matching, ("sigmas", "temperature")
        case kinds.NoiseContrastiveConfig():
            function, names = partial(noise_contrastive, noise=_noise(config)), ("ratio",)
        case kinds.EnergyDiscrepancyConfig():
            function, names = energy_discrepancy, ("time", "num_samples", "stabiliser")
    return partial(function, **{name: getattr(config, name) for name in names})


def _noise(config) -> GaussianNoise | UniformNoise:
    if config.noise == "uniform":
        return UniformNoise(*config.noise_bounds)
    return GaussianNoise(config.noise_mean, config.noise_std)


def _last_step(chain: dict) -> dict:
    """The settings of a chain's last step."""
    last = {name: chain[name] for name in ("grad_clamp", "bounds", "boundary")}
    return last | {name: chain[name][-1] for name in ("step_size", "noise_scale")}
