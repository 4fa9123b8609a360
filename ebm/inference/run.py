"""A trained run, opened for sampling, scoring and evaluation."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ebm.config import Config, load_config
from ebm.energies import FoldedEnergy, build_energy, marginal_energy
from ebm.errors import DataError
from ebm.runtime import checkpoint
from ebm.samplers.factory import sampler_in_use


class TrainedRun(NamedTuple):
    config: Config  # with the step size that training has left
    energy: FoldedEnergy  # with the averaged weights, float32
    checkpoint: Path
    device: torch.device

    @property
    def directory(self) -> Path:
        """The run's."""
        return self.checkpoint.parent.parent

    @property
    def temperature(self) -> float:
        """T of the density exp(-E / T) that was learned: that of the chains, or what the objective says."""
        loss, sampler = self.config.loss, self.config.sampler
        return loss.temperature if loss.negatives is None else sampler.implied_temperature

    def persistent_chains(self) -> Tensor:
        """The replay buffer's states (N, *shape) float32, stream by stream; of tempered ones the coldest replicas."""
        files = sorted(self.checkpoint.glob("stream_*.safetensors"))
        if not files:
            raise DataError(
                f"{self.checkpoint} holds no persistent chains (loss.negatives="
                f"{self.config.loss.negatives}); use fresh ones"
            )
        buffer = self.config.buffer
        slots = buffer.size // self.config.data.streams
        levels = self.config.sampler.levels
        shape = self.config.data.shape if levels == 1 else (levels, *self.config.data.shape)
        expected = {
            "x": torch.empty(slots, *shape, dtype=getattr(torch, buffer.dtype), device="meta"),
            "age": torch.empty(slots, dtype=torch.int32, device="meta"),
        }
        parts = [checkpoint.read_tensors(self.checkpoint, file.stem, expected)["x"] for file in files]
        x = torch.cat(parts).float().to(self.device)
        return x if levels == 1 else x[:, 0]

    def energies(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """E(x), (N,) float32 on the host. Without labels a conditional run gives -log sum_y exp(-E(x, y))."""
        if self.config.energy.num_classes and labels is None:
            return marginal_energy(self.class_energies(x))
        return self._in_blocks(self.energy, x, *(() if labels is None else (labels,)))

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class of a conditional run, (N, num_classes) float32 on the host."""
        return self._in_blocks(self.energy.class_energies, x)

    @torch.no_grad()
    def _in_blocks(self, function, *tensors: Tensor, block: int = 512) -> Tensor:
        parts = [function(*(part.to(self.device) for part in parts)).cpu()
                 for parts in zip(*(tensor.split(block) for tensor in tensors), strict=True)]  # fmt: skip
        return torch.cat(parts) if parts else torch.empty(0)


def open_run(path: str | Path, device: str | None = None) -> TrainedRun:
    """RUN, a run directory (its newest checkpoint that verifies) or one checkpoint inside it."""
    path = Path(path)
    if (path / "manifest.json").is_file() and path.parent.name == "checkpoints":
        problem = checkpoint.problem_of(path)
        if problem:
            raise DataError(f"{path}: {problem}; use another checkpoint of the run")
        chosen, run = path, path.parent.parent
    else:
        run, chosen = path, checkpoint.newest_valid(path / "checkpoints")
    if not (run / "config.yaml").is_file():
        raise DataError(f"{path}: no run directory (it has no config.yaml); give the run.dir of a training run")
    if chosen is None:
        raise DataError(f"{run}/checkpoints holds no valid checkpoint yet; train on, or lower checkpoint.every")
    config = load_config(run / "config.yaml")
    state = checkpoint.read_state(chosen)
    sampler = sampler_in_use(config.sampler, state.adapted_step, state.divergence["step_scale"])
    config = config.model_copy(update={"sampler": sampler})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    energy = build_energy(config.energy, config.data.shape, config.run.seed)
    energy.load_state_dict(checkpoint.read_tensors(chosen, "ema", energy.state_dict()))
    return TrainedRun(config, FoldedEnergy(energy.to(device)).refresh(), chosen, device)
