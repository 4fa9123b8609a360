"""Contrastive divergence against its formula, and by what it does to a density."""

import math

import pytest
import torch
from gaussians import seeded
from test_losses_kinds import gradients
from torch import nn

from ebm import losses
from ebm.energies import LatentEnergy, MLPEnergyFunction
from ebm.losses import contrastive_divergence
from ebm.losses.contrastive import similarity_loss
from ebm.streams import normal_


def batches(n_pos=5, n_neg=7, dim=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n_pos, dim, generator=g), torch.randn(n_neg, dim, generator=g) + 1


class Counted(nn.Module):
    """An energy that keeps the batches it was called with."""

    def __init__(self, energy):
        super().__init__()
        self.energy, self.calls = energy, []

    def forward(self, x, *labels):
        self.calls.append((x, *labels))
        return self.energy(x, *labels)


class Quadratic(nn.Module):
    """E = (x - mean)^2 / 2: at temperature 1 the normal density with that mean."""

    def __init__(self, mean):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x):
        return (x - self.mean).square().sum(1) / 2


@pytest.mark.parametrize("l2", [0.0, 0.3])
def test_value_and_gradient(l2):
    """For E = w.x the gradient is mean x_pos - mean x_neg + 2 l2 (mean E x over each batch)."""
    x_pos, x_neg = batches()
    w = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    loss, found_pos, found_neg, terms = contrastive_divergence(lambda x: x @ w, x_pos, x_neg, l2=l2)
    loss.backward()
    with torch.no_grad():
        e_pos, e_neg = x_pos @ w, x_neg @ w
        value = e_pos.mean() - e_neg.mean() + l2 * ((e_pos**2).mean() + (e_neg**2).mean())
        gradient = x_pos.mean(0) - x_neg.mean(0)
        gradient += 2 * l2 * ((e_pos.unsqueeze(1) * x_pos).mean(0) + (e_neg.unsqueeze(1) * x_neg).mean(0))
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(w.grad, gradient)
    torch.testing.assert_close(found_pos, e_pos)
    torch.testing.assert_close(found_neg, e_neg)
    assert not terms and not found_pos.requires_grad and not found_neg.requires_grad


def test_matches_two_forwards_of_a_network():
    energy, (x_pos, x_neg) = MLPEnergyFunction(3, 8), batches()
    parameters = list(energy.parameters())
    together = torch.autograd.grad(contrastive_divergence(energy, x_pos, x_neg).loss, parameters, allow_unused=True)
    apart = torch.autograd.grad(energy(x_pos).mean() - energy(x_neg).mean(), parameters, allow_unused=True)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_one_forward_and_no_gradient_into_the_chain():
    x_pos, x_neg = batches()
    x_neg.requires_grad_(True)
    energy = Counted(MLPEnergyFunction(3, 8))
    contrastive_divergence(energy, x_pos, x_neg, l2=0.1).loss.backward()
    assert len(energy.calls) == 1
    assert torch.equal(energy.calls[0][0], torch.cat([x_pos, x_neg]))
    assert x_neg.grad is None


def test_labels_go_with_their_images():
    x_pos, x_neg = batches()
    energy = Counted(MLPEnergyFunction(3, 8, num_classes=4))
    y_pos, y_neg = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, 1, 0, 3, 2, 1])
    e_neg = contrastive_divergence(energy, x_pos, x_neg, y_pos=y_pos, y_neg=y_neg).e_neg
    assert torch.equal(energy.calls[0][1], torch.cat([y_pos, y_neg]))
    torch.testing.assert_close(e_neg, energy.energy(x_neg, y_neg).detach())


def test_half_precision_energies_make_a_float32_loss():
    x_pos, x_neg = batches()
    loss, e_pos, e_neg, _ = contrastive_divergence(lambda x: x.sum(1).bfloat16(), x_pos, x_neg)
    assert loss.dtype == e_pos.dtype == e_neg.dtype == torch.float32


def test_non_finite_energies_stay_visible():
    x_pos, x_neg = batches()
    x_neg[2] = torch.nan
    assert contrastive_divergence(lambda x: x.sum(1), x_pos, x_neg).loss.isnan()


