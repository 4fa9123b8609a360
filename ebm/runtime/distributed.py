"""The processes of a run: the only file that knows accelerate."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ebm.config import TrainConfig
from ebm.errors import ConfigError, UserError
from ebm.runtime.watchdog import GRACE

T = TypeVar("T")


class World:
    """This process among all of the run's: its rank, its device, and what the ranks do together."""

    def __init__(self, config: TrainConfig):
        cuda = torch.cuda.is_available()
        if config.mixed_precision == "fp16" and not cuda:
            raise ConfigError(
                "train.mixed_precision=fp16 needs a GPU: on a CPU it would silently compute in float32; use bf16 or no"
            )
        if config.mixed_precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError("train.mixed_precision=bf16: this GPU has no bfloat16; use fp16 or no")
        # The watchdog is first to see that a rank hangs, and shows where; a collective may have begun before its beat.
        timeout = timedelta(seconds=config.collective_timeout + 2 * GRACE)
        _join_restarted(timeout, "nccl" if cuda else "gloo")
        self.accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision=config.mixed_precision,
            # Power iteration does not depend on data, so the ranks' buffers stay equal without a broadcast.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if self.size != launched:
            raise ConfigError(
                f"{launched} processes were launched, but this one sees a group of {self.size}: they "
                "would train apart, unnoticed; launch with a file of launch/accelerate/ or with torchrun"
            )
        # Host-side agreement (stop requests, checkpoints) goes over gloo, so that it never waits for a GPU.
        self._host_group = dist.new_group(backend="gloo") if self.size > 1 and cuda else None

    def idle_cores(self) -> str | None:
        """How to use them, where half of this node's cores or more have nothing to do."""
        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        busy = ranks * torch.get_num_threads()
        if self.device.type != "cpu" or 2 * busy > cores:
            return None
        return (
            f"computing on {busy} of {cores} CPU cores (accelerate launch sets one thread a process); for all of them: "
            f"OMP_NUM_THREADS={cores // ranks} accelerate launch ..."
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():  # torch has another name for it, which accelerate does not know yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return self.accelerator.prepare(model)

    def autocast_dtype(self) -> torch.dtype:
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.accelerator.mixed_precision]

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Gradients are averaged over the ranks in the last part of a batch alone."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The one that `backward` scales losses with; in fp16 alone."""
        return self.accelerator.scaler

    def ask(self, *flags: bool) -> Callable[[], list[bool]]:
        """For each flag, whether it is true on any rank: known when the result is called, while the ranks meet behind
        the work in between. Over a thousand ranks take longer to meet than a chain step does."""
        if self.size == 1:
            return lambda: list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)

        def answer() -> list[bool]:
            work.wait()
            return [bool(value) for value in values]

        return answer

    def any(self, flag: bool) -> bool:
        return self.ask(flag)()[0]

    def all(self, flag: bool) -> bool:
        return not self.any(not flag)

    def gather(self, value) -> list:
        """`value` of every rank, in rank order, on every rank. For small objects of our own making."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks of a tensor on this rank's device."""
        return self.accelerator.reduce(values, reduction="mean")

    def concatenate(self, values: Tensor) -> Tensor:
        """The ranks' tensors (n, ...), equal in shape, along their first dimension."""
        return self.accelerator.gather(values)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, or the UserError it raises there, on every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as caught:
                error = caught
        self.raise_together(error)
        return self.gather(result)[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank what any rank ran into, so that none is left waiting for the others."""
        if self.size == 1:
            if error:
                raise error
            return
        if self.any(error is not None):
            first = next(e for e in self.gather(error) if e is not None)
            raise first

    def lost_peer(self, error: BaseException) -> bool:
        """Whether `error` says that another rank is gone, rather than what went wrong here."""
        signs = ("gloo", "Connection closed by peer", "pair closure")
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
        return self.size > 1 and isinstance(error, RuntimeError) and lost

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _join_restarted(timeout: timedelta, backend: str) -> None:
    """Form the group where an elastic launcher (--max-restarts) started this process again; else accelerate does.

    The launcher keeps its store over restarts, and in it the addresses of processes that are gone: gloo would call
    these. So each restart meets under keys of its own."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(f"restart_{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
