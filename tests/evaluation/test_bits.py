"""Bits per dimension: of a Gaussian energy, whose normaliser is known, and of the likelihoods beside it."""

import math

import pytest
import torch
from made_runs import make_run

from ebm.data.shards import ensure_shards
from ebm.errors import ConfigError
from ebm.evaluation.measures import BIN, measure_likelihood, pca_mixture, pixel_gaussian, problem_with
from ebm.evaluation.sets import Sets
from ebm.inference.images import dequantize
from ebm.inference.run import open_run
from ebm.streams import generator

DUAL = ["energy.features=[4,8]", "sampler.kind=noise_levels", "loss.kind=dual_score_matching", "data.noise_std=0"]


@pytest.fixture(scope="module")
def sets_of(tmp_path_factory):
    """The sets of a run on digits whose energy is the Gaussian of the training data, times `scale`."""
    folder = tmp_path_factory.mktemp("bits")
    for split in ("train", "test"):
        ensure_shards(str(folder / split), "digits", split)

    def build(name, sigma, *settings, offset=0.0):
        places = [f"data.shards={folder / 'train'}", f"evaluate.shards={folder / 'test'}"]
        levels = [f"{key}={value}" for section in ("energy.noise_conditional", "sampler")
                  for key, value in ((f"{section}.sigma_min", sigma), (f"{section}.sigma_max", 8))]  # fmt: skip
        train = Sets(
            open_run(make_run(folder / f"{name}_data", *places, "loss.negatives=noise")), num=2, steps=1
        ).train.data

        def change(energy):
            for parameter in energy.parameters():
                torch.nn.init.zeros_(parameter)
            energy.fit(dequantize(train, generator(0, "fit")))

        run = make_run(folder / name, *DUAL, *levels, *places, *settings, change=change)
        return Sets(open_run(run), num=2, steps=1)

    return build


def test_bits_of_a_gaussian_are_those_of_its_formula(sets_of):
    """The whole covariance is the energy's own, so its figure is that of the full Gaussian; and by hand."""
    sets = sets_of("gaussian", 0.2)
    found = measure_likelihood(sets)
    values = found.values
    assert values["likelihood/bpd"] == pytest.approx(values["likelihood/bpd_full_gaussian"], abs=0.02)
    assert values["likelihood/bpd_full_gaussian"] < values["likelihood/bpd_diagonal_gaussian"]
    assert "noise of 0.2, 25.6 levels" in found.words[0]
    x = sets.with_run_noise(sets.heldout.data, "heldout").flatten(1).double()
    train = sets.with_run_noise(sets.train.data, "train").flatten(1).double()
    exact = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T))
    bits = -exact.log_prob(x).mean().item() / 64 / math.log(2) + 7
    assert values["likelihood/bpd_full_gaussian"] == pytest.approx(bits, abs=2e-3)


def test_the_constant_of_an_energy_does_not_count(sets_of):
    """A network that adds 3 at every level: the normaliser takes it away."""
    sets = sets_of("gaussian2", 0.2)
    before = measure_likelihood(sets).values["likelihood/bpd"]
    network = sets.run.network.module
    plain = network.forward
    network.forward = lambda z: plain(z) + 300.0
    assert measure_likelihood(sets).values["likelihood/bpd"] == pytest.approx(before, abs=1e-4)


def test_uniform_noise_takes_eight_bits():
    """A level of 256 that all are alike: 8 bits, less what a Gaussian loses against the uniform density."""
    x = torch.rand(20_000, 3, generator=generator(0, "uniform")) * 2 - 1
    bits = float(pixel_gaussian(x)(x).mean()) / (3 * math.log(2)) - math.log2(BIN)
    assert bits == pytest.approx(8 + math.log2(math.sqrt(2 * math.pi * math.e / 12)), abs=0.01)


def test_a_mixture_of_pca_gaussians_is_a_mixture():
    """Of clusters far apart: the exact density of their shares, means and covariances."""
    draws = generator(0, "mixture")
    centres = 40 * torch.randn(10, 5, generator=draws)
    counts = torch.arange(1, 11) * 40
    parts = [c + torch.randn(int(n), 5, generator=draws).cumsum(1) for c, n in zip(centres, counts, strict=True)]
    x = torch.cat(parts)
    found = pca_mixture(x)(x)
    each = [
        torch.distributions.MultivariateNormal(p.double().mean(0), torch.cov(p.double().T)).log_prob(x.double())
        for p in parts
    ]
    exact = -torch.logsumexp(torch.stack(each) + (counts / counts.sum()).log()[:, None], 0)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


def test_only_a_run_of_noise_levels_has_bits(tmp_path):
    run = open_run(make_run(tmp_path / "run", "data.shards=/nowhere", "loss.negatives=noise"))
    assert "loss.kind=contrastive" in str(problem_with("likelihood", Sets(run, num=2, steps=1)))
    with pytest.raises(ConfigError, match="dual_score_matching"):
        run.log_normaliser(torch.zeros(2, 1, 8, 8))
