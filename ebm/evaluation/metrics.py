"""The measures of `ebm evaluate`: functions of features, energies and sets of uint8 images."""

from collections.abc import Callable

import torch
from torch import Tensor

from ebm.errors import DataError
from ebm.evaluation.classifier import Classifier
from ebm.evaluation.quadrature import Density, kl_divergence, mode_weights
from ebm.streams import generator


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Wasserstein-2 distance of the Gaussians with the moments of (N, D) and (M, D) features.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}) (Heusel et al. 2017, eq. 6), in float64, 0 or more. The
    estimate from few samples is too large, by about the same amount for sets of the same size.
    """
    (mean_a, cov_a), (mean_b, cov_b) = moments(features_a), moments(features_b)
    return _between_gaussians(mean_a, cov_a, mean_b, cov_b)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), float64."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {tuple(features.shape)}: a covariance needs (N, D) with N of 2 or more")
    if not features.isfinite().all():
        raise ValueError("features hold non-finite values: the network or the images they come from are broken")
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def _between_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """tr (C_a C_b)^{1/2} is the sum of the singular values of C_a^{1/2} C_b^{1/2}: real and stable for singular C."""
    cross = torch.linalg.svdvals(_square_root(cov_a) @ _square_root(cov_b)).sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(distance), 0.0)  # equal sets give 0 up to rounding


def _square_root(cov: Tensor) -> Tensor:
    """The symmetric square root of a covariance; eigenvalues that rounding took below 0 are 0."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def auc(e_pos: Tensor, e_neg: Tensor) -> Tensor:
    """P(E(x_neg) > E(x_pos)), ties half, from energies (P,) and (N,): .5 where chains and data can't be told apart,
    1 where every chain lies above all data. A scalar on the energies' device (Mann & Whitney 1947)."""
    ranks = torch.searchsorted(e_pos.sort().values, e_neg.contiguous())
    through = torch.searchsorted(e_pos.sort().values, e_neg.contiguous(), right=True)
    return (ranks + through).double().mean() / (2 * len(e_pos))


def auroc(energies_in: Tensor, energies_out: Tensor) -> float:
    """P(E_out > E_in) + P(E_out = E_in) / 2 over all pairs of energies (N,) and (M,), in [0, 1] (Mann & Whitney 1947).

    1: every out-of-distribution image has a higher energy than every image of the data; 0.5: as likely as not.
    """
    if not len(energies_in) or not len(energies_out):
        raise ValueError(f"AUROC of {len(energies_in)} and {len(energies_out)} energies: needs one of each or more")
    if not (energies_in.isfinite().all() and energies_out.isfinite().all()):
        raise ValueError("AUROC of non-finite energies: the network is broken, use an earlier checkpoint")
    ordered, out = energies_in.double().sort().values, energies_out.double()
    below, up_to = torch.searchsorted(ordered, out), torch.searchsorted(ordered, out, right=True)
    return float((below + up_to).double().mean() / (2 * len(ordered)))


def ood_sets(images: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Sets that are not the data, by name, each uint8 like the held-out `images` (N, C, H, W) and as many.

    flipped: upside down. noise: every value uniform. constant: each image one colour, drawn uniformly (as Du &
    Mordatch 2019). permuted: each image with its own pixels in a random order, so that its histogram is kept.
    """
    count, channels, height, width = images.shape

    def levels(shape, purpose) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator(seed, purpose))

    order = torch.rand(count, height * width, generator=generator(seed, "ood/permuted")).argsort(1)
    permuted = images.flatten(2).gather(2, order[:, None].expand(-1, channels, -1))
    return {
        "flipped": images.flip(2),
        "noise": levels(images.shape, "ood/noise"),
        "constant": levels((count, channels, 1, 1), "ood/constant").expand(images.shape),
        "permuted": permuted.reshape(images.shape),
    }


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
