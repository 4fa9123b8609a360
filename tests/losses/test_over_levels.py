"""Recovery likelihood over levels of noise: its chains, its gradient and its fresh chains, against closed forms."""

import math

import pytest
import torch
from gaussians import seeded
from torch import nn
from torch.distributions import Normal

from ebm.config import load_config
from ebm.config.energies import InitialiserConfig, MLPConfig, NoiseRangeConfig
from ebm.config.samplers import LangevinConfig, spaced_log_variances
from ebm.energies import FoldedEnergy, NoiseConditionalEnergy, build_energy, split_noise_level, with_noise_level
from ebm.energies.base import PLANES, BaseEnergyFunction
from ebm.errors import ConfigError
from ebm.losses import noisy_pairs, recovery_likelihood
from ebm.samplers import Engine, chains_of_lengths, fresh_chains, mala
from ebm.samplers.factory import descended
from ebm.samplers.levels import tied, tied_start, untied

LEVELS = spaced_log_variances(0.2, 3.2, 4)  # variances .04, .25, 1.6, 10.2
RATIO = 256 ** (1 / 3)
MEAN, VARIANCE, D = 0.7, 0.6, 3


class Gaussian(BaseEnergyFunction):
    """-log N(x; mean, (variance + t) I), with a factor and a shift in the place of the truth's 1 and 0."""

    def __init__(self):
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, z):
        x, level = split_noise_level(z)
        return self.factor * ((x - MEAN - self.shift) ** 2).sum(1) / (2 * (VARIANCE + level.exp()))


def data(n, seed=0):
    return MEAN + math.sqrt(VARIANCE) * torch.randn(n, D, generator=seeded(seed))


def posterior(energy, centre, level):
    """Mean (B, D) and variance (B, 1) of x_s given x_t, of `Gaussian`."""
    s = level.exp()[:, None]
    precision, tie = energy.factor / (VARIANCE + s), 1 / (s * (RATIO - 1))
    return (precision * (MEAN + energy.shift) + tie * centre) / (precision + tie), 1 / (precision + tie)


def test_pairs_of_neighbouring_levels():
    """In each part of the batch the levels ascend with equal shares; x_s has the noise s, and x_t the noise t."""
    n = 60_000
    x_s, x_t, level = noisy_pairs(torch.zeros(n, D), LEVELS, [seeded(1), seeded(2)])
    for own in level.view(2, -1):
        assert (own.diff() >= 0).all()
        for k in range(3):
            assert (own - LEVELS[k]).abs().lt(1e-5).sum() == n // 6
    for k in range(3):
        at = (level - LEVELS[k]).abs() < 1e-5
        s, t = math.exp(LEVELS[k]), math.exp(LEVELS[k + 1])
        error = 5 * math.sqrt(2 / x_s[at].numel())
        assert x_s[at].var().item() == pytest.approx(s, rel=error)
        assert (x_t[at] - x_s[at]).var().item() == pytest.approx(t - s, rel=error)
        assert x_t[at].var().item() == pytest.approx(t, rel=error)
    few = noisy_pairs(torch.zeros(4, D), LEVELS, [seeded(1), seeded(2)])[2].view(2, 2)
    assert (few[:, 0] <= few[:, 1]).all() and (few.exp() < 10).all()


def test_tied_chains_have_the_conditional_s_energy():
    """In units of u: minus the log posterior of x_s given x_t, up to a constant; the curvature is 1 / v at most."""
    energy, n = Gaussian(), 6
    centre, level = data(n), torch.tensor(LEVELS)[[0, 0, 1, 1, 2, 2]]
    u = 0.1 * torch.randn(5, n, D, generator=seeded(3))
    mean, variance = posterior(energy, centre, level)
    found = torch.stack([tied(energy, LEVELS)(one, centre, level) for one in u])
    x = torch.stack([untied(one, centre, level, LEVELS) for one in u])
    differences = found + Normal(mean, variance.sqrt()).log_prob(x).sum(2)
    torch.testing.assert_close(differences, differences[:1].expand(5, n), atol=2e-4, rtol=1e-4)
    # A point of data: the density of x_s has the curvature 1 / s.
    point = lambda z: (split_noise_level(z)[0] ** 2).sum(1) / (2 * split_noise_level(z)[1].exp())  # noqa: E731
    u = torch.ones(n, D, requires_grad=True)
    (slope,) = torch.autograd.grad(tied(point, LEVELS)(u, torch.zeros(n, D), level).sum(), u)
    torch.testing.assert_close(slope, torch.full((n, D), math.exp(-LEVELS[0])))


