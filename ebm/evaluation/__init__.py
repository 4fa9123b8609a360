"""How good a trained energy is: measures of images, features and energies; the sets of a run that they are taken of."""

from ebm.evaluation.classifier import Classifier, ruler_of, train_classifier
from ebm.evaluation.frechet import Comparison, Distance, compare, frechet_distance, frechet_metrics
from ebm.evaluation.metrics import auc, auroc, class_metrics, energy_metrics, likelihood_metrics
from ebm.evaluation.outliers import Rates, below_the_data, ood_metrics, ood_sets, pca_gaussian, pixel_gaussian, rates
from ebm.evaluation.quadrature import CELLS, Density, density, kl_divergence, mode_weights
from ebm.evaluation.trust import acceptance, clusters, verdict, worst_share
from ebm.inference.images import from_levels, to_levels

__all__ = [
    "CELLS",
    "Classifier",
    "Comparison",
    "Density",
    "Distance",
    "Rates",
    "acceptance",
    "auc",
    "auroc",
    "below_the_data",
    "class_metrics",
    "clusters",
    "compare",
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
    "pca_gaussian",
    "pixel_gaussian",
    "rates",
    "ruler_of",
    "to_levels",
    "train_classifier",
    "verdict",
    "worst_share",
]
