"""The noise level as an input of an energy: closed forms of its Gaussian part, and what carries the level along."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from ebm.config import load_config
from ebm.energies import NoiseConditionalEnergy, build_energy, split_noise_level, with_noise_level
from ebm.energies.base import PLANES, BaseEnergyFunction


class Zero(BaseEnergyFunction):
    """A network that has nothing to say, or says `value`."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x.new_full((len(x),), self.value)


def states(n=50, shape=(2, 3), seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_states_carry_their_level_along(shape):
    x, level = states(7, shape), torch.linspace(-3, 2, 7)
    z = with_noise_level(x, level)
    assert z.shape == (7, shape[0] + 1, *shape[1:])
    assert all(torch.equal(a, b) for a, b in zip(split_noise_level(z), (x, level), strict=True))


def test_without_a_network_it_is_the_data_s_gaussian_with_noise():
    data = states(400, (3,)) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.3, 0.2], [0.0, 0.0, 2.0]]) + 1
    energy = NoiseConditionalEnergy(Zero(), (3,), 0.1, 3.0)
    energy.fit(data)
    x, level = states(20, (3,), 1), torch.linspace(-4, 2, 20)
    found = energy(with_noise_level(x, level))
    cov = torch.cov(data.T)
    for one, at, e in zip(x, level, found, strict=True):
        exact = MultivariateNormal(data.mean(0), cov + at.exp() * torch.eye(3))
        assert e.item() == pytest.approx(-exact.log_prob(one).item(), rel=1e-4)
    lowest = with_noise_level(x, torch.full((20,), 2 * math.log(0.1)))
    assert torch.equal(energy(x), energy(lowest))


def test_the_network_s_share_grows_as_the_noise_falls():
    """Its factor is s sqrt(D / t) / 2."""
    level = torch.tensor([-4.0, 0.0, 2.0])
    one, none = (NoiseConditionalEnergy(Zero(v), (16,), 0.1, 3.0, data_std=0.5) for v in (1.0, 0.0))
    z = with_noise_level(torch.zeros(3, 16), level)
    torch.testing.assert_close(one(z) - none(z), 0.5 * 4 / 2 / (level / 2).exp())


@pytest.mark.parametrize(
    ("kind", "shape", "classes"),
    [("conv", [1, 8, 8], "null"), ("resnet", [3, 8, 8], 4), ("mlp", [6], "null"), ("transformer", [1, 8, 8], "null")],
)
def test_any_network_takes_the_level(kind, shape, classes):
    energy_of = load_config(
        None,
        [
            f"energy.kind={kind}", f"data.shape={shape}", "energy.noise_conditional.sigma_min=0.1",
            f"energy.num_classes={classes}", "sampler.kind=noise_levels", "loss.kind=dual_score_matching",
            "data.noise_std=0",
        ],
    ).energy  # fmt: skip
    energy = build_energy(energy_of, tuple(shape), 0).eval()
    x = torch.rand(4, *shape)
    z = with_noise_level(x, torch.tensor([-4.6, -1.0, 0.0, 2.0]))
    assert energy(z).shape == (4,) and len(set((energy(z) - energy(x)).tolist())) == 4
    if energy.num_classes:
        y = torch.tensor([0, 1, 2, 3])
        each = energy.class_energies(z)
        torch.testing.assert_close(each[torch.arange(4), y], energy(z, y))
        torch.testing.assert_close(energy(z), -torch.logsumexp(-each, 1))
    assert PLANES == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampler.kind=langevin", ("go together", "sampler.kind=langevin")),
        ("loss.kind=contrastive", ("go together", "loss.kind=contrastive")),
        ("energy.noise_conditional=null", ("go together", "noise_conditional=None")),
        ("sampler.sigma_max=4", ("(0.2, 4.0)", "sampler.sigma_min and sigma_max")),
        ("energy.noise_conditional.sigma_min=5", ("sigma_min=5", "sigma_max=3")),
        ("data.noise_std=0.1", ("data.noise_std=0.1", "set data.noise_std=0")),
    ],
)
def test_what_knows_of_levels_goes_together(override, words):
    from ebm.errors import ConfigError

    with pytest.raises(ConfigError) as error:
        load_config("configs/digits_density.yaml", [override])
    assert all(word in str(error.value) for word in words), error.value
