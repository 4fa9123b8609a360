"""Dual score matching and the joint contrastive term, on Gaussian data whose energy with noise is known."""

import math

import pytest
import torch
from gaussians import seeded
from torch import nn

from ebm.energies import NoiseConditionalEnergy, split_noise_level, with_noise_level
from ebm.energies.base import BaseEnergyFunction
from ebm.losses import at_noise_levels, dual_score_matching
from ebm.losses.score_matching import beside_chains, contrast_of

N, D, VARIANCE = 40_000, 3, 0.6


class Tilt(BaseEnergyFunction):
    """What differs from the Gaussian: nothing, at the parameters' start."""

    def __init__(self):
        super().__init__()
        self.square, self.level = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.square * x[:, :D].square().sum(1) + self.level * x[:, D]  # x[:, D]: a wave of the level


def energy_and_data():
    data = math.sqrt(VARIANCE) * torch.randn(N, D, generator=seeded())
    energy = NoiseConditionalEnergy(Tilt(), (D,), 0.2, 2.0)
    energy.fit(data)
    return energy, data


def test_the_true_energy_has_the_least_loss_and_no_gradient():
    energy, data = energy_and_data()
    output = dual_score_matching(energy, data, generator=seeded(1))
    # E[v / (v + t)], log t uniform: what no estimate of the noise can know.
    low, high = (2 * math.log(s) for s in (0.2, 2.0))
    level = torch.linspace(low, high, 10_001)
    assert output.terms["score"].item() == pytest.approx((VARIANCE / (VARIANCE + level.exp())).mean().item(), rel=0.02)
    at_truth = torch.stack(torch.autograd.grad(output.loss, list(energy.parameters())))
    away = []
    for name in ("square", "level"):
        parameter = getattr(energy.network, name)
        with torch.no_grad():
            parameter.fill_(0.2)
        moved = dual_score_matching(energy, data, generator=seeded(1))
        assert moved.loss > output.loss
        away.append(torch.autograd.grad(moved.loss, parameter)[0])
        with torch.no_grad():
            parameter.zero_()
    assert (at_truth.abs() < 0.05 * torch.stack(away).abs()).all(), (at_truth, away)


def test_the_level_term_alone_sees_a_shift_between_levels():
    """dE/dx knows nothing of what depends on the level alone."""
    energy, data = energy_and_data()
    true = dual_score_matching(energy, data, generator=seeded(1)).terms
    with torch.no_grad():
        energy.network.level.fill_(1.0)
    shifted = dual_score_matching(energy, data, generator=seeded(1)).terms
    torch.testing.assert_close(shifted["score"], true["score"])
    assert shifted["level"] > 1.02 * true["level"]


def test_dual_score_matching_written_as_its_terms():
    energy, data = energy_and_data()
    output = dual_score_matching(energy, data, l2=0.3, generator=seeded(1))
    total = output.terms["score"] + output.terms["level"] + 0.3 * output.e_pos.square().mean()
    torch.testing.assert_close(output.loss.detach(), total)


@pytest.mark.parametrize("share", [None, 0.6])
def test_data_at_noise_levels(share):
    levels = tuple(torch.linspace(-3, 1, 5).tolist())
    z = at_noise_levels(torch.ones(N, D), levels, share, seeded())
    x, level = split_noise_level(z)
    shares = [0.2] * 5 if share is None else [share] + [(1 - share) / 4] * 4
    for at, part in zip(levels, shares, strict=True):
        own = x[(level - at).abs() < 1e-5]
        assert len(own) == pytest.approx(part * N, abs=4.5 * math.sqrt(N * part * (1 - part)))
        assert own.mean().item() == pytest.approx(1, abs=4 * math.exp(at / 2) / math.sqrt(own.numel()))
        assert own.var().item() == pytest.approx(math.exp(at), rel=4 * math.sqrt(2 / own.numel()))


def test_the_contrast_vanishes_for_chains_that_are_the_data():
    energy, data = energy_and_data()
    levels = tuple(torch.linspace(*energy.log_variances, 8).tolist())
    chains = at_noise_levels(data, levels, generator=seeded(5))
    settings = {"log_variances": levels, "generator": seeded(2)}
    output = dual_score_matching(energy, data, chains, contrastive_weight=1.0, **settings)
    plain = dual_score_matching(energy, data, generator=seeded(2))
    assert output.e_pos.shape == output.e_neg.shape == (N,)
    torch.testing.assert_close(output.loss - plain.loss, output.terms["contrast"], atol=1e-5, rtol=1e-4)
    assert abs(output.terms["contrast"].item()) < 4 * math.sqrt(2 / N) * output.e_pos.std().item()
    lower = dual_score_matching(energy, data, chains * 0.5, contrastive_weight=1.0, **settings)
    assert lower.terms["contrast"] > 0.1  # chains that lie below the data are to be raised


def test_other_energies_are_refused():
    with pytest.raises(ValueError, match="noise_conditional"):
        dual_score_matching(Tilt(), torch.zeros(2, D))


