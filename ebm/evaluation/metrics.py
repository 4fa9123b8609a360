"""Measures that are functions of energies and of predicted classes; distances are in frechet, outliers in outliers."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ebm.evaluation.classifier import Classifier
from ebm.evaluation.quadrature import Density, kl_divergence, mode_weights

PRESENT = 0.01  # a class is present among chains if this share of them is predicted to be of it


def auc(e_pos: Tensor, e_neg: Tensor) -> Tensor:
    """P(E(x_neg) > E(x_pos)), ties half, from energies (P,) and (N,): .5 where chains and data can't be told apart,
    1 where every chain lies above all data. A scalar on the energies' device (Mann & Whitney 1947)."""
    ordered = e_pos.sort().values
    below = torch.searchsorted(ordered, e_neg.contiguous())
    up_to = torch.searchsorted(ordered, e_neg.contiguous(), right=True)
    return (below + up_to).double().mean() / (2 * len(e_pos))


def auroc(energies_in: Tensor, energies_out: Tensor) -> float:
    """`auc` of energies (N,) of data and (M,) of others, as a number, in [0, 1].

    1: every out-of-distribution image has a higher energy than every image of the data; 0.5: as likely as not. Raises
    ValueError where a set is empty or not finite.
    """
    if not len(energies_in) or not len(energies_out):
        raise ValueError(f"AUROC of {len(energies_in)} and {len(energies_out)} energies: needs one of each or more")
    if not (energies_in.isfinite().all() and energies_out.isfinite().all()):
        raise ValueError("AUROC of non-finite energies: the network is broken, use an earlier checkpoint")
    return float(auc(energies_in.double(), energies_out.double()))


def class_metrics(
    classifier: Classifier, num_classes: int, chains: Mapping[str, Tensor], heldout: tuple[Tensor, Tensor] | None
) -> dict[str, float]:
    """The share of each predicted class among chains, and how many classes are present (a share of 1 % or more).

    `heldout`, images and labels, says how far the predictions can be trusted: `classes/classifier_accuracy`.
    """
    values: dict[str, float] = {}
    if heldout is not None:
        images, labels = heldout
        values["classes/classifier_accuracy"] = float((classifier.predict(images) == labels).double().mean())
    for name, images in chains.items():
        shares = torch.bincount(classifier.predict(images), minlength=num_classes).double() / len(images)
        values[f"classes/{name}_present"] = int((shares >= PRESENT).sum())
        values |= {f"classes/{name}_share_{number}": float(share) for number, share in enumerate(shares)}
    return values


def energy_metrics(energies: Callable[[Tensor], Tensor], sets: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean energy of each set of images or states. Of a well-trained model all lie close together."""
    return {f"energy/{name}": float(energies(images).double().mean()) for name, images in sets.items()}


def likelihood_metrics(true: Density, learned: Density, modes: Tensor) -> dict[str, float]:
    """KL(true || learned) in nats, and the share of each of `modes` (M, 2), beside the true one. By quadrature."""
    values = {"likelihood/kl": kl_divergence(true, learned)}
    weights = zip(mode_weights(true, modes).tolist(), mode_weights(learned, modes).tolist(), strict=True)
    for number, (should, share) in enumerate(weights):
        values |= {f"likelihood/mode_{number}": share, f"likelihood/mode_{number}_ratio": share / should}
    return values