def test_tied_chains_sample_the_conditional():
    energy, n = Gaussian(), 9000
    _, centre, level = noisy_pairs(data(n), LEVELS, seeded(1))
    conditional = tied(energy, LEVELS)
    with torch.no_grad():
        mean, variance = posterior(energy, centre, level)
    u, info = mala(lambda u: conditional(u, centre, level), tied_start(centre, level, LEVELS), num_steps=60,
                   step_size=0.5 * math.exp(LEVELS[0]), generator=seeded(2))  # fmt: skip
    scaled = ((untied(u, centre, level, LEVELS) - mean) / variance.sqrt()).view(3, -1)  # a row a level
    assert scaled.mean(1).abs().max() < 4.5 / math.sqrt(n)
    assert (scaled.var(1) - 1).abs().max() < 4.5 * math.sqrt(2 / n)
    assert info.acceptance > 0.8


def loss_at(energy, n=400_000):
    """With exact chains of the energy, and the data's own noise for theirs."""
    x_s, centre, level = noisy_pairs(data(n), LEVELS, seeded(1))
    with torch.no_grad():
        mean, variance = posterior(energy, centre, level)
        x_neg = mean + variance.sqrt() * torch.randn(n, D, generator=seeded(2))
    pair = with_noise_level(x_s, level), with_noise_level(x_neg, level)
    output = recovery_likelihood(energy, *pair)
    return torch.stack(torch.autograd.grad(output.loss, [energy.factor, energy.shift])), centre, level, x_s


def test_the_gradient_is_that_of_the_likelihood():
    """It vanishes at the truth, and elsewhere is the derivative of the mean of -log p(x_s | x_t) at the level."""
    energy = Gaussian()
    assert loss_at(energy)[0].abs().max() < 0.01
    for name, value in (("factor", 1.4), ("shift", -0.3)):
        with torch.no_grad():
            getattr(energy, name).fill_(value)
        found, centre, level, x_s = loss_at(energy)
        mean, variance = posterior(energy, centre, level)
        nll = -Normal(mean, variance.sqrt()).log_prob(x_s).sum(1).mean()
        expected = torch.stack(torch.autograd.grad(nll, [energy.factor, energy.shift]))
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.03)
        assert expected.abs().max() > 0.1
        with torch.no_grad():
            getattr(energy, name).fill_(1.0 if name == "factor" else 0.0)


class Mixture(NoiseConditionalEnergy):
    """Two Gaussians with noise, exact at every level; a constant differs between levels, as training leaves it."""

    CENTRES, SHARES, STD = torch.tensor([-2.0, 2.0]), torch.tensor([0.3, 0.7]), 0.3

    def __init__(self):
        super().__init__(Gaussian(), (1,), 0.2, 6.0)
        n = 100_000
        which = (torch.rand(n, generator=seeded(5)) < 0.7).long()
        self.fit((self.CENTRES[which] + self.STD * torch.randn(n, generator=seeded(6)))[:, None])

    def forward(self, z, y=None):
        x, level = split_noise_level(z) if z.shape[1] == 2 else (z, z.new_full((len(z),), self.log_variances[0]))
        variance = self.STD**2 + level.exp()[:, None]
        each = -((x - self.CENTRES) ** 2) / (2 * variance) - variance.log() / 2
        of_class = self.SHARES.log() + each if y is None else each.gather(1, y[:, None])
        return 5 * level - torch.logsumexp(of_class, 1)


