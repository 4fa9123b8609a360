"""energy.kind=import: a module of the user, found from where the command runs, and what is refused."""

import os
import subprocess
import sys

import pytest
import torch
from runs import ROOT
from torch import nn

from ebm.config import ImportConfig
from ebm.config.energies import HybridConfig
from ebm.energies import BaseEnergyFunction, build_energy

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


# What a console script does: Python puts the script's own folder first on its path, and not the working directory.
CONSOLE_SCRIPT = "import sys; from ebm.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize("start", ["console script", "train.py"])
def test_a_module_in_the_working_directory_is_found(folder, tmp_path_factory, start):
    if start == "train.py":
        command = [str(ROOT / "train.py")]
    else:
        script = tmp_path_factory.mktemp("bin") / "ebm"
        script.write_text(CONSOLE_SCRIPT)
        command = [str(script), "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run([sys.executable, *command, "--config", "config.yaml", "--dry-run"], cwd=folder,
                           env=environment, capture_output=True, text=True)  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "energy_of_mine:MyEnergy" in shown.stdout


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
