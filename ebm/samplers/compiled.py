"""The energy of chains, and of the loss, under torch.compile: only where it is right and pays off, and the same after a
restart."""

import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import torch
from torch import Tensor

from ebm.energies import BaseEnergyFunction, EnergyOfTensors
from ebm.runtime.files import read_json, replace

log = logging.getLogger(__name__)

# States (B, *shape) and extra inputs (B, ...), or with a list of weights before them -> energies (B,).
Function = Callable[..., Tensor]
WORTH = 1.03  # what is compiled must be this many times as fast: less is within what a measurement scatters

# Largest relative difference between compiled and eager energies and gradients. Compiled code keeps sums in float32
# that eager code rounds; a wrong gradient of inductor's was off by 40 %.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Compiler:
    """When the energy of a run's chains, or of its loss, is compiled.

    Attributes:
        always: also where it is not faster.
        tolerance: of `TOLERANCE`, for the type that the energy computes in.
        limit: seconds after which a compilation is given up.
        agree: whether something holds on every rank; all ranks compile, or none.
        file: keeps what was chosen, as compiled energies differ from eager ones in rounding and a resumed run must
            choose the same. `writes`: this rank writes it.
    """

    always: bool
    tolerance: float
    limit: float = 120.0
    agree: Callable[[bool], bool] = bool
    file: Path | None = None
    writes: bool = True

    def choose(
        self,
        energy: Function,
        inputs: Sequence[Tensor],
        results: Callable[[Function], Sequence[Tensor]],
        here: Callable[[Callable[[], Any]], Any],
        seconds: Callable[[Function], float],
        what: Literal["chains", "loss"] = "chains",
    ) -> Function:
        """`energy`, or its compiled form for `inputs` (states and extra inputs) and others of their shapes; the log
        says in one line which, and why.

        Args:
            results: what the two have to agree in: the energies of the batch at hand first, then gradients.
            here: calls a function where the energy will be called (in a thread of the engine's, say).
            seconds: measures a use of the energy, for a compiler that is not told to compile `always`.
            what: what `energy` is the energy of.
        """
        kind = _kind(inputs) if what == "chains" else f"loss of {_kind(inputs)}"
        subject = "chains are" if what == "chains" else "the loss is"
        before = self._choices().get(kind)
        if before is False:
            self._settle(kind, False)
            return energy
        start = time.monotonic()
        function, found = self._compiled(energy, inputs[0].device, results, here)
        spent = time.monotonic() - start
        gain = None
        if function is not None and not self.always and before is None:
            gain = seconds(energy) / seconds(function)
            found += f", {gain:.2f} times as fast"
        if not self._settle(kind, function is not None and (gain is None or gain >= WORTH)) or function is None:
            if before:
                found += "; the run was compiled before, and goes on with other rounding"
            level = logging.INFO if function is not None else logging.WARNING
            log.log(level, "%s not compiled (%.0f s): %s", subject, spent, found)
            return energy
        log.info("%s compiled (%.0f s): %s", subject, spent, found)
        return function

    def _compiled(
        self,
        energy: Function,
        device: torch.device,
        results: Callable[[Function], Sequence[Tensor]],
        here: Callable[[Callable[[], Any]], Any],
    ) -> tuple[Function | None, str]:
        """The compiled energy and how near it is to the eager one, or None and why there is none."""
        try:
            function: Function = compiled(energy)
            in_time(lambda: here(partial(results, function)), self.limit, device)
            ours, theirs = here(partial(results, function)), here(partial(results, energy))
        except torch.OutOfMemoryError:
            raise
        # Whatever a compiler, its absence, or code that it can't take raises: the energy stays as it is.
        except Exception as error:
            return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
        largest = max(errors[1:], key=lambda error: math.inf if math.isnan(error) else error)
        found = f"energies within {errors[0]:.1g} and gradients within {largest:.1g} of the eager ones"
        if not all(error <= self.tolerance for error in errors):  # NaN is no error below it
            return None, f"{found}, which is more than {self.tolerance:g}: the compiler is wrong about this energy"
        return function, found

    def _choices(self) -> dict[str, bool]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            return {str(kind): value is True for kind, value in read_json(self.file).items()}
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s can't be read, chains may be compiled otherwise than before: %s", self.file, str(error))
            return {}

    def _settle(self, kind: str, use: bool) -> bool:
        """What all ranks choose, which is kept."""
        use = self.agree(use)
        if self.file is None or not self.writes:
            return use
        choices = self._choices()
        try:
            if choices.get(kind) is not use:
                replace(self.file, json.dumps(choices | {kind: use}, indent=1).encode() + b"\n")
        except OSError as error:  # a full disk ends no run
            # As text: a handler may keep its records, and the error's frames hold the graph of the loss under way.
            log.warning("%s can't be written, a resumed run may choose otherwise: %s", self.file, str(error))
        return use


