"""Densities by quadrature, against closed forms."""

import math

import pytest
import torch

from ebm import evaluation


def gaussian(mean, variance):
    mean, variance = torch.tensor(mean), torch.tensor(variance)
    return lambda x: ((x - mean) ** 2 / (2 * variance)).sum(1) + 7.0  # any constant


def test_the_divergence_of_two_gaussians():
    true, learned = gaussian([1.0, -0.5], [1.0, 0.5]), gaussian([0.5, 0.0], [2.0, 1.5])
    expected = sum((math.log(b / a) + (a + d**2) / b - 1) / 2 for a, b, d in ((1.0, 2.0, 0.5), (0.5, 1.5, 0.5)))
    p, q = evaluation.density(true), evaluation.density(learned)
    assert evaluation.kl_divergence(p, q) == pytest.approx(expected, rel=1e-5)
    assert evaluation.kl_divergence(p, p) == 0
    assert float(p.mass.sum()) == pytest.approx(1, abs=1e-9)


def test_the_temperature():
    hot = evaluation.density(gaussian([0.0, 0.0], [1.0, 1.0]), temperature=2.0)
    same = evaluation.density(gaussian([0.0, 0.0], [2.0, 2.0]))
    torch.testing.assert_close(hot.log_p, same.log_p, atol=2e-5, rtol=0)  # energies of up to 150 in float32


def test_the_weights_of_modes():
    def energy(x):
        parts = [
            math.log(w) - 4 * (x - torch.tensor(m)).square().sum(1) for w, m in ((0.2, [-2.0, 1.0]), (0.8, [2.0, 1.0]))
        ]
        return -torch.logsumexp(torch.stack(parts), 0)

    weights = evaluation.mode_weights(evaluation.density(energy), torch.tensor([[2.0, 1.0], [-2.0, 1.0]]))
    torch.testing.assert_close(weights, torch.tensor([0.8, 0.2], dtype=torch.float64), atol=1e-6, rtol=0)
