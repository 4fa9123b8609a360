"""Run directories without a training: a config, one checkpoint with chosen weights and chains."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ebm.config import load_config, to_yaml
from ebm.energies import BaseEnergyFunction, GaussianMixtureEnergy, build_energy
from ebm.runtime import checkpoint
from ebm.training.divergence import DivergenceMonitor

VECTORS = ("data.source=null", "evaluate.source=null", "evaluate.shards=null", "energy.kind=gaussian")


def make_run(
    directory: Path,
    *settings: str,
    chains: Tensor | None = None,
    labels: Tensor | None = None,
    change: Callable[[BaseEnergyFunction], None] | None = None,
) -> Path:
    """A run at step 1 with the config's initial weights, which `change` may change. `chains` (buffer.size, *shape): its
    persistent chains, which have `labels` (buffer.size,)."""
    config = load_config(None, [f"run.dir={directory}", *settings])
    energy = build_energy(config.energy, config.data.shape, config.run.seed)
    if change is not None:
        change(energy)
    weights = energy.state_dict()
    files = {"ema": weights, "model": weights}
    if chains is not None:
        for v, part in enumerate(chains.chunk(config.data.streams)):
            files[f"stream_{v:04d}"] = {"x": part, "age": torch.zeros(len(part), dtype=torch.int32)}
            if labels is not None:
                files[f"stream_{v:04d}"]["labels"] = labels.chunk(config.data.streams)[v]
    alone = SimpleNamespace(is_main=True, barrier=lambda: None, raise_together=lambda _: None, gather=lambda v: [v])
    (directory / "checkpoints").mkdir(parents=True)
    saver = checkpoint.Saver(directory / "checkpoints", alone)
    counts = dict.fromkeys(("skipped_samples", "skipped_steps", "skipped_in_row", "reset_chains"), 0)
    monitor = DivergenceMonitor(config.health).state()
    state = {"step": 1, "positions": {}, "scaler": None, "good": True, "divergence": monitor}
    saver.start(1, files, state | counts)
    assert saver.finish(keep=1)
    (directory / "config.yaml").write_text(to_yaml(config))
    return directory


class SteepEnergy(BaseEnergyFunction):
    """`steepness` times the energy of a mixture of three Gaussians of deviation `sigma` in `dim` dimensions."""

    def __init__(self, dim: int = 16, sigma: float = 0.1, steepness: float = 1.0):
        super().__init__()
        means = 0.6 * torch.eye(dim, dtype=torch.float64)[:3]
        self.mixture, self.steepness = GaussianMixtureEnergy(means, sigma**2), steepness
        self.weight = torch.nn.Parameter(torch.zeros(()))  # an energy of a run has some

    def forward(self, x: Tensor) -> Tensor:
        return self.steepness * self.mixture(x) + 0 * self.weight


def mixture_samples(num: int, dim: int = 16, sigma: float = 0.1, seed: int = 0) -> Tensor:
    """Exact samples of `SteepEnergy` at steepness 1, (num, dim)."""
    draws = torch.Generator().manual_seed(seed)
    means = 0.6 * torch.eye(dim)[:3]
    return means[torch.randint(3, (num,), generator=draws)] + sigma * torch.randn(num, dim, generator=draws)
