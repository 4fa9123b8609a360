"""The energy of chains under torch.compile: only where it is right and pays off, and the same after a restart."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from ebm.runtime.files import read_json, replace
from ebm.samplers.base import Energy, evaluate

log = logging.getLogger(__name__)

Function = Callable[..., Tensor]  # states (B, *shape) and extra inputs (B, ...) -> energies (B,)
WORTH = 1.03  # a compiled chain must be this many times as fast: less is within what a measurement scatters

# Largest relative difference between compiled and eager energies and gradients. Compiled code keeps sums in float32
# that eager code rounds; a wrong gradient of inductor's was off by 40 %.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Compiler:
    """When a run's chains are compiled.

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
        x: Tensor,
        labels: Sequence[Tensor],
        here: Callable[[Callable[[], Any]], Any],
        seconds: Callable[[Function], float],
    ) -> Function:
        """`energy`, or its compiled form for inputs like these; the log says in one line which, and why.

        `here` calls a function where chains will run (in a thread of the engine's, say); `seconds` measures a chain.
        """
        kind = _kind(x, labels)
        before = self._choices().get(kind)
        if before is False:
            self._settle(kind, False)
            return energy
        start = time.monotonic()
        function, found = self._compiled(energy, x, labels, here)
        spent = time.monotonic() - start
        gain = None
        if function is not None and not self.always and before is None:
            gain = seconds(energy) / seconds(function)
            found += f", {gain:.2f} times as fast"
        if not self._settle(kind, function is not None and (gain is None or gain >= WORTH)) or function is None:
            if before:
                found += "; the run was compiled before, and goes on with other rounding"
            level = logging.INFO if function is not None else logging.WARNING
            log.log(level, "chains are not compiled (%.0f s): %s", spent, found)
            return energy
        log.info("chains are compiled (%.0f s): %s", spent, found)
        return function

    def _compiled(
        self, energy: Function, x: Tensor, labels: Sequence[Tensor], here: Callable[[Callable[[], Any]], Any]
    ) -> tuple[Function | None, str]:
        """The compiled energy and how near it is to the eager one, or None and why there is none."""
        try:
            function: Function = compiled(energy)
            in_time(lambda: here(lambda: evaluate(_with(function, labels), x)), self.limit, x.device)
            ours = here(lambda: evaluate(_with(function, labels), x))
            theirs = here(lambda: evaluate(_with(energy, labels), x))
        except torch.OutOfMemoryError:
            raise
        # Whatever a compiler, its absence, or code that it can't take raises: the chain runs as it is.
        except Exception as error:
            return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
        found = "energies within {:.1g} and gradients within {:.1g} of the eager ones".format(*errors)
        if not all(error <= self.tolerance for error in errors):  # NaN is no error below it
            return None, f"{found}, which is more than {self.tolerance:g}: the compiler is wrong about this energy"
        return function, found

    def _choices(self) -> dict[str, bool]:
        if self.file is None or not self.file.exists():
            return {}
        try:
            return {str(kind): value is True for kind, value in read_json(self.file).items()}
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s can't be read, chains may be compiled otherwise than before: %s", self.file, error)
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
            log.warning("%s can't be written, a resumed run may choose otherwise: %s", self.file, error)
        return use


def compiled(energy: Function) -> Function:
    """torch.compile of `energy` for fixed shapes. Under deterministic algorithms it tries no variants of a kernel
    against each other, as another start might choose others."""
    tries = torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled()
    mode = "max-autotune-no-cudagraphs" if tries else "default"

    def call(*inputs: Tensor) -> Tensor:
        return energy(*inputs)

    return torch.compile(call, dynamic=False, mode=mode)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|; 0 where both are 0. Waits for the device."""
    difference, size = (float(t.double().norm()) for t in (value - expected, expected))
    return difference / size if size else difference


def in_time(function: Callable[[], object], limit: float, device: torch.device) -> None:
    """Calls `function` in a thread. Raises TimeoutError if it has not returned after `limit` seconds; it can't be
    stopped then, and its result is dropped when it ends."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            function()
        except BaseException as error:  # raised again in the caller's thread
            failed.append(error)

    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the thread's stream does not wait for the caller's
    thread = Thread(target=run, name="compile", daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        raise TimeoutError(f"not compiled within {limit:.0f} s")
    if failed:
        raise failed[0]


def _with(function: Function, labels: Sequence[Tensor]) -> Energy:
    return lambda x: function(x, *labels)


def _kind(x: Tensor, labels: Sequence[Tensor]) -> str:
    """What a choice holds for: the shapes, the device's model, the version of torch."""
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "CPU"
    shapes = ", ".join(str(list(t.shape)) for t in (x, *labels))
    return f"{shapes} on {device}, torch {torch.__version__}"