def descent(kind, *overrides):
    return load_config(
        None,
        [
            "data.shape=[1]", "energy.kind=mlp", "energy.noise_conditional={sigma_min: 0.2, sigma_max: 6}",
            "loss.kind=recovery", "loss.levels=5", f"sampler.kind={kind}", "sampler.bounds=null", "data.noise_std=0",
            "sampler.step_size=0.02", *(["sampler.temperature=1", "sampler.grad_clamp=null"] * (kind == "langevin")),
            *overrides,
        ],
    ).fresh_sampler  # fmt: skip


@pytest.mark.parametrize(("kind", "each", "steps"), [("mala", 40, 200), ("mala", 40, 320), ("langevin", 160, 700)])
def test_fresh_chains_reach_the_lowest_level_with_its_moments(kind, each, steps):
    """Exact energies at all five levels; with more steps they go on at the lowest, where none crosses."""
    small = ["sampler.step_size=0.005"] if kind == "langevin" else []  # whose bias is in proportion to the step
    config, n = descent(kind, f"loss.sampler.steps_a_level={each}", *small), 4096
    assert config.length == 5 * each
    x, _ = fresh_chains(Mixture(), config, (1,), n, steps, seed=3, block=n)
    high = x[x > 0]
    assert len(high) / n == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / n))
    variance = Mixture.STD**2 + 0.04
    assert high.mean().item() == pytest.approx(2, abs=4.5 * math.sqrt(variance / len(high)))
    assert high.var().item() == pytest.approx(variance, rel=0.1)


def test_fresh_chains_of_classes_and_of_several_lengths():
    """One chain gives all lengths from the end of the descent on; shorter ones go down in fewer steps a level."""
    config, moved = descent("mala"), []
    assert config.length == 100
    lengths = (0, 30, 110, 260)
    states, labels = chains_of_lengths(Mixture(), config, (1,), 40, lengths, seed=1, num_classes=2, moved=moved.append)
    for length in lengths:
        alone = fresh_chains(Mixture(), config, (1,), 40, length, seed=1, num_classes=2)
        torch.testing.assert_close(states[length], alone[0], atol=0, rtol=0)
    assert sum(moved) == 64 * (30 + 260) and states[0].std() > 4
    assert torch.equal(states[260][:, 0] > 0, labels > 0)


def test_a_descent_takes_the_steps_that_it_is_given():
    """Spread over the levels, the highest of which may get none."""
    steps = []

    def counted(u, centre, level):
        steps.append(round((level[0].item() - LEVELS[0]) / (LEVELS[1] - LEVELS[0])))
        return tied(Gaussian(), LEVELS)(u, centre, level)

    chain = LangevinConfig(step_size=0.01, temperature=1.0, grad_clamp=None, bounds=None)
    config = descent("mala").model_copy(update={"chain": chain, "log_variances": LEVELS})
    for number, expected in ((7, [2] * 2 + [1] * 2 + [0] * 3), (2, [1, 0]), (0, [])):
        steps.clear()
        descended(Engine(counted), config, torch.zeros(4, D), num_steps=number, generator=[seeded()])
        assert steps == expected


def test_the_start_of_fresh_chains_is_the_data_s_gaussian():
    x = 2 * torch.randn(5000, 3, generator=seeded()) @ torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 0.1]]) + 1
    energy = NoiseConditionalEnergy(Gaussian(), (3,), 0.1, 2.0)
    energy.fit(x)
    found = energy.noisiest(torch.randn(200_000, 3, generator=seeded(1)))
    torch.testing.assert_close(found.mean(0), x.mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(found.T), torch.cov(x.T) + 4 * torch.eye(3), atol=0.15, rtol=0)
    images = NoiseConditionalEnergy(Gaussian(), (1, 40, 40), 0.1, 2.0, data_std=0.5)
    assert images.noisiest(torch.randn(40, 1, 40, 40)).var().item() == pytest.approx(4.25, rel=0.05)


