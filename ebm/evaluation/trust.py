"""Whether an energy is a density: what a Metropolis test says of the chains, where long chains drift, which classes
they lose (docs/density.md)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebm.config import HMCConfig, SamplerConfig
from ebm.inference.images import to_states
from ebm.samplers import MetropolisInfo, hmc, mala
from ebm.streams import stream_sources

ACCEPTED = 0.6  # mean acceptance from which chains sample the energy that they follow
HOLE = 1.0  # standard deviations of the data's energies by which long chains may lie below the data
CLUSTERS = 10  # stand-ins for classes, where there are no labels
WARM = 0.1  # temperature from which chains keep the noise of the data that they were trained on


def acceptance(energy: Callable[[Tensor], Tensor], x: Tensor, sampler: SamplerConfig, seed: int = 0) -> float:
    """Mean probability with which a Metropolis test accepts one step of the sampler, at its own step size and
    temperature, from states `x` (N, *shape) on the energy's device.

    An unadjusted chain samples exp(-E / T) up to a bias that falls with the step size. Where nearly all of its steps
    would be accepted the bias is small, and the energy is the density of what the chain visits; where few would, the
    chain visits another density than exp(-E / T) (Roberts & Tweedie 1996). NaN at temperature 0.
    """
    if sampler.implied_temperature <= 0:
        return math.nan
    settings: dict[str, Any] = {"temperature": sampler.implied_temperature, "bounds": sampler.bounds}
    if isinstance(sampler, HMCConfig):
        move: Callable[..., tuple[Tensor, MetropolisInfo]] = hmc
        settings |= {"step_size": sampler.step_size, "num_leapfrog": sampler.num_leapfrog}
    else:
        move, settings = mala, settings | {"step_size": sampler.last_step_size}
    settings |= {
        "num_steps": 1,
        "boundary": "reflect",
        "generator": stream_sources(seed, "acceptance", device=x.device),
    }
    inside = x if sampler.bounds is None else x.clamp(*sampler.bounds)
    found = [move(energy, part, **settings)[1].acceptance * len(part) for part in torch.split(inside, 512)]
    return float(torch.stack(found).sum()) / len(x)


def verdict(acceptance: float, drift: float = 0.0) -> str:
    """One word for an energy, from the acceptance of its chains' steps, and from the mean energy of long chains less
    that of training data, in standard deviations of the data's energies.

    `walk`: chains do not sample the energy that they follow, and its values are no log-densities. `hole`: they sample
    it, and find it low where no data is. `density`: neither.
    """
    if not acceptance >= ACCEPTED:
        return "walk"
    return "hole" if drift < -HOLE else "density"


def shares(classes: Tensor, num_classes: int) -> Tensor:
    """Share of each class among `classes` (N,), (num_classes,) float64."""
    return torch.bincount(classes, minlength=num_classes).double() / max(len(classes), 1)


def worst_share(of_chains: Tensor, of_data: Tensor) -> float:
    """The smallest share of a class among chains over its share in the data: 1 is right, 0 a class that is lost."""
    present = of_data > 0
    return float((of_chains[present] / of_data[present]).min())


def clusters(train: Tensor, seed: int = 0, most: int = 5000) -> Callable[[Tensor], Tensor]:
    """k-means of uint8 images, or vectors, (N, ...) as a function to cluster numbers (M,): classes of a set that has no
    labels (Lloyd 1982; starts by Arthur & Vassilvitskii 2007). Images are told apart by their principal components."""
    from sklearn.cluster import KMeans  # slow to load, and for data without labels alone

    x = to_states(train[:: max(1, len(train) // most)]).flatten(1).double()
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd((x - mean)[:2000], full_matrices=False)
    directions = directions[:32].T
    fitted = KMeans(CLUSTERS, n_init=4, random_state=seed % 2**32).fit(((x - mean) @ directions).numpy())
    centres = torch.from_numpy(fitted.cluster_centers_)

    def nearest(data: Tensor) -> Tensor:
        return torch.cdist((to_states(data).flatten(1).double() - mean) @ directions, centres).argmin(1)

    return nearest
