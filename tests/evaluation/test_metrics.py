"""The measures, against closed forms, brute force and real digits; and the command on a small run."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_runs import make_run
from runs import ROOT
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ebm.__main__ import main
from ebm.data.shards import ensure_shards
from ebm.errors import DataError
from ebm.evaluation import (
    auroc,
    class_metrics,
    energy_metrics,
    frechet_distance,
    frechet_metrics,
    from_levels,
    ood_metrics,
    ood_sets,
    to_levels,
    train_classifier,
)
from ebm.streams import generator


@pytest.fixture(scope="module")
def digits():
    """Training and held-out digits, uint8 (N, 1, 8, 8), with labels: the split that the embedded source makes."""
    bunch = load_digits()
    images = np.round(bunch.images * 255 / 16).astype(np.uint8)[:, None]
    parts = train_test_split(images, bunch.target, test_size=0.2, random_state=0)
    train, heldout, train_labels, heldout_labels = (torch.from_numpy(part) for part in parts)
    return SimpleNamespace(
        train=train, heldout=heldout, train_labels=train_labels.long(), heldout_labels=heldout_labels.long()
    )


@pytest.fixture(scope="module")
def classifier(digits):
    return train_classifier(digits.train, digits.train_labels)


def noise_like(images: torch.Tensor) -> torch.Tensor:
    return torch.randint(256, images.shape, dtype=torch.uint8, generator=generator(7, "noise"))


def with_moments(mean, cov, count: int, seed: int) -> torch.Tensor:
    """Features (count, D) whose sample mean and covariance are exactly these."""
    mean, cov = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64)
    z = torch.randn(count, len(mean), dtype=torch.float64, generator=generator(seed, "features"))
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    return mean + z @ torch.linalg.cholesky(cov).T


def random_cov(dim: int, seed: int) -> torch.Tensor:
    a = torch.randn(dim, 2 * dim, dtype=torch.float64, generator=generator(seed, "cov"))
    return a @ a.T / dim


def test_frechet_of_gaussians_with_equal_axes():
    """Diagonal covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    a = with_moments([0.0, 1.0, 2.0], torch.diag(torch.tensor([1.0, 4.0, 9.0])), 50, 0)
    b = with_moments([1.0, 1.0, 0.0], torch.diag(torch.tensor([4.0, 4.0, 0.25])), 80, 1)
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 2.5**2, rel=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    """In two dimensions tr M^{1/2} = sqrt(tr M + 2 sqrt(det M))."""
    cov_a, cov_b = random_cov(2, 0), random_cov(2, 1)
    product = cov_a @ cov_b
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(13 + cov_a.trace() + cov_b.trace() - 2 * cross)
    a, b = with_moments([0.0, 0.0], cov_a, 40, 2), with_moments([2.0, 3.0], cov_b, 30, 3)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_agrees_with_a_general_matrix_root():
    cov_a, cov_b = random_cov(16, 4), random_cov(16, 5)
    zero = torch.zeros(16)
    expected = float(cov_a.trace() + cov_b.trace()) - 2 * np.trace(sqrtm((cov_a @ cov_b).numpy())).real
    got = frechet_distance(with_moments(zero, cov_a, 100, 6), with_moments(zero, cov_b, 100, 7))
    assert got == pytest.approx(expected, rel=1e-8)


def test_frechet_of_singular_covariances():
    """Fewer samples than features; a set and itself, moved along a direction it does not vary in."""
    a = torch.randn(10, 64, generator=generator(0, "few"))
    a[:, 0] = 0
    moved = a.clone()
    moved[:, 0] = 3
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, moved) == pytest.approx(9, rel=1e-6)


def test_frechet_refuses_what_has_no_moments():
    good = torch.randn(10, 4, generator=generator(0, "good"))
    with pytest.raises(ValueError, match="N of 2"):
        frechet_distance(good[:1], good)
    with pytest.raises(ValueError, match="non-finite"):
        frechet_distance(good, good.clone().index_fill_(0, torch.tensor([3]), float("nan")))


@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_auroc_is_the_share_of_pairs(levels):
    """With few levels nearly all pairs are ties, which count a half."""
    draws = generator(levels, "energies")
    inside = torch.randint(levels, (40,), generator=draws).float()
    outside = torch.randint(levels, (60,), generator=draws).float() + levels / 5
    pairs = [1.0 if o > i else 0.5 if o == i else 0.0 for i in inside.tolist() for o in outside.tolist()]
    assert auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside))


