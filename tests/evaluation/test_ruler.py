"""The ruler: distances with intervals, the classifier that is kept, outliers, density or walk; on real digits and by
closed forms."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_runs import SteepEnergy, mixture_samples
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from ebm.config import HMCConfig
from ebm.config.samplers import LangevinConfig, MALAConfig
from ebm.data.sources import open_source
from ebm.errors import DataError
from ebm.evaluation import (
    acceptance,
    below_the_data,
    clusters,
    compare,
    from_levels,
    ood_metrics,
    pca_gaussian,
    pixel_gaussian,
    rates,
    ruler_of,
    to_levels,
    verdict,
    worst_share,
)
from ebm.evaluation.metrics import shares
from ebm.streams import generator


def digits_of(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    source = open_source("digits", split)
    return torch.from_numpy(source.arrays).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(source.labels).long()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    (train, labels), (heldout, _) = digits_of("train"), digits_of("test")
    directory = tmp_path_factory.mktemp("rulers")
    ruler = ruler_of(train, labels, directory)
    return SimpleNamespace(train=train, labels=labels, heldout=heldout, ruler=ruler, directory=directory)


def pixel_gaussian_samples(train: torch.Tensor, count: int, draws: torch.Generator) -> torch.Tensor:
    x = from_levels(train)
    return x.mean(0) + x.std(0) * torch.randn(count, *x.shape[1:], generator=draws)


def pca_mixture_samples(train: torch.Tensor, labels: torch.Tensor, count: int, draws: torch.Generator) -> torch.Tensor:
    """A Gaussian with the principal components of a class, for each class."""
    parts = []
    for y in range(10):
        x = from_levels(train[labels == y]).flatten(1)
        _, values, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        kept, n = 20, count // 10
        z = torch.randn(n, kept, generator=draws) * values[:kept] / len(x) ** 0.5
        parts.append(x.mean(0) + z @ directions[:kept])
    return torch.cat(parts).reshape(-1, *train.shape[1:])


@pytest.mark.parametrize("seed", range(5))
def test_distances_are_in_the_order_they_should_be(digits, seed):
    draws = generator(seed, "test")
    train, count = from_levels(digits.train), 700
    chosen = torch.randperm(len(train), generator=draws)[:count]
    states = {
        "slightly noisy": train[chosen] + 0.1 * torch.randn(count, 1, 8, 8, generator=draws),
        "classes of PCA": pca_mixture_samples(digits.train, digits.labels, count, draws),
        "flipped": train[chosen].flip(2),
        "pixel Gaussian": pixel_gaussian_samples(digits.train, count, draws),
        "noise": 2 * torch.rand(count, 1, 8, 8, generator=draws) - 1,
    }
    features = {name: digits.ruler.features(to_levels(x)) for name, x in states.items()}
    found = compare(digits.ruler.features(digits.train), digits.ruler.features(digits.heldout), features, seed)
    d = {name: distance.value for name, distance in found.distances.items()}
    assert d["slightly noisy"] < d["classes of PCA"] < d["pixel Gaussian"] < d["noise"], d
    assert d["slightly noisy"] < d["flipped"] < d["noise"], d
    assert found.images == 700 and found.ratios["slightly noisy"].low < 1.3
    assert all(r.low <= r.value <= r.high for r in (*found.distances.values(), *found.ratios.values()))


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_held_out_set_is_a_floor_from_the_other(digits, seed):
    """Two sets of equally good images: the ratio's interval has 1 in it."""
    order = torch.randperm(len(digits.heldout), generator=generator(seed, "halves"))
    one, other = (digits.ruler.features(digits.heldout[half]) for half in order.chunk(2))
    ratio = compare(digits.ruler.features(digits.train), other, {"half": one}, seed).ratios["half"]
    assert ratio.low < 1 < ratio.high, ratio


