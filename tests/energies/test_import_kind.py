"""energy.kind=import: a module of the user, found from where the command runs, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT
from small_networks import AwkwardEnergy, images
from torch import nn

from ebm.config import ImportConfig
from ebm.config.energies import HybridConfig
from ebm.energies import BaseEnergyFunction, FoldedEnergy, build_energy, marginal_energy
from ebm.errors import ConfigError

MODULE = """
from torch import nn

import sizes_of_mine
from ebm.energies import BaseEnergyFunction

class MyEnergy(BaseEnergyFunction):
    def __init__(self, hidden=sizes_of_mine.HIDDEN):
        super().__init__()
        from more_of_mine import activation
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), activation(), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.net(x).squeeze(1)
"""
CONFIG = "data: {shards: d, shape: [1, 8, 8]}\nenergy: {kind: import, path: 'energy_of_mine:MyEnergy'}\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "energy_of_mine.py").write_text(MODULE)
    (tmp_path / "sizes_of_mine.py").write_text("HIDDEN = 5\n")
    (tmp_path / "more_of_mine.py").write_text("from torch.nn import SiLU as activation\n")
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


# Python puts the folder of a script first on its path, here that of the console script, and not the working directory.
SCRIPT = """
from ebm.config import load_config
from ebm.energies import build_energy

config = load_config("config.yaml", ["energy.settings.hidden=7"])
print(build_energy(config.energy, config.data.shape, config.run.seed).net[1].out_features)
"""


def test_a_module_in_the_working_directory_is_found(folder, tmp_path_factory):
    script = tmp_path_factory.mktemp("bin") / "ebm"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True)
    assert shown.stdout == "7\n", shown.stderr


def test_the_search_path_is_left_as_it_was(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    for name in ("energy_of_mine", "sizes_of_mine", "more_of_mine"):
        monkeypatch.setitem(sys.modules, name, None)  # so that monkeypatch removes them afterwards
        del sys.modules[name]
    energy = build_energy(ImportConfig(path="energy_of_mine:MyEnergy"), (1, 8, 8), seed=0)
    assert energy.net[1].out_features == 5
    assert sys.path == before


class PlainModule(nn.Module):
    """A module that its user has not derived from BaseEnergyFunction."""

    def __init__(self, wide: int = 3):
        super().__init__()
        self.layer = nn.Linear(2, wide)

    def forward(self, x, y=None):
        e = self.layer(x).square()
        return e.sum(1) if y is None else e.gather(1, y[:, None]).squeeze(1)


def test_a_plain_module_becomes_an_energy(monkeypatch):
    """Also as the network of a hybrid, with labels, and under the same names of parameters."""
    monkeypatch.setitem(sys.modules, "plain_modules", sys.modules[__name__])
    config = ImportConfig(path="plain_modules:PlainModule", num_classes=3)
    energy, x = build_energy(config, (2,), seed=0), torch.ones(4, 2)
    assert isinstance(energy, BaseEnergyFunction) and isinstance(energy, PlainModule)
    assert list(energy.state_dict()) == ["layer.weight", "layer.bias"]
    torch.testing.assert_close(energy.class_energies(x), energy.layer(x).square())
    hybrid = build_energy(HybridConfig(network=ImportConfig(path="plain_modules:PlainModule")), (2,), seed=0)
    torch.testing.assert_close(hybrid(x), 0.5 * x.square().sum(1) + hybrid.network(x))


class BatchNormEnergy(BaseEnergyFunction):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.body(x).sum((1, 2, 3))


class DropoutEnergy(BaseEnergyFunction):
    def __init__(self, p: float = 0.1):
        super().__init__()
        self.drop = nn.Dropout2d(p)

    def forward(self, x):
        return self.drop(x).sum((1, 2, 3))


@pytest.fixture
def importable(monkeypatch):
    """This file as a module that `energy.path` can name."""
    monkeypatch.setitem(sys.modules, "user_energies", sys.modules[__name__])

    def build(name, **settings):
        return build_energy(ImportConfig(path=f"user_energies:{name}", settings=settings), (3, 8, 8), seed=1)

    return build


def test_a_users_energy(importable):
    energy = importable("AwkwardEnergy", width=4, spectral=False)
    assert isinstance(energy, AwkwardEnergy) and len(energy.weights) == 4
    again = importable("AwkwardEnergy", width=4, spectral=False)
    assert torch.equal(energy.first.weight, again.first.weight)
    assert isinstance(importable("DropoutEnergy", p=0), DropoutEnergy)


class ClassesEnergy(BaseEnergyFunction):
    def forward(self, x, y):
        return x.flatten(1).square().sum(1) * (1 + y)


def test_a_users_classes(importable):
    """`class_energies` and the folded copy's marginal, of a class that has `forward` alone."""
    config = ImportConfig(path="user_energies:ClassesEnergy", num_classes=3)
    energy, x = build_energy(config, (3, 8, 8), seed=0), images(4, (3, 8, 8)) / 10
    squared = x.square().sum((1, 2, 3))
    torch.testing.assert_close(energy.class_energies(x), squared[:, None] * torch.tensor([1, 2, 3]))
    torch.testing.assert_close(
        marginal_energy(FoldedEnergy(energy).refresh().class_energies(x)),
        -(torch.arange(1, 4) * -squared[:, None]).exp().sum(1).log(),
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [("BatchNormEnergy", r"body\.1 is a BatchNorm2d.*GroupNorm"), ("DropoutEnergy", "drop is a Dropout2d.*random")],
)
def test_layers_that_mix_samples_or_are_random_are_refused(importable, name, words):
    with pytest.raises(ConfigError, match=words):
        importable(name)


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("no_such_module:Energy", {}, "No module named 'no_such_module'.*must be importable"),
        ("user_energies:NoSuchEnergy", {}, "no attribute 'NoSuchEnergy'"),
        ("user_energies:AwkwardEnergy", {"hidden": 4}, "unexpected keyword argument 'hidden'"),
    ],
)
def test_import_errors_name_the_key(importable, path, settings, words):
    with pytest.raises(ConfigError, match=rf"energy\.path='{path}'.*{words}"):
        build_energy(ImportConfig(path=path, settings=settings), (3, 8, 8), seed=0)
