"""The device of a process: the one place that decides between a GPU and the CPU, and how exactly a GPU computes."""

import os

import torch

from ebm.errors import ConfigError

YES = ("1", "true", "yes", "y", "t", "on")  # accelerate's


def choose_device(asked: str = "auto", key: str = "train.device") -> torch.device:
    """`asked`: auto, cuda or cpu, by the key or option `key`. auto is a GPU where there is one, unless the launcher
    says ACCELERATE_USE_CPU. Raises ConfigError where a GPU was asked for, and there is none."""
    launcher_says_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in YES
    if asked == "cuda":
        if launcher_says_cpu:
            raise ConfigError(
                f"{key}=cuda, but the launcher was told to use the CPU (ACCELERATE_USE_CPU, use_cpu: true in its "
                f"config file); launch with another file, or set {key}=cpu"
            )
        if not torch.cuda.is_available():
            raise ConfigError(
                f"{key}=cuda: torch {torch.__version__} sees no GPU here; see whether `nvidia-smi` does and whether "
                f"CUDA_VISIBLE_DEVICES hides it, or set {key}=cpu"
            )
    on_gpu = asked != "cpu" and torch.cuda.is_available() and not launcher_says_cpu
    return torch.device("cuda" if on_gpu else "cpu")


def set_numerics(device: torch.device, deterministic: bool, tf32: bool) -> None:
    """How a GPU computes, for the whole process (train.deterministic, train.tf32). A CPU computes the same bits every
    time as it is.

    An operation that has no deterministic algorithm warns once and goes on: it may come from a user's energy, and only
    the last bits of a resumed run depend on it. cuBLAS needs CUBLAS_WORKSPACE_CONFIG too, before CUDA starts
    (`ebm.runtime.process.prepare_process`).
    """
    if device.type != "cuda":
        return
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Filling costs a launch for each new tensor, and nothing reads such memory.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - torch's types lack the name
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic  # chooses by timing, so another start may choose otherwise
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
