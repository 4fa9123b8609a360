"""The optimizer: Adam with warm-up and a cosine tail, steps that a non-finite gradient makes void, averaged weights."""

import math

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from ebm.config import Config, OptimConfig


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; biases and scalars are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def learning_rate(config: Config, step: int) -> float:
    """The rate of step 1 ... train.steps: linear warm-up, constant, then a cosine to lr_end * lr at the last step."""
    optim, steps = config.optim, config.train.steps
    warm = min(1.0, step / (optim.warmup_steps + 1))
    start = optim.decay_start * steps
    done = (step - start) / (steps - start) if steps > start else 0.0
    cosine = optim.lr_end + (1 - optim.lr_end) * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2
    return optim.lr * warm * cosine


def set_learning_rate(optimizer: torch.optim.Optimizer, config: Config, step: int, scale: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step) * scale


def clip_grad_norm(
    optimizer: torch.optim.Optimizer, max_norm: float | None, scaler: GradScaler | None = None
) -> Tensor:
    """The norm of the whole gradient, unscaled, before it is cut to `max_norm`; no host read."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor, scaler: GradScaler | None = None) -> None:
    """One optimizer step, or none where `finite` (bool scalar on the device) is false; no host read."""
    if scaler is None:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read by torch's fused kernels
        optimizer.step()
    else:  # which has seen by itself whether the gradient is finite
        scaler.step(optimizer)
        scaler.update()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, weight by weight; buffers are the model's own. No host read
    (torch's AveragedModel waits for the device at every update)."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for own, new in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(new)