def test_auroc_at_its_ends():
    low, high = torch.arange(5.0), torch.arange(5.0) + 10
    assert (auroc(low, high), auroc(high, low), auroc(low, low)) == (1.0, 0.0, 0.5)
    with pytest.raises(ValueError, match="non-finite"):
        auroc(low, high / 0 * 0)


def test_ood_sets_are_what_they_are_called(digits):
    sets = ood_sets(digits.heldout, seed=3)
    assert all(s.shape == digits.heldout.shape and s.dtype == torch.uint8 for s in sets.values())
    assert torch.equal(sets["flipped"][:, :, 0], digits.heldout[:, :, -1])
    assert (sets["constant"].flatten(1).max(1).values == sets["constant"].flatten(1).min(1).values).all()
    assert torch.equal(sets["permuted"].flatten(1).sort(1).values, digits.heldout.flatten(1).sort(1).values)
    assert not torch.equal(sets["permuted"], digits.heldout)
    again, other = ood_sets(digits.heldout, seed=3), ood_sets(digits.heldout, seed=4)
    assert all(torch.equal(sets[name], again[name]) for name in sets)
    assert all(torch.equal(sets[name], other[name]) == (name == "flipped") for name in sets)


def test_permuted_colours_move_together():
    images = torch.arange(3 * 16, dtype=torch.uint8).reshape(1, 3, 4, 4).repeat(5, 1, 1, 1)
    permuted = ood_sets(images)["permuted"].int()
    assert (permuted[:, 1] - permuted[:, 0] == 16).all() and (permuted[:, 2] - permuted[:, 1] == 16).all()


def test_levels_there_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_levels(from_levels(levels)), levels)
    assert to_levels(torch.tensor([-1.5, -1.0, 1.0, 1.5]).reshape(1, 1, 2, 2)).flatten().tolist() == [0, 0, 255, 255]
    with pytest.raises(DataError, match="1 of 2 chains hold non-finite"):
        to_levels(torch.tensor([0.0, float("nan")]).reshape(2, 1, 1, 1), "chains")


def test_classifier_reads_digits(digits, classifier):
    assert classifier.features(digits.heldout).shape == (len(digits.heldout), 64)
    assert (classifier.predict(digits.heldout) == digits.heldout_labels).double().mean() >= 0.97


def test_classifier_depends_on_data_and_seed_alone(digits, classifier):
    before = torch.random.get_rng_state()
    torch.rand(5)
    moved = torch.random.get_rng_state()
    again = train_classifier(digits.train, digits.train_labels)
    assert torch.equal(torch.random.get_rng_state(), moved) and not torch.equal(moved, before)
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True))


def test_classifier_refuses_labels_that_are_missing(digits):
    with pytest.raises(ValueError, match="labels from -1 to 9"):
        train_classifier(digits.train, digits.train_labels.clone().index_fill_(0, torch.tensor([0]), -1))


def test_frechet_tells_digits_from_noise(digits, classifier):
    halves = {"half": digits.train[::2], "noise": noise_like(digits.train)}
    values = frechet_metrics(classifier, digits.train, digits.heldout, halves)
    assert values["frechet/half_ratio"] < 2
    assert values["frechet/noise_ratio"] > 20
    assert values["frechet/noise"] == pytest.approx(values["frechet/noise_ratio"] * values["frechet/floor"])
    with pytest.raises(DataError, match=r"evaluate\.shards"):
        frechet_metrics(classifier, digits.train, digits.train.flip(0), {})


def test_classes_present(digits, classifier):
    kept = digits.train[(digits.train_labels < 3).nonzero().flatten()]
    values = class_metrics(classifier, 10, {"all": digits.train, "few": kept}, (digits.heldout, digits.heldout_labels))
    assert (values["classes/all_present"], values["classes/few_present"]) == (10, 3)
    assert sum(values[f"classes/few_share_{c}"] for c in range(10)) == pytest.approx(1)
    assert values["classes/few_share_0"] == pytest.approx(1 / 3, abs=0.02)
    assert values["classes/classifier_accuracy"] >= 0.97


