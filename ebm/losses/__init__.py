"""Losses: functions of an energy and tensors, and the loss that a config asks for."""

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
    noisy,
    noisy_pairs,
    recovery_likelihood,
    tilted,
)
from ebm.losses.factory import field_of, loss_of
from ebm.losses.flow_matching import energy_matching, equilibrium_matching
from ebm.losses.output import LossOutput, energy_l2, gradient_penalty, interpolate
from ebm.losses.score_matching import (
    at_noise_levels,
    denoising_score_matching,
    dual_score_matching,
    implicit_score_matching,
    log_normaliser,
    multilevel_denoising,
    refuse_piecewise_linear,
    sliced_score_matching,
)

__all__ = [
    "GaussianNoise",
    "LossOutput",
    "UniformNoise",
    "at_noise_levels",
    "contrastive_divergence",
    "contrastive_latent",
    "denoising_score_matching",
    "dual_score_matching",
    "energy_discrepancy",
    "energy_l2",
    "energy_matching",
    "equilibrium_matching",
    "field_of",
    "gradient_penalty",
    "implicit_score_matching",
    "improved_contrastive_divergence",
    "interpolate",
    "joint_energy",
    "log_normaliser",
    "loss_of",
    "marginal",
    "multilevel_denoising",
    "noise_contrastive",
    "noisy",
    "noisy_pairs",
    "recovery_likelihood",
    "refuse_piecewise_linear",
    "sliced_score_matching",
    "tilted",
]
