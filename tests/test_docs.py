"""The guide's code runs as it stands, and does what the text around it says."""

import re

import pytest
import torch
from runs import ROOT

GUIDE = ROOT / "docs" / "custom_energies.md"


@pytest.fixture(scope="module")
def guide():
    """The names that all of its Python blocks leave, run one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    names = {"__name__": "guide"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(GUIDE), "exec"), names)
    return names


def kl_from_the_truth(truth, energy):
    """KL(truth || energy) in nats, by quadrature on [-9, 9]^2."""
    axis = torch.linspace(-9, 9, 181)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p, q = (torch.log_softmax(-e(points).double(), 0) for e in (truth, energy))
    return (p.exp() * (p - q)).sum().item()


def test_training_learns(guide):
    untrained = kl_from_the_truth(guide["truth"], guide["prior"])
    assert untrained > 0.5
    assert kl_from_the_truth(guide["truth"], guide["energy"]) < 0.1
    assert kl_from_the_truth(guide["truth"], guide["scored"]) < 0.1


def test_samples_are_of_the_density(guide):
    """The chains' share of each quadrant, beside the true one."""
    shares = [
        [((x[:, 0] > 0) == right).logical_and((x[:, 1] > 0) == up).float().mean() for right in (0, 1) for up in (0, 1)]
        for x in (guide["samples"], guide["data"])
    ]
    assert (torch.tensor(shares[0]) - torch.tensor(shares[1])).abs().max() < 0.15


def test_a_blend_heats_the_prior_as_the_guide_says(guide):
    a, b = guide["a"], guide["b"]
    assert (guide["prior"](b) - guide["prior"](a)).item() == pytest.approx(0.5)
    assert (guide["blend"](b) - guide["blend"](a)).item() == pytest.approx(0.25)


def test_shapes(guide):
    x = guide["x"]
    for name in ("plain", "confined", "labelled", "hybrid", "product", "tilted", "cooler", "either", "learned"):
        assert guide[name](x).shape == (16,), name
    assert guide["labelled"].class_energies(x).shape == (16, 3)
    for side in (8, 12, 28):
        assert guide["ConvEnergy"]()(torch.zeros(2, 1, side, side)).shape == (2,)


def test_the_guide_names_every_kind():
    from typing import get_args

    from ebm.config import EnergyConfig

    kinds = {member.model_fields["kind"].default for member in get_args(get_args(EnergyConfig)[0])}
    assert set(re.findall(r"^\| `(\w+)` \|", GUIDE.read_text(), re.MULTILINE)) == kinds