class Constant(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return self.value.expand(len(x), D)


def with_initialiser(value=0.0):
    """Data of variance .6 around .7, which is what the energy knows of them."""
    energy = NoiseConditionalEnergy(
        Gaussian(), (D,), 0.2, 3.2, data_std=math.sqrt(VARIANCE), initialiser=Constant(value)
    )
    energy.mean.fill_(MEAN)
    return energy


def test_what_is_proposed_for_gaussian_data_is_the_conditional_s_mean():
    energy, spacing = with_initialiser(), LEVELS[1] - LEVELS[0]
    _, centre, level = noisy_pairs(data(300), LEVELS, seeded(1))
    found = energy.propose(centre, level, spacing)
    torch.testing.assert_close(found, posterior(Gaussian(), centre, level)[0].detach())
    # g in units of the datum's spread given x_t, of which x_s has the share 1 - s / t.
    t = (level + spacing).exp()[:, None]
    moved = with_initialiser(0.5).propose(centre, level, spacing) - found
    expected = 0.5 * (1 - 1 / RATIO) * (VARIANCE * t / (VARIANCE + t)).sqrt()
    torch.testing.assert_close(moved, expected.expand(-1, D))


def test_a_perfect_proposal_starts_at_the_conditional():
    """For data that x_t tells: here all at one place."""
    n, spacing = 30_000, LEVELS[1] - LEVELS[0]
    x_s, centre, level = noisy_pairs(torch.full((n, D), MEAN), LEVELS, seeded(1))
    assert not tied_start(centre, level, LEVELS).any()

    def proposal(x, level, between):
        assert between == spacing
        return MEAN + (x - MEAN) / RATIO

    start = untied(tied_start(centre, level, LEVELS, proposal, (), seeded(2)), centre, level, LEVELS)
    for sign in (1, -1):  # x_s and x_t, and their sums and differences, are distributed as data's
        parts = (start + sign * centre).view(3, -1), (x_s + sign * centre).view(3, -1)
        torch.testing.assert_close(*(part.var(1) for part in parts), rtol=0.03, atol=0)
    torch.testing.assert_close(start.mean(), x_s.mean(), atol=0.03, rtol=0)


def test_chains_teach_the_initialiser_and_not_the_other_way_round():
    """The fit is the Gaussian's, in units of its variance (1 - s / t) s; its gradient is the initialiser's alone."""
    energy, spacing, n = with_initialiser(0.3), LEVELS[1] - LEVELS[0], 600
    energy.network.factor.data.fill_(1.3)
    x_s, centre, level = noisy_pairs(data(n), LEVELS, seeded(1))
    x_neg = with_noise_level(x_s + 0.1, level).requires_grad_(True)
    pair = with_noise_level(x_s, level), x_neg
    plain = recovery_likelihood(energy, *pair, l2=0.1)
    whole = recovery_likelihood(energy, *pair, l2=0.1, centres=centre, spacing=spacing)
    mean = energy.propose(centre, level, spacing)
    variance = (level.exp() * (1 - 1 / RATIO))[:, None]
    fit = -Normal(mean, variance.sqrt().expand(-1, D)).log_prob(x_s + 0.1) - (2 * math.pi * variance).log() / 2
    torch.testing.assert_close(whole.terms["initialiser"], fit.mean().detach())
    torch.testing.assert_close(whole.loss - plain.loss, fit.mean())
    grads = torch.autograd.grad(whole.loss, [energy.initialiser.value, energy.network.factor, x_neg], allow_unused=True)
    of_energy = torch.autograd.grad(plain.loss, energy.network.factor)
    assert grads[0] != 0 and torch.equal(grads[1], of_energy[0]) and grads[2] is None


@pytest.mark.parametrize(("shape", "classes"), [((5,), None), ((5,), 3), ((2, 6, 5), None), ((2, 6, 5), 3)])
def test_the_networks_of_initialisers(shape, classes):
    noise = NoiseRangeConfig(initialiser=InitialiserConfig(features=(4, 8), hidden_dim=8))
    config = MLPConfig(noise_conditional=noise, num_classes=classes)
    energy = build_energy(config, shape, 0)
    plain = build_energy(config.model_copy(update={"noise_conditional": NoiseRangeConfig()}), shape, 0)
    assert plain.initialiser is None and FoldedEnergy(plain).proposal is None
    x, level = torch.randn(4, *shape, generator=seeded()), torch.tensor([-4.0, -1.0, 0.0, 1.0])
    labels = () if classes is None else (torch.tensor([0, 1, 2, 0]),)
    first = energy.propose(x, level, 1.0, *labels)
    kept = 0.49 / (0.49 + (level + 1).exp())
    expected = x * (math.exp(-1) + (1 - math.exp(-1)) * kept.view(-1, *[1] * len(shape)))
    torch.testing.assert_close(first, expected)  # the output is 0 at first, and so is the data's mean
    with torch.no_grad():
        for p in energy.initialiser.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(1)))
    folded = FoldedEnergy(energy).refresh().proposal(x, level, 1.0, *labels)
    torch.testing.assert_close(folded, energy.propose(x, level, 1.0, *labels))
    assert not folded.requires_grad and not torch.allclose(folded, first) and PLANES == 8
    if classes:
        other = energy.propose(x, level, 1.0, labels[0].flip(0))
        assert (other - folded).flatten(1).abs().amax(1).gt(1e-6).tolist() == [False, True, True, False]


