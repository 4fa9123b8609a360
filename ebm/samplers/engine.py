"""The engine runs samplers at the speed of the hardware and gives the chains of the plain functions."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache, partial
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from ebm.samplers.base import Energy, Info, evaluate, mean_info
from ebm.samplers.compiled import Compiler, Function, best_seconds
from ebm.streams import Philox, StreamSources

log = logging.getLogger(__name__)

Sampler = Callable[..., tuple[Tensor, Info]]


class Engine:
    """Runs samplers on one energy whose tensors stay where they are (`FoldedEnergy`).

    Chains are independent, so on the CPU each thread runs its own to the end: threads that share every layer of a small
    network meet dozens of times a step, and half of the time goes by in waking them. On CUDA a whole chain, K forwards,
    gradients and updates, is captured once for each (sampler, shape, settings) as a graph over static buffers and
    replayed by one launch: at small batches thousands of single launches take longer than the network. A chain that
    can't be captured (its energy reads device memory on the host, say) runs as it is, and the log says so once. In all
    cases the noise comes from the same generators in the same order. The energy must keep no state between calls.

    With a `compiler`, the energy may be compiled at the first call with inputs of a shape.
    """

    def __init__(self, energy: Function, *, capture: bool = True, compiler: Compiler | None = None):
        self.energy, self.capture, self.compiler = energy, capture, compiler
        self._graphs: dict[tuple[Any, ...], _Captured] = {}
        self._functions: dict[tuple[torch.Size, ...], Function] = {}  # by the shapes of their inputs

    def __call__(
        self, sampler: Sampler[Info], x: Tensor, *labels: Tensor, generator: StreamSources, **settings: Any
    ) -> tuple[Tensor, Info]:
        """`sampler(x -> energy(x, *labels), x, generator=generator, **settings)`: the final states, and what happened
        as a named tuple of means over the batch."""
        threads = 1 if x.is_cuda or isinstance(generator, Philox) else _threads(len(generator))
        energy = self._function(threads, sampler, x, labels, generator, settings)
        if x.is_cuda and self.capture:
            captured = self._captured(energy, sampler, x, labels, generator, settings)
            if captured is not None:
                return captured(x, labels, generator, settings)
        if threads > 1 and not isinstance(generator, Philox):
            return _in_threads(threads, energy, sampler, x, labels, generator, settings)
        return sampler(_of_states(energy, labels), x, generator=generator, **settings)

    def _function(
        self,
        threads: int,
        sampler: Sampler[Info],
        x: Tensor,
        labels: Sequence[Tensor],
        generator: StreamSources,
        settings: dict[str, Any],
    ) -> Function:
        """The energy, or its compiled form, for inputs of these shapes."""
        if self.compiler is None:
            return self.energy
        shapes = (x.shape, *(y.shape for y in labels))
        if shapes not in self._functions:
            states, *extra = _first_inputs(sampler, [y.chunk(threads)[0] for y in (x, *labels)], settings)

            def here(function: Callable[[], Any]) -> Any:
                return function() if threads == 1 else _pool(threads).submit(copy_context().run, function).result()

            def seconds(energy: Function) -> float:
                return _seconds(energy, self.capture, sampler, x, labels, len(generator), settings)

            def results(energy: Function) -> Sequence[Tensor]:
                return evaluate(_of_states(energy, extra), states)

            self._functions[shapes] = self.compiler.choose(self.energy, (states, *extra), results, here, seconds)
        return self._functions[shapes]

    def _captured(
        self,
        energy: Function,
        sampler: Sampler[Info],
        x: Tensor,
        labels: Sequence[Tensor],
        generator: StreamSources,
        settings: dict[str, Any],
    ) -> "_Captured | None":
        """The graph of this call, or None if it can't be captured. Other settings (a step size that was cut) make a new
        graph in place of the old one; tensors among them (a step size that adapts) are inputs of the graph."""
        key = (sampler, x.shape, len(labels), type(generator), len(generator))
        captured = self._graphs.get(key)
        if captured is None or captured.settings != numbers_of(settings):
            self._graphs.pop(key, None)
            try:
                captured = self._graphs[key] = _Captured(energy, sampler, x, labels, generator, settings)
            except CaptureError as error:
                self.capture = False
                self._graphs.clear()
                # As text: a handler may keep its records, and the error's frames hold the memory of the capture.
                log.warning("the chain can't be captured as a CUDA graph and runs step by step: %s", str(error))
                return None
        return captured


def _in_threads(
    threads: int,
    energy: Function,
    sampler: Sampler[Info],
    x: Tensor,
    labels: Sequence[Tensor],
    generator: Sequence[torch.Generator],
    settings: dict[str, Any],
) -> tuple[Tensor, Info]:
    """The chain, cut into one for each thread."""
    share = len(generator) // threads  # streams of each thread

    def chain(part: int) -> tuple[Tensor, Info]:
        own = [y.chunk(threads)[part] for y in (x, *labels)]
        generators = generator[part * share : (part + 1) * share]
        return sampler(_of_states(energy, own[1:]), own[0], generator=generators, **settings)

    states, infos = zip(*_pool(threads).map(chain, range(threads)), strict=True)
    return torch.cat(states), mean_info(infos)


def _of_states(energy: Function, labels: Sequence[Tensor]) -> Energy:
    """x -> energy(x, *labels). Where there are several states for each label, one after the other, as the replicas of
    `tempering` are, the labels are repeated."""
    return lambda x: energy(x, *_repeated(labels, x))


def _repeated(labels: Sequence[Tensor], x: Tensor) -> Iterator[Tensor]:
    return (y.unsqueeze(1).expand(-1, len(x) // len(y), *y.shape[1:]).flatten(0, 1) for y in labels)


class _Seen(Exception):  # no error: it ends a chain at its first energy
    """Carries the inputs of an energy out of a sampler."""

    def __init__(self, inputs: tuple[Tensor, ...]):
        super().__init__()
        self.inputs = inputs


def _first_inputs(sampler: Sampler[Info], inputs: Sequence[Tensor], settings: dict[str, Any]) -> tuple[Tensor, ...]:
    """What `sampler` gives an energy first: states in its layout, those of all replicas in a row, and the labels."""

    def energy(*inputs: Tensor) -> Tensor:
        raise _Seen(tuple(y.detach() for y in inputs))

    x, *labels = inputs
    try:
        sampler(_of_states(energy, labels), x, generator=Philox([0], x.device), **settings)
    except _Seen as seen:
        return seen.inputs
    raise AssertionError("the sampler evaluates no energy")


def _seconds(
    energy: Function,
    capture: bool,
    sampler: Sampler[Info],
    x: Tensor,
    labels: Sequence[Tensor],
    streams: int,
    settings: dict[str, Any],
) -> float:
    """The duration of a chain on the GPU, the best of three; captured where it can be, with a source of its own."""
    source = Philox([0] * streams, x.device)

    def plain() -> object:
        return sampler(_of_states(energy, labels), x, generator=source, **settings)

    run = plain
    if capture:
        try:
            captured = _Captured(energy, sampler, x, labels, source, settings)
            run = partial(captured, x, labels, source, settings)
        except CaptureError:  # said where the chain itself is captured
            run = plain
    return best_seconds(run, x.device)


def numbers_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without the tensors among them."""
    return {name: value for name, value in settings.items() if not isinstance(value, Tensor)}


