"""The chain's copy of an energy: frozen, spectral norm folded into the weights, cast and laid out for speed."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm.energies.networks import EnergyHead


def chain_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type a chain computes in where training asks for `dtype`: float32 on a CPU that has no bfloat16 arithmetic
    and emulates it (.7 times as fast as float32, and less exact)."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        has = any(value is True and "bf16" in name for name, value in torch.cpu.get_capabilities().items())
        return dtype if has else torch.float32
    return dtype


class FoldedEnergy:
    """A callable x (B, *shape) -> E (B,) float32 that follows `energy`'s weights at each `refresh`.

    A chain takes K forwards of one and the same function. On the module itself each would run a power iteration a
    layer (in training mode: sample a moving energy), recast every weight under autocast, and record the parameters
    for a backward nobody asks for. The copy pays for all of that once an optimizer step. Heads stay in float32.
    """

    def __init__(self, energy: nn.Module, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.module = copy.deepcopy(energy).eval().requires_grad_(False)
        for layer in list(self.module.modules()):
            if parametrize.is_parametrized(layer):
                _unparametrise(layer)
        for parameter in self.module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        if dtype != torch.float32:
            heads = [layer for layer in self.module.modules() if isinstance(layer, EnergyHead)]
            kept = {layer for head in heads for layer in head.modules()}
            for layer in self.module.modules():
                if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and layer not in kept:
                    layer.to(dtype)
        self.module.requires_grad_(False)
        own = dict(self.module.named_parameters(remove_duplicate=False))  # tied weights have several paths
        own |= dict(self.module.named_buffers(remove_duplicate=False))
        self._sources = [(layer, name) for layer, name, _ in _tensors(energy)]
        self._targets = [own[path] for _, _, path in _tensors(energy)]
        self._parametrisations = [m for m in energy.modules() if isinstance(m, parametrize.ParametrizationList)]
        assert {id(t) for t in self._targets} == {id(t) for t in own.values()}, "the copy holds other tensors"

    @torch.no_grad()
    def refresh(self) -> "FoldedEnergy":
        """Take over the energy's weights as they are now; its power-iteration vectors are read, not advanced."""
        was = [p.training for p in self._parametrisations for _ in p]
        norms = [norm for p in self._parametrisations for norm in p]
        for norm in norms:
            norm.training = False
        if self._targets:  # an energy may have none
            torch._foreach_copy_(self._targets, [getattr(layer, name) for layer, name in self._sources])
        for norm, training in zip(norms, was, strict=True):
            norm.training = training
        return self

    def __call__(self, x: Tensor, *labels: Tensor) -> Tensor:
        return self._compute(self.module, x, *labels)

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes) float32."""
        return self._compute(self.module.class_energies, x)

    def _compute(self, function: Callable[..., Tensor], x: Tensor, *labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return function(x, *labels).float()


def _unparametrise(layer: nn.Module) -> None:
    """Put the parametrised tensors themselves in place. A copy shares its class with the module it was made of, and
    torch's `remove_parametrizations` deletes the class's property: it would take the weight away from both."""
    shown = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, tensor in shown.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _tensors(energy: nn.Module):
    """(layer, attribute, path without parametrisations) of each parameter and buffer as the layer shows it."""
    for path, layer in energy.named_modules():
        if path.endswith("parametrizations") or ".parametrizations." in f".{path}.":
            continue
        own = [name for name, tensor in (*layer._parameters.items(), *layer._buffers.items()) if tensor is not None]
        for name in (*own, *getattr(layer, "parametrizations", ())):  # by name: a read would run a power iteration
            yield layer, name, f"{path}.{name}".lstrip(".")