GOOD = ["data.shape=[2]", "energy.kind=mlp", "energy.noise_conditional.sigma_min=0.2", "loss.kind=recovery"]
GOOD += ["loss.levels=4", "sampler.kind=mala", "sampler.bounds=null", "data.noise_std=0"]
LANGEVIN = ["sampler.kind=langevin", "sampler.bounds=null", "sampler.temperature=1", "sampler.step_size=0.01"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.levels=null"], ("loss.levels=null", "set loss.levels to a number")),
        (["energy.noise_conditional=null"], ("energy.noise_conditional=null", "energy.noise_conditional={}")),
        (["sampler.bounds=[-1,1]"], ("sampler.bounds=[-1.0, 1.0]", "set null")),
        (["sampler.step_size=0.05"], ("sampler.step_size=0.05", "set it to 0.04 or less")),
        (["sampler.kind=hmc", "sampler.bounds=null", "sampler.step_size=0.3"], ("set it to 0.282843 or less",)),
        (["data.noise_std=0.1"], ("data.noise_std=0.1", "set 0")),
        (["loss.gradient_penalty=1"], ("loss.gradient_penalty=1", "set 0")),
        (["sampler.kind=noise_levels"], ("sampler.kind=noise_levels: set langevin, mala or hmc",)),
        ([*LANGEVIN], ("sampler.grad_clamp=0.03", "set null")),
        (
            [*LANGEVIN, "sampler.schedule=cosine", "sampler.step_size_end=0.001"],
            ("sampler.schedule=cosine", "constant"),
        ),
        (["sampler.temperature=2"], ("sampler.temperature=1",)),
    ],
)
def test_settings_that_do_not_go_with_levels(overrides, words):
    load_config(None, GOOD)
    with pytest.raises(ConfigError) as error:
        load_config(None, [*GOOD, *overrides])
    assert all(word in str(error.value) for word in words), error.value


def test_an_initialiser_is_for_recovery():
    with pytest.raises(ConfigError, match="initialiser with loss"):
        load_config("configs/digits_density.yaml", ["energy.noise_conditional.initialiser={}"])


def test_which_chains_are_drawn_afresh():
    assert load_config(None, GOOD).fresh_sampler.kind == "descent"
    assert load_config(None, [*GOOD, "loss.sampler=null"]).fresh_sampler.kind == "mala"
    one_level = load_config(None, ["loss.kind=recovery", "sampler.temperature=1"])
    assert one_level.fresh_sampler == one_level.sampler and one_level.recovery_levels == ()
    assert load_config(None, GOOD).recovery_levels == pytest.approx(spaced_log_variances(0.2, 3.0, 5))