def _threads(streams: int) -> int:
    """The largest number of threads that torch may use and that divides the number of streams."""
    return max(n for n in range(1, min(torch.get_num_threads(), streams) + 1) if streams % n == 0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of `threads` threads in each of which torch computes on one thread."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "chains", initializer=torch.set_num_threads, initargs=(1,))
    together = Barrier(threads)
    list(pool.map(lambda _: together.wait(), range(threads)))  # returns once all threads have started
    torch.set_num_threads(before)  # each initializer has set the number for the threads to come, in the whole process
    return pool


class CaptureError(RuntimeError):
    """What can't be captured as a CUDA graph; the message is the reason."""


class CapturedFunction:
    """`function(sources)`, a function of static tensors and of random numbers from `sources`, as a CUDA graph. `replay`
    computes it again: the tensors that it returned at the capture, `results`, then hold the new values.

    `function` runs twice before it is captured, since libraries choose algorithms and allocate at first calls, which
    can't be captured. What it changes in place it has changed twice then, and the results hold no values yet.

    A capture that fails leaves every generator registered with its graph unusable in some releases of torch (2.11:
    "Offset increment outside graph capture encountered unexpectedly"), and torch registers the device's default
    generator with each. Therefore the graph has generators of its own, also in the place of the default one while it is
    captured. A replay gives them the state of the caller's and hands the advanced state back, without device memory.
    A `Philox` needs no registration: its seeds and the number of its first draw are inputs of the graph.

    Args:
        generator: sources of the kind and number that replays will be given. It is not drawn from.

    Raises CaptureError where `function` can't be captured, and torch.OutOfMemoryError. Streams, generators and memory
    pools are then as they were before.
    """

    def __init__(self, function: Callable[[StreamSources], Any], generator: StreamSources, device: torch.device):
        self.counter = Philox([0] * len(generator), device) if isinstance(generator, Philox) else None
        self.default = torch.cuda.default_generators[device.index]
        registered = 0 if self.counter is not None else len(generator)
        self.own = [torch.Generator(device).manual_seed(0) for _ in range(registered + 1)]  # the last: the default's
        sources = self.own[:-1] if self.counter is None else self.counter
        self.graph = torch.cuda.CUDAGraph()

        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not annotate it
        current, state = torch.cuda.current_stream(device), self.default.get_state()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(2):
                    function(sources)
        finally:
            current.wait_stream(side)
            self.default.set_state(state)
        for one in self.own[:-1]:
            self.graph.register_generator_state(one)
        if self.counter is not None:
            self.counter.draws = 0  # the first runs have drawn
        with _default_generator(self.default, self.own[-1]):
            self.results = _capture(self.graph, partial(function, sources), side)
        # torch sets the generators' seeds at the capture, on `side`: else perhaps after a replay has set its own.
        current.wait_stream(side)

    def replay(self, generator: StreamSources) -> None:
        """Computes the function with random numbers from `generator`, which is advanced as by a call."""
        if isinstance(generator, Philox):
            assert self.counter is not None  # there is a graph for each kind of source
            self.counter.seeds.copy_(generator.seeds)
            torch.add(generator.first, generator.draws, out=self.counter.first)
            generator.draws += self.counter.draws
            callers = [self.default]
        else:
            callers = [*generator, self.default]
        for own, one in zip(self.own, callers, strict=True):
            own.set_state(one.get_state())
        self.graph.replay()
        for own, one in zip(self.own, callers, strict=True):
            one.set_state(own.get_state())


class CapturedUpdate:
    """`update()`, which sets static tensors in place from others and draws no random numbers, as a CUDA graph from its
    first call on: one launch in place of dozens. What can't be captured runs as it is, and the log says so once."""

    def __init__(self, update: Callable[[], object], device: torch.device):
        self._update, self._device = update, device
        self._run: Callable[[], object] | None = None

    def __call__(self) -> None:
        if self._run is None:
            try:
                self._run = partial(CapturedFunction(lambda _: self._update(), [], self._device).replay, [])
            except CaptureError as error:
                log.warning("the copy of the weights runs step by step, as it can't be captured: %s", str(error))
                self._run = self._update
        self._run()


class _Captured:
    """A chain as a CUDA graph with static inputs; a call copies inputs in, replays, and copies outputs out."""

    def __init__(
        self,
        energy: Callable[..., Tensor],
        sampler: Callable[..., tuple[Tensor, Any]],
        x: Tensor,
        labels: Sequence[Tensor],
        generator: StreamSources,
        settings: dict[str, Any],
    ):
        self.settings = numbers_of(settings)
        self.x, self.labels = x.clone(), tuple(y.clone() for y in labels)
        self.tensors = {name: value.clone() for name, value in settings.items() if isinstance(value, Tensor)}

        def chain(sources: StreamSources) -> tuple[Tensor, Any]:
            closed = _of_states(energy, self.labels)
            return sampler(closed, self.x, generator=sources, **settings | self.tensors)

        self.function = CapturedFunction(chain, generator, x.device)

    def __call__(
        self, x: Tensor, labels: Sequence[Tensor], generator: StreamSources, settings: dict[str, Any]
    ) -> tuple[Tensor, Any]:
        self.x.copy_(x)
        for static, value in zip(self.labels, labels, strict=True):
            static.copy_(value)
        for name, static in self.tensors.items():
            static.copy_(settings[name])
        self.function.replay(generator)
        out, info = self.function.results
        return out.clone(), type(info)(*(value.clone() for value in info))


@contextmanager
def _default_generator(default: torch.Generator, stand_in: torch.Generator) -> Iterator[None]:
    """Inside, torch's default generator of the device draws from the state of `stand_in`; its own comes back after."""
    state = default.graphsafe_get_state()
    default.graphsafe_set_state(stand_in.graphsafe_get_state())
    try:
        yield
    finally:
        default.graphsafe_set_state(state)


def _capture(graph: torch.cuda.CUDAGraph, function: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
    """Captures `function()` on `stream` and returns its outputs. Raises CaptureError where it can't be captured, with
    the current stream and the memory pools as they were before."""
    pool = torch.cuda.graph_pool_handle()
    # torch.cuda.graph does not go back to the caller's stream after a capture that fails; the outer context does.
    # Thread-local, as other threads go on meanwhile: the one that writes checkpoints may copy from the device.
    try:
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return function()
    except RuntimeError as error:
        cause = error
        while isinstance(cause.__context__, RuntimeError):  # what ended the capture comes before what its end raised
            cause = cause.__context__
        _release(graph, pool, stream.device)
        raise CaptureError(str(cause).partition("\n")[0]) from error


def _release(graph: torch.cuda.CUDAGraph, pool: tuple[int, int], device: torch.device) -> None:
    """Gives back the memory of a failed capture, and ends the allocator's state of a capture under way."""
    torch.cuda.synchronize(device)
    graph.reset()
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        return  # this release of torch has done all of it, at the capture's end and in reset()
    torch._C._cuda_releasePool(device.index, pool)
