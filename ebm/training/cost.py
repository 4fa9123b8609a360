"""--dry-run: the resolved config, and what a step costs, before anything is written."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ebm.config import Config, to_yaml
from ebm.energies import build_energy


def dry_run(config: Config) -> None:
    print(to_yaml(config))
    for name, value in estimate(config).items():
        print(f"{name:<24}{value}")


def estimate(config: Config) -> dict[str, str]:
    """Model size, FLOPs and memory of one optimizer step, measured on one image and scaled; nothing is allocated at
    full size. A chain step costs a forward and a backward to the input, about two forwards; the loss runs a forward
    and a full backward, about three, of positives and negatives: 2 K + 6 forwards a pair (docs/design.md)."""
    energy = build_energy(config.energy, config.data.shape, config.run.seed).eval()
    x = torch.zeros(1, *config.data.shape)
    labels = (torch.zeros(1, dtype=torch.int64),) if config.energy.num_classes else ()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        energy(x, *labels)
    forward = counter.get_total_flops()
    saved = 0

    def count(tensor):
        nonlocal saved
        saved += tensor.nbytes if not isinstance(tensor, torch.nn.Parameter) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        energy(x, *labels)
    parameters = sum(p.numel() for p in energy.parameters())
    batch, steps = config.train.batch_size, config.sampler.evaluations
    halved = 0.5 if config.train.mixed_precision != "no" else 1.0
    chain = x.numel() * getattr(torch, config.buffer.dtype).itemsize + 4  # and its age
    return {
        "parameters": f"{parameters:,}",
        "forward": f"{_human(forward, 'FLOP')} an image",
        "step": f"{_human(forward * batch * (2 * steps + 6), 'FLOP')} ({2 * steps / (2 * steps + 6):.0%} in the chain)",
        "weights and optimizer": f"{_human(parameters * 4 * 6, 'B')} a process (weights, gradient, Adam, EMA, chain)",
        "activations": f"about {_human(saved * halved * 2 * batch / config.train.accumulate, 'B')} over all processes",
        "replay buffer": (
            f"{_human(config.buffer.size * chain, 'B')} over all processes"
            if config.loss.negatives == "persistent"
            else "none"
        ),
    }


def _human(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} P{unit}"