def test_the_contrast_is_within_classes():
    """By a sum over pairs; the energies of whole classes get no gradient, whatever the chains' shares of classes."""
    y_pos, y_neg = torch.tensor([0, 0, 1, 2, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0, 2, 0, 1])
    e_pos, e_neg = (torch.randn(8, dtype=torch.float64, generator=seeded(s)) for s in (1, 2))
    expected = 0.0
    for i in range(8):  # two parts of four
        own = [j for j in range(8) if j // 4 == i // 4 and y_neg[j] == y_pos[i]]
        expected += (e_pos[i].item() - sum(e_neg[j].item() for j in own) / len(own)) / 8 if own else 0
    assert contrast_of(e_pos, e_neg, y_pos, y_neg, parts=2).item() == pytest.approx(expected)
    assert contrast_of(e_pos, e_neg, None, None).item() == pytest.approx((e_pos.mean() - e_neg.mean()).item())
    of_class = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    contrast_of(of_class[y_pos], of_class[y_neg], y_pos, y_neg, parts=2).backward()
    assert of_class.grad.abs().max() < 1e-12


def test_each_annealed_chain_is_beside_a_datum_of_its_class_part_and_level():
    """Data are marked by their number, far apart beside the noise of the levels."""
    x_pos = 100.0 * torch.arange(12.0).view(12, 1)
    y_pos, y_neg = torch.tensor([0, 0, 1, 2, 0, 1] * 2), torch.tensor([0, 1, 1, 3, 2, 0] * 2)
    level = torch.linspace(-3, 2, 12)
    chosen = []
    for seed in range(50):
        chains = with_noise_level(torch.zeros(12, 1), level)
        noisy, found = beside_chains(x_pos, chains, y_pos, y_neg, [seeded(seed), seeded(seed + 100)])
        x, own = split_noise_level(noisy)
        assert torch.equal(own, level) and found.tolist() == [1, 1, 1, 0, 1, 1] * 2
        number = (x[:, 0] / 100).round().long()
        assert (number[found > 0] // 6 == torch.arange(12)[found > 0] // 6).all()
        assert (y_pos[number] == y_neg)[found > 0].all()
        chosen.append((number, (x[:, 0] - 100 * number) / (level / 2).exp()))
    numbers, noise = (torch.stack(values) for values in zip(*chosen, strict=True))
    assert set(numbers[:, 0].tolist()) == {0, 1, 4} and set(numbers[:, 6].tolist()) == {6, 7, 10}
    assert noise.std().item() == pytest.approx(1, rel=0.1) and abs(noise.mean().item()) < 0.15
    _, alone = beside_chains(x_pos, chains, None, None, [seeded(0), seeded(1)])
    assert (alone == 1).all()


def test_the_contrast_with_annealed_chains_vanishes_for_chains_that_are_the_data():
    """Without the joint density's levels: the data take those of the chains, so that the levels' weights cancel."""
    energy, data = energy_and_data()
    levels = tuple(torch.linspace(*energy.log_variances, 8).tolist())
    chains = at_noise_levels(data, levels, 0.9, generator=seeded(5))
    parts = 100  # a datum is chosen within a part
    settings = {"generator": [seeded(100 + s) for s in range(parts)]}
    output = dual_score_matching(energy, data, chains, contrastive_weight=1.0, **settings)
    assert abs(output.terms["contrast"].item()) < 4 * math.sqrt(2 / N) * output.e_pos.std().item()
    plain = dual_score_matching(energy, data, generator=[seeded(100 + s) for s in range(parts)])
    torch.testing.assert_close(output.loss - plain.loss, output.terms["contrast"], atol=1e-5, rtol=1e-4)
    (of_level,) = torch.autograd.grad(output.loss - plain.loss, energy.network.level)
    assert abs(of_level.item()) < 1e-6
    lower = dual_score_matching(energy, data, chains * torch.tensor([0.5, 0.5, 0.5, 1.0]), contrastive_weight=1.0,
                                generator=[seeded(100 + s) for s in range(parts)])  # fmt: skip
    assert lower.terms["contrast"] > 0.1


def test_chains_without_a_datum_of_their_class_do_not_count():
    energy, data = energy_and_data()
    chains = with_noise_level(data[:4], torch.full((4,), energy.log_variances[0]))
    none, labels = torch.full((4,), 7), torch.zeros(4, dtype=torch.long)
    energy.class_energies, forward = None, energy.forward  # labels go nowhere here
    energy.forward = lambda z, y: forward(z)
    output = dual_score_matching(energy, data[:4], chains, y_pos=labels, y_neg=none, generator=seeded())
    assert output.terms["contrast"] == 0


def test_a_datum_beside_a_chain_has_the_class_of_the_chain():
    """The energies of whole classes get no gradient, whatever the shares of the classes among data and chains."""
    energy, data = energy_and_data()
    of_class, forward = torch.randn(3, generator=seeded(7)).requires_grad_(), energy.forward
    energy.forward = lambda z, y: forward(z) + of_class[y]
    chains = with_noise_level(data[200:400], torch.full((200,), energy.log_variances[0]))
    y_pos, y_neg = (torch.randint(high, (200,), generator=seeded(high)) for high in (3, 2))
    output = dual_score_matching(
        energy, data[:200], chains, contrastive_weight=1.0, y_pos=y_pos, y_neg=y_neg, generator=seeded()
    )
    (gradient,) = torch.autograd.grad(output.loss, of_class)
    assert gradient.abs().max() < 1e-6
