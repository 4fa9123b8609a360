"""The engine: samplers at the speed of the hardware. Same chains as the plain functions, one launch each on CUDA."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Engine:
    """Runs samplers on one energy whose tensors stay where they are (`FoldedEnergy`).

    On CUDA a whole chain, K forwards, gradients and updates, is captured once a (sampler, shape, settings) as a CUDA
    graph over static buffers, and then replayed by one launch: at small batches the thousands of single launches take
    longer than the network. The generators are part of the graph and may be seeded anew between two chains, so its
    noise is that of the plain loop. What can't be captured (an energy that reads device memory on the host, say) runs
    as it is, and that is said once. On the CPU the sampler is called directly.
    """

    def __init__(self, energy: Callable[..., Tensor], *, capture: bool = True):
        self.energy, self.capture = energy, capture
        self._graphs: dict[tuple, _Captured] = {}

    def __call__(self, sampler: Callable, x: Tensor, *labels: Tensor, generator: Sequence[torch.Generator], **settings):
        """`sampler(x -> energy(x, *labels), x, generator=generator, **settings)`: (states, what happened)."""
        if x.is_cuda and self.capture:
            captured = self._captured(sampler, x, labels, generator, settings)
            if captured is not None:
                return captured(x, labels)
        return sampler(lambda x: self.energy(x, *labels), x, generator=generator, **settings)

    def _captured(self, sampler, x, labels, generator, settings) -> "_Captured | None":
        """The graph of this call. Other settings (a step size that was cut) make a new one in place of the old."""
        key = (sampler, x.shape, len(labels), tuple(map(id, generator)))
        captured = self._graphs.get(key)
        if captured is None or captured.settings != settings:
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


class _Captured:
    """One chain as a CUDA graph: static inputs, a replay, copies of the static outputs."""

    def __init__(self, energy, sampler, x, labels, generator, settings):
        self.settings, self.generator = settings, generator
        self.x, self.labels = x.clone(), tuple(y.clone() for y in labels)
        self.graph = torch.cuda.CUDAGraph()

        def chain(generator, **changed):
            labels = self.labels
            return sampler(lambda x: energy(x, *labels), self.x, generator=generator, **settings | changed)

        # Libraries choose algorithms and allocate at their first calls, which can't be captured: one step on the side.
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            throwaway = [torch.Generator(x.device).manual_seed(0) for _ in generator]
            for _ in range(2):
                chain(throwaway)
        torch.cuda.current_stream().wait_stream(side)
        for one in generator:
            self.graph.register_generator_state(one)
        # Other threads go on meanwhile: the one that writes checkpoints may copy from the device.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.out, self.info = chain(generator)

    def __call__(self, x: Tensor, labels: tuple[Tensor, ...]):
        self.x.copy_(x)
        for own, given in zip(self.labels, labels, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.out.clone(), type(self.info)(*(value.clone() for value in self.info))