def test_the_floor_has_as_many_images_as_the_samples():
    """Gaussian features with no difference at all: without that, few samples would be many floors away."""
    draws = generator(0, "floor")
    train, heldout, few = (torch.randn(n, 32, generator=draws) for n in (4000, 500, 100))
    found = compare(train, heldout, {"few": few})
    assert found.images == 100 and found.ratios["few"].value == pytest.approx(1, abs=0.25)
    assert compare(train, heldout, {}).floor.value < found.floor.value / 2
    with pytest.raises(DataError, match=r"evaluate\.shards"):
        compare(heldout, heldout, {})


def test_intervals_cover_the_spread_of_other_draws():
    """Of 40 other pairs of sets of the same laws, most distances lie in the interval of one, as wide as they need."""

    def draw(seed):
        draws = generator(seed, "covered")
        return [torch.randn(n, 8, generator=draws) + shift for n, shift in ((300, 0.0), (300, 0.0), (300, 0.3))]

    others = [compare(*draw(seed)[:2], {"x": draw(seed)[2]}, seed).distances["x"] for seed in range(40)]
    deviation = np.std([one.value for one in others])
    width = np.mean([(one.high - one.low) / 2 / 1.96 for one in others])
    assert width == pytest.approx(deviation, rel=0.35)


def test_a_ruler_is_trained_once_for_its_data(digits, tmp_path, caplog):
    (file,) = digits.directory.iterdir()
    before = file.stat().st_mtime_ns
    again = ruler_of(digits.train, digits.labels, digits.directory)
    assert again.identity == digits.ruler.identity and file.stat().st_mtime_ns == before
    beside = ruler_of(digits.train, digits.labels, tmp_path / "none", beside=digits.directory)
    assert beside.identity == again.identity and not (tmp_path / "none").exists()
    damaged = tmp_path / file.name
    damaged.write_bytes(file.read_bytes()[:1000])
    assert ruler_of(digits.train, digits.labels, tmp_path).identity == digits.ruler.identity  # trained the same again
    assert damaged.read_bytes() == file.read_bytes() and "can't be used" in caplog.text