def test_energy_measures_with_an_energy_that_is_known(digits):
    """E = roughness: blind to a flip, highest for noise and 0 for constant images."""

    def roughness(images: torch.Tensor) -> torch.Tensor:
        x = from_levels(images)
        return (x[:, :, 1:] - x[:, :, :-1]).square().flatten(1).mean(1)

    values = ood_metrics(roughness, digits.heldout)
    assert values["ood/constant_auroc"] == 0
    assert values["ood/noise_auroc"] > 0.95
    assert values["ood/flipped_auroc"] == pytest.approx(0.5, abs=0.01)
    means = energy_metrics(roughness, {"train": digits.train, "heldout": digits.heldout})
    assert means["energy/heldout"] == pytest.approx(float(roughness(digits.heldout).mean()))
    assert means["energy/train"] == pytest.approx(means["energy/heldout"], rel=0.05)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


def small_run(directory, shards, *overrides):
    """An energy that was never trained, 600 real digits as its chains."""
    chains = from_levels(torch.from_numpy(np.round(load_digits().images[:600] * 255 / 16).astype(np.uint8))[:, None])
    settings = [f"data.shards={shards}/train", f"evaluate.shards={shards}/test"]
    settings += ["energy.features=[4,8]", "buffer.size=600", *overrides]
    return str(make_run(directory, *settings, chains=chains))


def documented() -> list[re.Pattern]:
    """The keys in the tables of docs/evaluation.md, as patterns."""
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs/evaluation.md").read_text(), re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    words = {"SET": "[a-z_]+", "NAME": "[A-Za-z0-9_-]+", "_N": "_[0-9]+", "/K": "/[0-9]+"}
    return [re.compile(re.sub("|".join(words), lambda found: words[found[0]], key)) for key in keys]


def test_command_measures_a_run(tmp_path, shards, capsys):
    run, file = small_run(tmp_path / "run", shards), tmp_path / "deep" / "values.json"
    assert main(["evaluate", run, "--num", "40", "--steps", "2", "--json", str(file)]) == 0
    values, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert "1437 train, 360 heldout, 600 persistent, 40 fresh" in shown
    assert all(key in shown for key in values if not key.endswith(("_low", "_high")) and "_share_" not in key)
    assert "classes/fresh_shares (%)" in shown
    assert values["classes/persistent_present"] == 10
    patterns = documented()
    assert not [key for key in values if not any(pattern.fullmatch(key) for pattern in patterns)]
    unseen = {pattern.pattern for pattern in patterns if not any(map(pattern.fullmatch, values))}
    assert not [key for key in unseen if not key.startswith(("length", "accuracy", "likelihood", "frechet/fresh_den"))]
    assert values["frechet/persistent_ratio"] < 4 < values["frechet/fresh_ratio"]
    assert values["classes/classifier_accuracy"] >= 0.97
    assert {"ood/flipped_auroc", "energy/train", "energy/heldout", "energy/persistent", "energy/fresh"} < set(values)
    again = tmp_path / "again.json"
    assert main(["evaluate", run, "--metrics", "ood,energy", "--num", "40", "--steps", "2", "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == {k: v for k, v in values.items() if k.startswith(("ood/", "energy/"))}


def test_command_without_held_out_images(tmp_path, shards, capsys):
    run = small_run(tmp_path / "run", shards, "evaluate.shards=null", "evaluate.source=null")
    assert main(["evaluate", run, "--metrics", "energy,ood", "--num", "8", "--steps", "1"]) == 2
    assert "set evaluate.shards" in capsys.readouterr().err
    assert main(["evaluate", run, "--num", "8", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "ood: left out" in shown and "classes/fresh_present" in shown and "energy/heldout" not in shown


def test_held_out_images_of_another_shape(tmp_path, shards, capsys):
    """They are other data than the run's, whose shape is what it was trained with."""
    run = make_run(tmp_path / "run", "data.shape=[3,8,8]", "energy.features=[4,8]", "loss.negatives=noise",
                   f"data.shards={shards}/train", f"evaluate.shards={shards}/test")  # fmt: skip
    ensure_shards(f"{shards}/test", "digits", "test")
    assert main(["evaluate", str(run), "--metrics", "energy", "--num", "8", "--steps", "1"]) == 4
    said = capsys.readouterr().err
    assert "holds images of 1x8x8, and the run is one of images of 3x8x8" in said and "set evaluate.shards" in said
    assert "set data.shape" not in said


@pytest.mark.parametrize("flags", [["--metrics", "fid"], ["--num", "1"], ["--steps", "0"]])
def test_command_refuses_bad_usage(tmp_path, flags, capsys):
    assert main(["evaluate", str(tmp_path), *flags]) == 2
    assert flags[0] in capsys.readouterr().err
