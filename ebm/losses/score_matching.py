"""Score matching: implicit, sliced and denoising; no samples of the model and no normaliser."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ebm.losses.output import Energy, LossOutput, energy_and_gradient, energy_l2, output
from ebm.streams import Generators, normal_, uniform_

PIECEWISE_LINEAR = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold)


def implicit_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    trace: str = "exact",
    num_projections: int = 1,
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |s|**2 / 2 + tr(ds/dx), with the score s = -dE/dx / temperature (Hyvarinen 2005, eq. 4).

    Consistent for densities on all of R^n; data must not be discrete: dequantise. `trace="exact"` takes a backward a
    component of x. "hutchinson" estimates it by v' (ds/dx) v with `num_projections` draws of v = +-1 (Hutchinson
    1990), a backward each. `x_neg`, `y_neg` are not used.

    Raises ValueError for a piecewise linear energy (`refuse_piecewise_linear`), or another `trace`.
    """
    refuse_piecewise_linear(energy)
    x, e_pos, score = _score(energy, x_pos, y_pos, temperature)
    if trace == "exact":
        divergence = _trace(score, x)
    elif trace == "hutchinson":
        signs = (uniform_(_repeated(x, num_projections), generator, -1, 1) >= 0).to(x.dtype) * 2 - 1
        divergence = torch.stack([_curvature(score, x, v) for v in signs.unbind(1)]).mean(0)
    else:
        raise ValueError(f"trace={trace!r} must be 'exact' or 'hutchinson'")
    return _output(e_pos, score.square().flatten(1).sum(1), divergence, l2)


def sliced_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    num_projections: int = 1,
    variance_reduction: bool = True,
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean (v's)**2 / 2 + v' (ds/dx) v over v ~ N(0, I), with the score s = -dE/dx / temperature.

    Sliced score matching (Song et al. 2019, eq. 7); with variance reduction (v's)**2 is replaced by its mean, |s|**2
    (eq. 8). Consistent as `implicit_score_matching`, and refuses the same energies.
    """
    refuse_piecewise_linear(energy)
    x, e_pos, score = _score(energy, x_pos, y_pos, temperature)
    directions = normal_(_repeated(x, num_projections), generator)
    divergence = torch.stack([_curvature(score, x, v) for v in directions.unbind(1)]).mean(0)
    if variance_reduction:
        squared = score.square().flatten(1).sum(1)
    else:
        squared = (directions * score[:, None]).flatten(2).sum(2).square().mean(1)
    return _output(e_pos, squared, divergence, l2)


def refuse_piecewise_linear(energy: Energy) -> None:
    """ValueError where `energy` holds a layer such as ReLU: its second derivative is 0 wherever it exists, so the
    trace vanishes and the loss is least for a constant. Functions called in `forward` can't be seen."""
    for name, layer in energy.named_modules() if isinstance(energy, nn.Module) else ():
        if isinstance(layer, PIECEWISE_LINEAR):
            raise ValueError(
                f"{name} is a {type(layer).__name__}: the second derivatives that score matching needs are 0; "
                "use nn.SiLU or nn.Softplus, or loss.kind=denoising, which needs none"
            )


def _score(energy: Energy, x_pos: Tensor, y_pos: Tensor | None, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x as a leaf, E(x), the score at x)"""
    x = x_pos.detach().requires_grad_(True)
    e_pos, gradient = energy_and_gradient(energy, x, y_pos)
    return x, e_pos, -gradient / temperature


def _repeated(x: Tensor, times: int) -> Tensor:
    """Room for `times` draws a state, (B, times, *shape): a sample's draws lie together."""
    return x.new_empty(len(x), times, *x.shape[1:])


def _curvature(score: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """v' (ds/dx) v, (B,)"""
    (product,) = torch.autograd.grad((score * v).sum(), x, create_graph=True, materialize_grads=True)
    return (product * v).flatten(1).sum(1)


def _trace(score: Tensor, x: Tensor) -> Tensor:
    """tr(ds/dx), (B,)"""
    rows = score.flatten(1).sum(0)  # a state's score depends on that state alone
    columns = [torch.autograd.grad(s, x, create_graph=True, materialize_grads=True)[0].flatten(1) for s in rows]
    return torch.stack([column[:, i] for i, column in enumerate(columns)]).sum(0)


def _output(e_pos: Tensor, squared: Tensor, divergence: Tensor, l2: float) -> LossOutput:
    loss = (squared / 2 + divergence).mean()
    if l2:
        loss = loss + l2 * energy_l2(e_pos)
    return output(loss, e_pos, score_squared=squared.mean(), trace=divergence.mean())


def denoising_score_matching(
    energy: Energy,
    x_pos: Tensor,
    x_neg: Tensor | None = None,
    *,
    sigmas: float | Sequence[float],
    temperature: float = 1.0,
    l2: float = 0.0,
    y_pos: Tensor | None = None,
    y_neg: Tensor | None = None,
    generator: Generators = None,
) -> LossOutput:
    """mean |sigma s(x + sigma z) + z|**2 / 2, z ~ N(0, I), with the score s = -dE/dx / temperature.

    Vincent (2011), eq. 9, weighted by sigma**2 (Song & Ermon 2019, eq. 6); with several `sigmas` each sample draws
    one (Li, Chen & Sommer 2019, as one energy for all levels). The result is not the density of the data but that
    density **smoothed** by N(0, sigma**2): of Gaussian data with covariance C it finds C + sigma**2 I, and of several
    sigmas C + (sum sigma**4 / sum sigma**2) I; subtract that to correct. `e_pos` are energies of the noisy data.
    """
    z = normal_(torch.empty_like(x_pos), generator)
    sigma = sigmas if isinstance(sigmas, float) else _drawn(sigmas, x_pos, generator)
    noisy = (x_pos + sigma * z).detach().requires_grad_(True)
    e_pos, gradient = energy_and_gradient(energy, noisy, y_pos)
    residual = z - sigma * gradient / temperature
    loss = residual.square().flatten(1).sum(1).mean() / 2
    if l2:
        loss = loss + l2 * energy_l2(e_pos)
    return output(loss, e_pos)


def _drawn(sigmas: Sequence[float], x: Tensor, generator: Generators) -> Tensor | float:
    """One of `sigmas` for each state of `x`, in a shape that multiplies it."""
    if len(sigmas) == 1:
        return sigmas[0]
    index = uniform_(x.new_empty(len(x)), generator, 0, len(sigmas)).long().clamp_max(len(sigmas) - 1)
    return x.new_tensor(sigmas)[index].view(-1, *[1] * (x.ndim - 1))
