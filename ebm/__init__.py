"""Distributed training of energy-based models on images.

`load` opens a trained run; `ebm.energies`, `ebm.samplers`, `ebm.losses` and `ebm.evaluation` are the parts.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own would be loaded by all who only ask for the version
if TYPE_CHECKING:
    from pathlib import Path

    from ebm.inference.run import TrainedRun

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def load(run: str | Path, *, device: str | None = None) -> TrainedRun:
    """Open a trained run: its energy, score and samples (`ebm.inference.run.TrainedRun`).

    Args:
        run: a run directory, whose newest checkpoint that verifies is taken, or one checkpoint inside it.
        device: what torch calls the device to compute on; default: cuda where there is one, else cpu.

    Raises DataError (of ebm.errors) where there is no run or no checkpoint, ConfigError where its config or the device
    can't be used.

    >>> run = ebm.load("runs/digits")
    >>> x = run.sample(16, steps=200)  # (16, 1, 8, 8) float32 in [-1, 1]
    >>> run.energy(x), run.score(x)  # (16,), and -dE/dx / T like x
    """
    from ebm.inference.run import open_run  # torch is loaded by those who use it

    return open_run(run, device)
