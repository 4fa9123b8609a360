"""The engine: samplers at the speed of the hardware, with the chains of the plain functions."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch
from torch import Tensor

from ebm.samplers.base import mean_info


class Engine:
    """Runs samplers on one energy whose tensors stay where they are (`FoldedEnergy`).

    Chains are independent, so on the CPU each thread runs its own to the end: threads that share every layer of a small
    network meet dozens of times a step, and half of the time goes by in waking them. On CUDA a whole chain, K forwards,
    gradients and updates, is captured once a (sampler, shape, settings) as a graph over static buffers and replayed by
    one launch: at small batches thousands of single launches take longer than the network. What can't be captured
    (an energy that reads device memory on the host, say) runs as it is, and that is said once. Noise comes from the
    same generators in the same order in all cases. The energy must keep no state of its own between calls.
    """

    def __init__(self, energy: Callable[..., Tensor], *, capture: bool = True):
        self.energy, self.capture = energy, capture
        self._graphs: dict[tuple, _Captured] = {}

    def __call__(self, sampler: Callable, x: Tensor, *labels: Tensor, generator: Sequence[torch.Generator], **settings):
        """`sampler(x -> energy(x, *labels), x, generator=generator, **settings)`: (states, what happened: a named tuple
        of means over the batch)."""
        if x.is_cuda and self.capture:
            captured = self._captured(sampler, x, labels, generator, settings)
            if captured is not None:
                return captured(x, labels, settings)
        threads = 1 if x.is_cuda else _threads(len(generator))
        if threads > 1:
            return self._in_threads(threads, sampler, x, labels, generator, settings)
        return sampler(_of_states(self.energy, labels), x, generator=generator, **settings)

    def _in_threads(self, threads: int, sampler, x, labels, generator, settings):
        share = len(generator) // threads  # streams a thread

        def chain(part: int):
            own = [y.chunk(threads)[part] for y in (x, *labels)]
            generators = generator[part * share : (part + 1) * share]
            return sampler(_of_states(self.energy, own[1:]), own[0], generator=generators, **settings)

        states, infos = zip(*_pool(threads).map(chain, range(threads)), strict=True)
        return torch.cat(states), mean_info(infos)

    def _captured(self, sampler, x, labels, generator, settings) -> "_Captured | None":
        """The graph of this call. Other settings (a step size that was cut) make a new one in place of the old; tensors
        among them (a step size that adapts) are inputs of the graph."""
        key = (sampler, x.shape, len(labels), tuple(map(id, generator)))
        captured = self._graphs.get(key)
        if captured is None or captured.settings != _numbers(settings):
            self._graphs.pop(key, None)
            try:
                captured = self._graphs[key] = _Captured(self.energy, sampler, x, labels, generator, settings)
            except RuntimeError as error:
                self.capture = False
                torch.cuda.synchronize(x.device)
                reason = str(error).partition("\n")[0]
                print(f"the chain can't be captured as a CUDA graph and runs step by step: {reason}", flush=True)
                return None
        return captured


def _of_states(energy: Callable[..., Tensor], labels: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """x -> energy(x, *labels), also for several replicas of each labelled chain, one after the other (`tempering`)."""

    def closed(x: Tensor) -> Tensor:
        each = (y.unsqueeze(1).expand(-1, len(x) // len(y), *y.shape[1:]).flatten(0, 1) for y in labels)
        return energy(x, *each)

    return closed


def _numbers(settings: dict) -> dict:
    """The settings without the tensors among them."""
    return {name: value for name, value in settings.items() if not isinstance(value, Tensor)}


def _threads(streams: int) -> int:
    """The largest number of threads, of those torch may use, that divides the streams."""
    return max(n for n in range(1, min(torch.get_num_threads(), streams) + 1) if streams % n == 0)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """`threads` threads that compute alone."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "chains", initializer=torch.set_num_threads, initargs=(1,))
    together = Barrier(threads)
    list(pool.map(lambda _: together.wait(), range(threads)))  # all of them have started
    torch.set_num_threads(before)  # the number for threads to come is the process's, not a thread's
    return pool


class _Captured:
    """One chain as a CUDA graph: static inputs, a replay, copies of the static outputs."""

    def __init__(self, energy, sampler, x, labels, generator, settings):
        self.settings, self.generator = _numbers(settings), generator
        self.x, self.labels = x.clone(), tuple(y.clone() for y in labels)
        self.tensors = {name: value.clone() for name, value in settings.items() if isinstance(value, Tensor)}
        self.graph = torch.cuda.CUDAGraph()

        def chain(generator):
            return sampler(_of_states(energy, self.labels), self.x, generator=generator, **settings | self.tensors)

        # Libraries choose algorithms and allocate at their first calls, which can't be captured.
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                chain([torch.Generator(x.device).manual_seed(0) for _ in generator])
        torch.cuda.current_stream().wait_stream(side)
        for one in generator:
            self.graph.register_generator_state(one)
        # Other threads go on meanwhile: the one that writes checkpoints may copy from the device.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.out, self.info = chain(generator)

    def __call__(self, x: Tensor, labels: tuple[Tensor, ...], settings: dict):
        self.x.copy_(x)
        for own, given in zip(self.labels, labels, strict=True):
            own.copy_(given)
        for name, own in self.tensors.items():
            own.copy_(settings[name])
        self.graph.replay()
        return self.out.clone(), type(self.info)(*(value.clone() for value in self.info))
