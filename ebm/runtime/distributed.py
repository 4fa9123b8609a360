"""The processes of a run, the device of each, and how exactly a GPU computes. Only this file uses accelerate, and
decides between a GPU and the CPU."""

import faulthandler
import logging
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, patch_environment
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ebm.config import TrainConfig
from ebm.errors import ConfigError, UserError

log = logging.getLogger(__name__)

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


T = TypeVar("T")

# The watchdog ends a rank that waits too long. The libraries' own clocks go on while a job is suspended: a limit of
# theirs near the watchdog's would end a job that is resumed.
TIMEOUT = timedelta(days=7)

CLEAN_UP = 30.0  # seconds that a failed rank may take to end
EXCHANGE = 5.0  # seconds at most between two exchanges of ranks that wait for rank 0

UNSET = "launch with torchrun or accelerate launch, which set them all, or unset RANK, WORLD_SIZE and LOCAL_RANK"

# What `accelerate launch`, its config file or the user's environment can ask accelerate for, and what follows here.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
WITHOUT_EFFECT = {  # the value that asks for nothing, and the key that decides here
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.accumulate"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "the run's config"),
    "ACCELERATE_MIXED_PRECISION": ("no", "train.mixed_precision"),
}


class World:
    """The group of a run's processes as one of them sees it: rank, size, device, and what the ranks do together."""

    def __init__(self, config: TrainConfig):
        _refuse_foreign_settings()
        check_launch(os.environ)
        device = choose_device(config.device)
        _check_precision(config, device)
        set_numerics(device, config.deterministic, config.tf32)
        backend = _backend(config, device)
        _join_restarted(backend)
        self._accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=config.mixed_precision,
            dynamo_backend="no",
            # Power iteration does not depend on data, so the ranks' buffers stay equal without a broadcast.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(backend=backend if "LOCAL_RANK" in os.environ else None, timeout=TIMEOUT),
            ],
        )
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.rank, self.size = self._accelerator.process_index, self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        self.is_main: bool = self._accelerator.is_main_process
        self.precision = config.mixed_precision
        self.exchange_every = min(EXCHANGE, config.collective_timeout / 4)  # seconds; each exchange is a beat
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.size != launched:
            raise ConfigError(
                f"{launched} processes were launched, but this one sees a group of {self.size}: they "
                "would train apart, unnoticed; launch with a file of launch/accelerate/ or with torchrun"
            )
        # Host-side agreement (stop requests, checkpoints) goes over gloo, so that it never waits for a GPU.
        self._host_group: dist.ProcessGroup | None = None
        self._gathers_on_host = self.size > 1 and backend == "gloo" and self.device.type == "cuda"
        if self.size > 1 and backend != "gloo":
            group = dist.new_group(backend="gloo", timeout=TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            self._host_group = group
        self._tell_foreign_settings()
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # as `gpu_ids` of a launcher's config file sets it
        if self.is_main and device.type == "cpu" and config.device == "auto" and wanted not in ("", "-1"):
            log.warning(
                f"CUDA_VISIBLE_DEVICES={wanted} names GPUs, but the run is on the CPU: torch sees none, or the "
                "launcher says CPU. With train.device=cuda a run ends here instead; train.device=cpu is content"
            )

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    def describe(self) -> str:
        """Returns one line on what the run computes on: device, precision, ranks, threads."""
        precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.precision]
        ranks = f"{self.size} ranks ({dist.get_backend()})" if self.size > 1 else "1 rank"
        threads = torch.get_num_threads()
        return f"device: {self.device_name}, {precision}, {ranks}, {threads} thread{'s' if threads > 1 else ''} a rank"

    def idle_cores(self) -> str | None:
        """Returns how to use this node's idle CPU cores, or None if less than half of the cores are idle."""
        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        busy = ranks * torch.get_num_threads()
        if self.device.type != "cpu" or 2 * busy > cores:
            return None
        return (
            f"computing on {busy} of {cores} CPU cores (accelerate launch sets one thread a process); for all of them: "
            f"OMP_NUM_THREADS={cores // ranks} accelerate launch ..., or train.threads={cores // ranks}"
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        # DDP takes the device from the model. Accelerate would name the one with this rank's number on its machine, and
        # there is none where ranks share a GPU.
        with warnings.catch_warnings(), patch_environment(accelerate_bypass_device_map="true"):
            # torch has another name for it, which accelerate does not know yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            prepared: nn.Module = self._accelerator.prepare(model)
        return prepared

    def autocast_dtype(self) -> torch.dtype:
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Returns a context in which gradients are averaged over the ranks for the last part of a batch only."""
        return nullcontext() if last else self._accelerator.no_sync(model)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. Accelerate's own backward would divide them by the launcher's number of accumulated
        batches."""
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler that `backward` uses. There is one in fp16 only."""
        scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        return scaler

    def ask(self, *flags: bool) -> Callable[[], list[bool]]:
        """Ask whether each flag is true on any rank. Call the result for the answers: the exchange runs in the
        background until then, since a thousand ranks need longer for it than for a chain step."""
        if self.size == 1:
            return lambda: list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._host_group, async_op=True)
        assert work is not None

        def answer() -> list[bool]:
            work.wait()
            return [bool(value) for value in values]

        return answer

    def any(self, flag: bool) -> bool:
        return self.ask(flag)()[0]

    def all(self, flag: bool) -> bool:
        return not self.any(not flag)

    def gather(self, value: T) -> list[T]:
        """Returns every rank's `value`, in rank order, on every rank. Values are small objects of our own making."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over the ranks of a tensor on this rank's device."""
        mean: Tensor = self._accelerator.reduce(values, reduction="mean")
        return mean

    def concatenate(self, values: Tensor) -> Tensor:
        """Returns the ranks' tensors (n, ...), equal in shape, concatenated along their first dimension."""
        if self._gathers_on_host:  # gloo gathers no tensors of a GPU
            on_host = values.cpu().contiguous()
            parts = [torch.empty_like(on_host) for _ in range(self.size)]
            dist.all_gather(parts, on_host)
            return torch.cat(parts).to(values.device)
        joined: Tensor = self._accelerator.gather(values)
        return joined

    def barrier(self) -> None:
        self._accelerator.wait_for_everyone()

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank what any rank ran into, so that none is left waiting for the others."""
        if self.size == 1:
            if error:
                raise error
            return
        if self.any(error is not None):
            first = next(e for e in self.gather(error) if e is not None)
            raise first

    def on_main(self, action: Callable[[], T], beat: Callable[[], None] | None = None) -> T:
        """Run `action` on rank 0. Every rank returns what it returned, or raises the UserError that it raised.

        With `beat` it may take as long as it likes: the other ranks wait in exchanges of some seconds, each of which
        notices a rank that is gone, and every rank calls `beat` at each."""
        result: T | None = None
        error: UserError | None = None
        if self.is_main:
            exchanges = None if beat is None else _Exchanges(self, beat)
            with exchanges or nullcontext():
                try:
                    result = action()
                except UserError as caught:
                    error = caught
            if exchanges is not None:
                exchanges.raise_problem()
        elif beat is not None:
            while self.any(False):
                beat()
        self.raise_together(error)
        values: list[Any] = self.gather(result)
        value: T = values[0]
        return value

    def lost_peer(self, error: BaseException) -> bool:
        """Whether `error` says that another rank is gone, rather than what went wrong here."""
        signs = ("gloo", "Connection closed by peer", "pair closure")
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)
        return self.size > 1 and isinstance(error, RuntimeError) and lost

    def meet_within(self, seconds: float) -> None:
        """Wait for the other ranks. A lost one is not waited for; if one is late, this process ends."""
        if self.size == 1:
            return
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        with suppress(RuntimeError):  # a lost peer
            self.any(False)
        faulthandler.cancel_dump_traceback_later()

    def abandon(self) -> None:
        """This rank failed. Its process ends without leaving the group, for which the others would be needed; should
        the interpreter's own clean-up wait for them all the same, it is cut short."""
        if self.size > 1:
            faulthandler.dump_traceback_later(CLEAN_UP, exit=True, file=2)

    def close(self) -> None:
        """Leave the group. All ranks together, after success: alone, a rank may wait for the others for ever."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _tell_foreign_settings(self) -> None:
        """Say which of the launcher's settings the run does not follow."""
        for name, (nothing, key) in WITHOUT_EFFECT.items():
            value = os.environ.get(name, nothing).lower()
            ours = self.precision if name == "ACCELERATE_MIXED_PRECISION" else nothing
            if self.is_main and value not in (nothing, ours):
                log.warning(f"{name}={value}, the launcher's, has no effect on this run: {key} decides")


class _Exchanges:
    """Rank 0's side of `World.on_main`. A thread tells the waiting ranks every few seconds that rank 0 still works."""

    def __init__(self, world: World, beat: Callable[[], None]):
        self._world, self._beat, self._over = world, beat, threading.Event()
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._world.any(not self._over.wait(self._world.exchange_every)):
                self._beat()
        except Exception as error:  # a rank is gone; the action, which does not need it, is finished first
            self._problem = error

    def raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem


def _refuse_foreign_settings() -> None:
    """Raises ConfigError if the launcher asks for something that would change what the run computes."""
    for name, meaning in REFUSED.items():
        if os.environ.get(name, "").lower() in YES:
            raise ConfigError(
                f"{name}={os.environ[name]}: the launcher asks for {meaning}, which would compute something else than "
                "the run's config says; unset it, or launch with --config_file and a file of launch/accelerate/"
            )
    if os.environ.get("ACCELERATE_TORCH_DEVICE"):
        raise ConfigError(
            f"ACCELERATE_TORCH_DEVICE={os.environ['ACCELERATE_TORCH_DEVICE']}: unset it, and choose by train.device "
            "(auto, cuda or cpu)"
        )


def check_launch(environment: Mapping[str, str]) -> None:
    """Raises ConfigError where the variables that launchers set are there in part, or say what can't be."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not environment.get(name, "0").isdecimal():
            raise ConfigError(f"{name}={environment[name]!r} of the environment: must be a number; {UNSET}")
    rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if rank >= max(size, 1) or size == 0:
        raise ConfigError(f"RANK={rank} of the environment: must be below WORLD_SIZE={size}; {UNSET}")
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR") if size > 1 or "LOCAL_RANK" in environment else ()
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        there = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment]
        raise ConfigError(
            f"the environment has {', '.join(f'{name}={environment[name]}' for name in there)}, as of a rank of a job, "
            f"but no {' and no '.join(missing)}; {UNSET}"
        )


def _check_precision(config: TrainConfig, device: torch.device) -> None:
    cuda = device.type == "cuda"
    if config.mixed_precision == "fp16" and not cuda:
        raise ConfigError(
            "train.mixed_precision=fp16 needs a GPU: on a CPU it would silently compute in float32; use bf16 or no"
        )
    if config.mixed_precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("train.mixed_precision=bf16: this GPU has no bfloat16; use fp16 or no")


def _backend(config: TrainConfig, device: torch.device) -> str:
    """Returns the backend by which ranks exchange gradients. Raises ConfigError if it can't work here."""
    if config.backend == "nccl" and device.type != "cuda":
        raise ConfigError("train.backend=nccl needs a GPU, and the run is on the CPU; use gloo or auto")
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device.type == "cuda" and config.backend != "gloo" and local > gpus:
        raise ConfigError(
            f"{local} ranks on a machine with {gpus} GPU{'s' if gpus > 1 else ''}: nccl needs one a rank; launch as "
            "many, or let ranks share a GPU with train.backend=gloo"
        )
    return ("nccl" if device.type == "cuda" else "gloo") if config.backend == "auto" else config.backend


def _join_restarted(backend: str) -> None:
    """Form the group where an elastic launcher (--max-restarts) started this process again; else accelerate does.

    The launcher keeps its store over restarts, and in it the addresses of processes that are gone: gloo would call
    these. So each restart meets under keys of its own."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    store = PrefixStore(f"restart_{restart}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
