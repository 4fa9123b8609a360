"""The measures of `python -m ebm evaluate`: functions of sets of uint8 images to flat {"metric/name": number}."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebm.errors import DataError
from ebm.evaluation.classifier import Classifier
from ebm.evaluation.frechet import frechet_distance
from ebm.evaluation.ood import auroc, ood_sets
from ebm.evaluation.quadrature import Density, kl_divergence, mode_weights

PRESENT = 0.01  # a class is present among chains if this share of them is predicted to be of it


def frechet_metrics(classifier: Classifier, train: Tensor, heldout: Tensor, chains: dict[str, Tensor]) -> dict:
    """Fréchet distance of each set of chains to the held-out images, also as a ratio to the floor: that of the
    training images, the distance of what is real to what is real."""
    target = classifier.features(heldout)
    floor = frechet_distance(classifier.features(train), target)
    if floor < 1e-9:
        raise DataError("the held-out images are the training images: evaluate.shards needs others than data.shards")
    values = {"frechet/floor": floor}
    for name, images in chains.items():
        distance = frechet_distance(classifier.features(images), target)
        values |= {f"frechet/{name}": distance, f"frechet/{name}_ratio": distance / floor}
    return values


def class_metrics(
    classifier: Classifier, num_classes: int, chains: dict[str, Tensor], heldout: tuple[Tensor, Tensor] | None
) -> dict:
    """The share of each predicted class among chains, and how many classes are present (a share of 1 % or more).

    `heldout`, images and labels, says how far the predictions can be trusted: `classes/classifier_accuracy`.
    """
    values = {}
    if heldout is not None:
        images, labels = heldout
        values["classes/classifier_accuracy"] = float((classifier.predict(images) == labels).double().mean())
    for name, images in chains.items():
        shares = torch.bincount(classifier.predict(images), minlength=num_classes).double() / len(images)
        values[f"classes/{name}_present"] = int((shares >= PRESENT).sum())
        values |= {f"classes/{name}_share_{number}": float(share) for number, share in enumerate(shares)}
    return values


def ood_metrics(energies: Callable[[Tensor], Tensor], heldout: Tensor, seed: int = 0) -> dict:
    """How well `energies`, uint8 (N, C, H, W) -> (N,), tell held-out images from those of `ood_sets`, as AUROC."""
    inside = energies(heldout)
    return {f"ood/{name}_auroc": auroc(inside, energies(images)) for name, images in ood_sets(heldout, seed).items()}


def energy_metrics(energies: Callable[[Tensor], Tensor], sets: dict[str, Tensor]) -> dict:
    """Mean energy of each set of uint8 images (N, C, H, W). Of a well-trained model all lie close together."""
    return {f"energy/{name}": float(energies(images).double().mean()) for name, images in sets.items()}


def likelihood_metrics(true: Density, learned: Density, modes: Tensor) -> dict:
    """KL(true || learned) in nats, and the share of each of `modes` (M, 2), beside the true one. By quadrature."""
    values = {"likelihood/kl": kl_divergence(true, learned)}
    shares = zip(mode_weights(true, modes).tolist(), mode_weights(learned, modes).tolist(), strict=True)
    for number, (should, share) in enumerate(shares):
        values |= {f"likelihood/mode_{number}": share, f"likelihood/mode_{number}_ratio": share / should}
    return values
