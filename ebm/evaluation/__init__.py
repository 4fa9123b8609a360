"""How good a trained energy is: functions of images, features and energies, which know nothing of runs."""

from ebm.evaluation.classifier import Classifier, train_classifier
from ebm.evaluation.metrics import (
    auroc,
    class_metrics,
    energy_metrics,
    frechet_distance,
    frechet_metrics,
    likelihood_metrics,
    ood_metrics,
    ood_sets,
)
from ebm.evaluation.quadrature import CELLS, Density, density, kl_divergence, mode_weights
from ebm.inference.images import from_levels, to_levels

__all__ = [
    "CELLS",
    "Classifier",
    "Density",
    "auroc",
    "class_metrics",
    "density",
    "energy_metrics",
    "frechet_distance",
    "frechet_metrics",
    "from_levels",
    "kl_divergence",
    "likelihood_metrics",
    "mode_weights",
    "ood_metrics",
    "ood_sets",
    "to_levels",
    "train_classifier",
]
