"""The copy of an energy that chains run on: frozen, with spectral norm folded into the weights, cast and laid out for
speed."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm.energies.base import BaseEnergyFunction
from ebm.energies.networks import EnergyHead


def chain_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that chains compute in if training asks for `dtype`. It is float32 for bfloat16 on a CPU that only
    emulates bfloat16, which has .7 times the speed of float32 and is less exact."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        has = any(value is True and "bf16" in name for name, value in torch.cpu.get_capabilities().items())
        return dtype if has else torch.float32
    return dtype


class FoldedEnergy:
    """A callable x (B, *shape) -> E (B,) float32, which takes over the weights of `energy` at each `refresh`.

    A chain runs many forwards of the same function. On the module itself each forward would run a power iteration in
    every layer (so that the energy changes while it is sampled), cast every weight again under autocast, and record the
    parameters for a backward that never comes. The copy pays for all of this once an optimizer step. Heads stay in
    float32.
    """

    def __init__(self, energy: BaseEnergyFunction, dtype: torch.dtype = torch.float32):
        self.dtype = dtype
        self.module = _plain_copy(energy)
        if dtype != torch.float32:
            _cast_body(self.module, dtype)
        self.module.requires_grad_(False)
        own: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))  # tied weights: many paths
        own |= dict(self.module.named_buffers(remove_duplicate=False))
        self._sources = [(layer, name) for layer, name, _ in _tensors(energy)]
        self._targets = [own[path] for _, _, path in _tensors(energy)]
        self._parametrisations = [m for m in energy.modules() if isinstance(m, parametrize.ParametrizationList)]
        assert {id(t) for t in self._targets} == {id(t) for t in own.values()}, "the copy holds other tensors"

    @torch.no_grad()
    def refresh(self) -> "FoldedEnergy":
        """Copies the energy's current weights. Its power-iteration vectors are read, not advanced."""
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


def _plain_copy(energy: BaseEnergyFunction) -> BaseEnergyFunction:
    """A copy in evaluation mode, without parametrisations, and with the weights of 2D convolutions channels-last."""
    module = copy.deepcopy(energy).eval().requires_grad_(False)
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            _unparametrise(layer)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def _cast_body(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the linear and convolutional layers to `dtype`, except for those of heads."""
    heads = [layer for layer in module.modules() if isinstance(layer, EnergyHead)]
    kept = {layer for head in heads for layer in head.modules()}
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and layer not in kept:
            layer.to(dtype)


def _unparametrise(layer: nn.Module) -> None:
    """Replaces each parametrised tensor of `layer` by its current value.

    A copy shares its class with the original, and torch's `remove_parametrizations` deletes the property from that
    class, which would take the weight away from both.
    """
    shown = {name: getattr(layer, name).detach().clone() for name in _parametrised(layer)}
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, tensor in shown.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _parametrised(layer: nn.Module) -> list[str]:
    """The names of the tensors of `layer` that have a parametrisation."""
    lists = layer._modules.get("parametrizations")  # a ModuleDict, where there are any
    return list(lists) if isinstance(lists, nn.ModuleDict) else []


def _tensors(energy: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Yields (layer, attribute, path) of each parameter and buffer under the names that users see, those that they have
    without parametrisations."""
    for path, layer in energy.named_modules():
        if path.endswith("parametrizations") or ".parametrizations." in f".{path}.":
            continue
        own = [name for name, tensor in (*layer._parameters.items(), *layer._buffers.items()) if tensor is not None]
        for name in (*own, *_parametrised(layer)):  # names alone: reading the tensors would run power iterations
            yield layer, name, f"{path}.{name}".lstrip(".")
