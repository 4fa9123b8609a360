"""Contrastive divergence against its formula, and by what it does to a density."""

import pytest
import torch
from torch import nn

from ebm.energies import MLPEnergyFunction
from ebm.losses import contrastive_divergence


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
