"""The spectral norms of all layers together are torch's own, layer by layer, to the last bit."""

import copy
from itertools import product

import pytest
import torch
from small_networks import SMALL, images, small
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from ebm.energies import SpectralNorms


def gradients(module, x, around):
    with around:
        energies = module(x)
    return energies.detach(), *torch.autograd.grad(energies.square().mean(), list(module.parameters()))


@pytest.mark.parametrize(("kind", "training"), [*product(SMALL, (True,)), ("conv", False)])
def test_weights_vectors_and_gradients_are_torchs_own(kind, training):
    ours = small(kind, spectral_norm=True).train(training)
    theirs, norms = copy.deepcopy(ours), SpectralNorms(ours)
    for seed in range(3):
        x = images(4, (3, 8, 8)) + seed
        found, expected = gradients(ours, x, norms.computed()), gradients(theirs, x, parametrize.cached())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        state = theirs.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    assert all(module.training == training for module in ours.modules())


def test_the_work_is_one_power_iteration_however_often_a_weight_is_read():
    layer = parametrizations.spectral_norm(nn.Linear(5, 7), n_power_iterations=3)
    other = copy.deepcopy(layer)
    with SpectralNorms(layer).computed():
        weights = [layer.weight for _ in range(3)]
    expected = other.weight
    assert all(torch.equal(weight, expected) for weight in weights)
    assert torch.equal(layer.parametrizations.weight[0]._u, other.parametrizations.weight[0]._u)


def test_what_has_another_parametrisation_as_well_is_left_to_torch():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(5, 7)
    parametrize.register_parametrization(layer, "weight", Double())
    parametrizations.spectral_norm(layer)
    other = copy.deepcopy(layer)
    with SpectralNorms(layer).computed():
        weight = layer.weight
    assert torch.equal(weight, other.weight)


def test_an_error_leaves_the_layers_in_training_mode():
    layer = parametrizations.spectral_norm(nn.Linear(5, 7))
    with pytest.raises(ZeroDivisionError), SpectralNorms(layer).computed():
        raise ZeroDivisionError
    assert layer.parametrizations.weight[0].training and not parametrize._cache_enabled