def test_other_data_has_another_ruler_which_need_not_be_kept(digits, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ebm.evaluation.classifier.MIN_SEEN", 256)
    monkeypatch.setattr("ebm.evaluation.classifier.EPOCHS", 0)
    other = ruler_of(digits.train[:99], digits.labels[:99], digits.directory)
    assert other.identity != digits.ruler.identity and len(list(digits.directory.iterdir())) == 2
    (tmp_path / "file").touch()
    ruler_of(digits.train[:99], digits.labels[:99], tmp_path / "file" / "deep")
    assert "can't be kept" in caplog.text


@pytest.mark.parametrize("levels", [4, 10**6])
def test_rates_are_those_of_scikit_learn(levels):
    draws = generator(levels, "rates")
    inside, outside = (
        torch.randint(levels, (n,), generator=draws).float() + shift for n, shift in ((80, 0), (60, levels / 4))
    )
    scores, positive = torch.cat([inside, outside]).numpy(), np.repeat([0, 1], [80, 60])
    found = rates(inside, outside)
    assert found.auroc == pytest.approx(roc_auc_score(positive, scores))
    assert found.aupr == pytest.approx(average_precision_score(positive, scores))
    wrong, right, _ = roc_curve(positive, scores, drop_intermediate=False)
    assert found.fpr95 == pytest.approx(wrong[right >= 0.95].min())


def test_gaussian_likelihoods_are_those_of_gaussians():
    """Against the exact density of the covariance that each stands for."""
    draws = generator(0, "gaussians")
    images = (40 * torch.randn(3000, 1, 3, 3, generator=draws).cumsum(3) + 128).clamp(0, 255).to(torch.uint8)
    x, bins = from_levels(images).flatten(1).double(), (2 / 256) ** 2 / 12
    exact = {
        pixel_gaussian: torch.diag(x.var(0) + bins),
        pca_gaussian: torch.cov(x.T) + bins * torch.eye(9),  # 8 of 9 components, and the mean of the 1 that is left
    }
    for model, covariance in exact.items():
        density = torch.distributions.MultivariateNormal(x.mean(0), covariance)
        difference = model(images)(images) + density.log_prob(x)
        assert float(difference.abs().max()) < 1e-6 * float(density.log_prob(x).std()) + 1e-4


def test_outliers_below_the_data_are_named(digits):
    """An energy that measures brightness: images darker than digits are likelier than digits."""
    black = torch.zeros(50, 1, 8, 8, dtype=torch.uint8)

    def brightness(images):
        return from_levels(images).flatten(1).mean(1)

    values = ood_metrics(
        brightness, digits.heldout, outliers={"black": black, "white": black + 255}, train=digits.train
    )
    assert (values["ood/black_auroc"], values["ood/white_auroc"], values["ood/white_fpr95"]) == (0, 1, 0)
    assert values["ood/white_aupr"] == 1 and values["ood/black_fpr95"] == 1
    assert values["ood/noise_auroc_pca_gaussian"] > 0.99 and values["ood/noise_auroc_pixel_gaussian"] > 0.9
    words = below_the_data(values)
    assert any(word.startswith("black: lies below the data") for word in words)
    assert not any(word.startswith(("white", "noise")) for word in words)


def test_a_step_that_is_small_samples_a_density_and_one_of_half_the_variance_is_a_walk():
    """A mixture of N(m_k, sigma^2 I) in 64 dimensions, exactly, with its own samples as chains."""
    x, energy = mixture_samples(1000, dim=64, sigma=0.1), SteepEnergy(dim=64, sigma=0.1)
    at = {
        share: LangevinConfig(step_size=0.01 * share, temperature=1, grad_clamp=None, bounds=None)
        for share in (0.2, 0.5)
    }
    accepted = {share: acceptance(energy, x, config) for share, config in at.items()}
    assert (verdict(accepted[0.2]), verdict(accepted[0.5])) == ("density", "walk"), accepted
    steep = SteepEnergy(dim=64, sigma=0.1, steepness=2)  # which that step fits: it removes all of the noise
    assert verdict(acceptance(steep, x, at[0.5])) == "walk"
    assert (verdict(0.9, -2.0), verdict(0.9, 2.0), verdict(0.1, -2.0)) == ("hole", "density", "walk")
    cold = LangevinConfig(step_size=0.002, noise_scale=0.0, bounds=None)
    assert math.isnan(acceptance(energy, x, cold)) and verdict(acceptance(energy, x, cold)) == "walk"


@pytest.mark.parametrize("config", [MALAConfig(step_size=0.002, bounds=None),
                                    HMCConfig(step_size=0.004**0.5, num_leapfrog=1, bounds=None)])  # fmt: skip
def test_acceptance_is_that_of_the_samplers_own_move(config):
    x, energy = mixture_samples(1000, dim=64, sigma=0.1), SteepEnergy(dim=64, sigma=0.1)
    same = LangevinConfig(step_size=0.002, temperature=1, grad_clamp=None, bounds=None)
    assert acceptance(energy, x, config) == pytest.approx(acceptance(energy, x, same), abs=1e-5)


def test_the_share_of_the_class_that_is_lost():
    data, chains = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    assert worst_share(shares(chains, 3), shares(data, 3)) == pytest.approx(0.5)
    assert worst_share(shares(data, 3), shares(data, 3)) == 1
    assert worst_share(shares(chains[:3], 3), shares(data, 3)) == 0


def test_clusters_stand_in_for_classes(digits):
    """Without labels: chains that lost two digits lose nearly all of a cluster; all digits lose none."""
    found = clusters(digits.train)
    of_data = shares(found(digits.heldout), 10)
    fewer = digits.train[(digits.labels != 0) & (digits.labels != 6)]
    assert worst_share(shares(found(digits.train), 10), of_data) > 0.6
    assert worst_share(shares(found(fewer), 10), of_data) < 0.2


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    from ebm.evaluation.classifier import default_ruler_directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_ruler_directory() == tmp_path / "ebm" / "rulers"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_ruler_directory() == tmp_path / ".cache" / "ebm" / "rulers"
    assert os.environ["HOME"] == str(tmp_path)