def test_training_finds_the_mean_of_the_data():
    """With exact negatives this is maximum likelihood: the mean of the model goes to the mean of the data."""
    g = torch.Generator().manual_seed(1)
    data, energy = 3 + torch.randn(4000, 1, generator=g), Quadratic(-2.0)
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.2)
    for _ in range(60):
        x_neg = energy.mean.detach() + torch.randn(4000, 1, generator=g)
        optimizer.zero_grad()
        contrastive_divergence(energy, data, x_neg).loss.backward()
        optimizer.step()
    assert energy.mean.item() == pytest.approx(data.mean().item(), abs=0.05)


# Contrastive latent


def latent_energy():
    networks = [MLPEnergyFunction(2, 8, activation=name) for name in ("silu", "softplus")]
    return LatentEnergy(*networks, 4).double()


def normal(num, dim, seed=0):
    return torch.randn(num, dim, dtype=torch.float64, generator=seeded(seed))


def jittered(x, generator):
    return x + 0.1 * normal_(torch.empty_like(x), generator)


def test_contrastive_latent_written_out():
    energy, g = latent_energy(), seeded(3)
    x_pos, x_neg = normal(6, 2), normal(6, 2, seed=1)
    settings = {"views": jittered, "latent_weight": 0.3, "similarity_temperature": 0.5, "l2": 0.2}
    found = losses.contrastive_latent(energy, x_pos, x_neg, generator=seeded(3), **settings)
    f_pos, f_neg = energy.latents(x_pos), energy.latents(x_neg)
    e_pos, e_neg = f_pos.square().sum(1) / 2, f_neg.square().sum(1) / 2
    torch.testing.assert_close(energy(x_pos), e_pos)
    views = [energy.codes(jittered(x_pos, g)) for _ in range(2)]
    code, projected = energy.codes(x_pos).detach(), energy.projection(f_pos)
    cosine = ((projected / projected.norm(dim=1, keepdim=True)) * code).sum(1).mean()
    z, terms = torch.cat(views), []
    for i in range(12):
        others = [torch.exp(z[i] @ z[k] / 0.5) for k in range(12) if k != i]
        terms.append(-torch.log(torch.exp(z[i] @ z[(i + 6) % 12] / 0.5) / sum(others)))
    similarity = torch.stack(terms).mean()
    squares = 0.2 * (e_pos.square().mean() + e_neg.square().mean())
    loss = e_pos.mean() - e_neg.mean() + squares - 0.3 * cosine + similarity
    torch.testing.assert_close(found.loss, loss)
    assert found.terms["cosine"].item() == pytest.approx(cosine.item(), rel=1e-5)
    for a, b in zip(gradients(found.loss, energy), gradients(loss, energy), strict=True):
        torch.testing.assert_close(a, b)


def test_the_encoder_learns_from_views_alone():
    """The latent's own terms do not reach it, and its loss does not reach the latent."""
    energy, x = latent_energy(), normal(4, 2)
    settings = {"views": jittered, "l2": 0.0}
    losses.contrastive_latent(energy, x, x + 1, generator=seeded(3), latent_weight=0.5, **settings).loss.backward()
    with_cosine = {name: p.grad.clone() for name, p in energy.named_parameters()}
    energy.zero_grad()
    losses.contrastive_latent(energy, x, x + 1, generator=seeded(3), latent_weight=0.0, **settings).loss.backward()
    changed = {name for name, p in energy.named_parameters() if not torch.equal(p.grad, with_cosine[name])}
    assert changed and all(name.startswith(("network.", "latent.", "projection.")) for name in changed)
    assert all(with_cosine[name].any() for name in with_cosine if name != "latent.bias")


def test_similarity_is_within_a_part():
    a, b = (torch.nn.functional.normalize(normal(8, 3, seed=s), dim=1) for s in (0, 1))
    whole = similarity_loss(a, b, 0.2, parts=2)
    halves = [similarity_loss(a[part], b[part], 0.2) for part in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)
    equal = torch.eye(4, dtype=torch.float64)
    logit = math.exp(1 / 0.2)
    assert similarity_loss(equal, equal, 0.2).item() == pytest.approx(-math.log(logit / (logit + 6)))
