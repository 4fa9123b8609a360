"""Out-of-distribution detection by energy: images that are not the data should have a higher energy."""

import torch
from torch import Tensor

from ebm.streams import generator


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