class EnergyOfLoss:
    """The energy that a loss evaluates: the module, or its compiled form, as `compiler` chooses at the first call with
    inputs of a shape.

    Args:
        dtype: autocast type of the loss.
    """

    def __init__(self, energy: BaseEnergyFunction, dtype: torch.dtype, compiler: Compiler):
        self.energy, self.dtype, self.compiler = energy, dtype, compiler
        self._of_tensors = EnergyOfTensors(energy)
        self._functions: dict[tuple[torch.Size, ...], Function] = {}  # by the shapes of their inputs

    def __call__(self, *inputs: Tensor) -> Tensor:
        """E (B,) of states (B, *shape) and perhaps labels (B,)."""
        tensors, shapes = self._of_tensors.tensors(), tuple(one.shape for one in inputs)
        if shapes not in self._functions:
            self._functions[shapes] = self._choose(tensors, inputs)
        function = self._functions[shapes]
        if function is self._of_tensors:
            energies: Tensor = self.energy(*inputs)
            return energies
        return self._call(function, tensors, inputs)

    def _call(self, function: Function, tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        # The same autocast state in the thread that compiles as in the training thread: compiled code checks it.
        with torch.autocast(inputs[0].device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return function(tensors, *inputs)

    def _choose(self, tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> Function:
        def results(function: Function) -> list[Tensor]:
            """Energies, the whole gradient, and that of each matrix: those of biases are sums that nearly cancel."""
            given = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
            with torch.enable_grad():
                energies = self._call(function, given, inputs)
                leaves = [tensor for tensor in given if tensor.requires_grad]
                gradients = torch.autograd.grad(energies.sum(), leaves, materialize_grads=True)
            whole = torch.cat([gradient.flatten() for gradient in gradients])
            return [energies.detach(), whole, *(gradient for gradient in gradients if gradient.ndim > 1)]

        def seconds(function: Function) -> float:
            return best_seconds(partial(results, function), inputs[0].device)

        return self.compiler.choose(self._of_tensors, inputs, results, lambda call: call(), seconds, "loss")


def compiled(energy: Function) -> Function:
    """torch.compile of `energy` for fixed shapes. Under deterministic algorithms it tries no variants of a kernel
    against each other, as another start might choose others."""
    tries = torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled()
    mode = "max-autotune-no-cudagraphs" if tries else "default"

    # Inside the forward of a module whose gradients are averaged, torch would cut the graph into pieces for it. What is
    # averaged here are gradients of weights before their normalisation, outside of the graph.
    torch._dynamo.config.optimize_ddp = False
    # To dynamo all energies of a process, and all their shapes, are one function, which it runs eagerly from the ninth
    # compilation on, without an error.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # train.tf32 decides

    def call(*inputs: Any) -> Tensor:
        return energy(*inputs)

    return torch.compile(call, dynamic=False, mode=mode)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|; 0 where both are 0. Waits for the device."""
    difference, size = (float(t.double().norm()) for t in (value - expected, expected))
    return difference / size if size else difference


def in_time(function: Callable[[], object], limit: float, device: torch.device) -> None:
    """Calls `function` in a thread. Raises TimeoutError if it has not returned after `limit` seconds; it can't be
    stopped then, and its result is dropped when it ends.

    The call sees the caller's context variables, in which later releases of torch keep their settings. The thread
    outlives it: a CUDA build of torch 2.11 that finds no GPU makes a guard in the memory of the thread that compiles,
    where the next compilation of the process reads it. It keeps nothing of a call that was in time."""
    calls, failed, returned = [function], list[BaseException](), Event()
    threads = torch.get_num_threads()

    def run() -> None:
        try:
            torch.set_num_threads(threads)  # compiled code asks for the number that it was compiled with
            if device.type == "cuda":
                torch.cuda.set_device(device)
            calls.pop()()
        except BaseException as error:  # raised again in the caller's thread
            failed.append(error)
        returned.set()
        Event().wait()  # for as long as the process lives

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the thread's stream does not wait for the caller's
    Thread(target=copy_context().run, args=(run,), name="compile", daemon=True).start()
    if not returned.wait(limit):
        raise TimeoutError(f"not compiled within {limit:.0f} s")
    if failed:
        raise failed.pop()


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The duration of a call on a GPU, the best of three after a first one."""
    times = []
    for _ in range(4):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _kind(inputs: Sequence[Tensor]) -> str:
    """What a choice holds for: the shapes, the device's model, the version of torch."""
    on = inputs[0].device
    device = torch.cuda.get_device_name(on) if on.type == "cuda" else "CPU"
    shapes = ", ".join(str(list(t.shape)) for t in inputs)
    return f"{shapes} on {device}, torch {torch.__version__}"
