"""Builds the energy that `config.energy` describes, and the copy of it that chains run on."""

import copy
import importlib
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise, product
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm

from ebm.config import energies as sections
from ebm.config.energies import EnergyConfig, Network
from ebm.energies.analytic import GaussianEnergy
from ebm.energies.base import PLANES, BaseEnergyFunction, NoiseConditionalEnergy
from ebm.energies.graph import PixelGraphEnergyFunction, PointGraphEnergyFunction
from ebm.energies.networks import (
    ConvolutionalEnergyFunction,
    EnergyHead,
    HybridEnergyFunction,
    LatentEnergy,
    MLPEnergyFunction,
    NetworkEnergy,
    TransformerEnergyFunction,
)
from ebm.energies.resnet import ResNetEnergyFunction, UNetEnergyFunction, UNetField, WideResNetEnergyFunction
from ebm.errors import ConfigError
from ebm.streams import derive_seed


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
        targets = {(layer, name): own[path] for layer, name, path in _tensors(energy)}
        assert {id(t) for t in targets.values()} == {id(t) for t in own.values()}, "the copy holds other tensors"
        self._norms = SpectralNorms(energy)
        self._normalised = [targets.pop(place) for place in self._norms.places]
        self._targets = targets  # the others, by layer and name in `energy`
        self._parametrisations = [m for m in energy.modules() if isinstance(m, parametrize.ParametrizationList)]

    @torch.no_grad()
    def refresh(self) -> "FoldedEnergy":
        """Copies the energy's current weights. Its power-iteration vectors are read, not advanced."""
        was = [p.training for p in self._parametrisations for _ in p]
        norms = [norm for p in self._parametrisations for norm in p]
        for norm in norms:
            norm.training = False
        alike: defaultdict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for (layer, name), target in self._targets.items():
            source = getattr(layer, name)
            alike[target.dtype, source.dtype, target.stride() == source.stride()].append((target, source))
        for pairs in alike.values():  # one kernel for all of a group; torch copies a mixed list one by one
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
        for norm, training in zip(norms, was, strict=True):
            norm.training = training
        self._norms.write(self._normalised)
        return self

    def __call__(self, x: Tensor, *labels: Tensor) -> Tensor:
        return self._compute(self.module, x, *labels)

    def class_energies(self, x: Tensor) -> Tensor:
        """E(x, y) of every class y, (B, num_classes) float32."""
        return self._compute(self.module.class_energies, x)

    @property
    def proposal(self) -> Callable[..., Tensor] | None:
        """`NoiseConditionalEnergy.propose` with the copied weights; None for an energy without an initialiser."""
        if not isinstance(self.module, NoiseConditionalEnergy) or self.module.initialiser is None:
            return None
        return torch.no_grad()(partial(self._compute, self.module.propose))

    def _compute(self, function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return function(x, *others).float()


class EnergyOfTensors:
    """`energy` as a function of its tensors as well, (tensors, x (B, *shape), *labels) -> E (B,), for a compiler: the
    normalisation of weights, which changes buffers, stays outside. For energies that change no buffer themselves."""

    def __init__(self, energy: BaseEnergyFunction):
        self._module = _plain_copy(energy).train()
        self._sources = [(layer, name) for layer, name, _ in _tensors(energy)]
        self._paths = [path for _, _, path in _tensors(energy)]

    def tensors(self) -> list[Tensor]:
        """The current parameters and buffers of `energy`, normalised; gradients flow to the parameters."""
        found = (getattr(layer, name) for layer, name in self._sources)
        return [tensor.view_as(tensor) for tensor in found]  # as plain tensors: compiled code asks for the type

    def __call__(self, tensors: Sequence[Tensor], x: Tensor, *labels: Tensor) -> Tensor:
        energies: Tensor = torch.func.functional_call(
            self._module, dict(zip(self._paths, tensors, strict=True)), (x, *labels)
        )
        return energies


class SpectralNorms:
    """The spectral norms of an energy. `computed` does for all layers together what torch's parametrisation does in
    each layer at each access, with the same numbers and, on a GPU, half of the kernel launches."""

    def __init__(self, energy: nn.Module):
        self._norms: list[_SpectralNorm] = []
        self._weights: list[nn.Parameter] = []  # before they are normalised
        self.places: list[tuple[nn.Module, str]] = []  # layer and name of each normalised weight
        for layer in energy.modules():
            for name in _parametrised(layer):
                chain = cast(nn.ModuleDict, layer.parametrizations)[name]
                first, *others = cast(nn.ModuleList, chain)
                # Another parametrisation would change the weight whose norm is taken; torch does its own work then.
                if others or not isinstance(first, _SpectralNorm):
                    continue
                weight = chain.original
                if isinstance(weight, nn.Parameter) and weight.ndim > 1:
                    self._norms.append(first)
                    self._weights.append(weight)
                    self.places.append((layer, name))

    @contextmanager
    def computed(self) -> Iterator[None]:
        """Inside, each normalised weight is a value that is computed once, after its power iterations where the layer
        is in training mode. In float32 whatever the autocast type: chains move on weights that are normalised so."""
        devices = {weight.device.type for weight in self._weights}
        with parametrize.cached():
            with ExitStack() as stack:
                for device in devices:
                    stack.enter_context(torch.autocast(device, enabled=False))
                self._iterate()
                for norm, weight, (layer, name) in zip(self._norms, self._weights, self.places, strict=True):
                    parametrize._cache[id(layer), name] = _Normalised.apply(weight, norm)
            yield

    @torch.no_grad()
    def write(self, targets: Sequence[Tensor]) -> None:
        """Writes the normalised weights as they are, without a power iteration, into `targets`, one for each of
        `places`, whose type and memory format may be others. They are what `_SpectralNorm.forward` computes."""
        for norm, weight, target in zip(self._norms, self._weights, targets, strict=True):
            torch.div(weight, _size(norm, weight), out=target)

    @torch.no_grad()
    def _iterate(self) -> None:
        """Miyato et al. (2018), algorithm 1, as `_SpectralNorm._power_method` has it: u <- W v / |W v|, then
        v <- W^T u / |W^T u|."""
        training = [(norm, weight) for norm, weight in zip(self._norms, self._weights, strict=True) if norm.training]
        for number in range(max((norm.n_power_iterations for norm, _ in training), default=0)):
            norms = [(norm, weight) for norm, weight in training if number < norm.n_power_iterations]
            matrices = [norm._reshape_weight_to_matrix(weight) for norm, weight in norms]
            us, vs = [norm._u for norm, _ in norms], [norm._v for norm, _ in norms]
            least = [norm.eps for norm, _ in norms]
            for out, of, factors in ((us, vs, matrices), (vs, us, [matrix.H for matrix in matrices])):
                products = [torch.mv(factor, vector) for factor, vector in zip(factors, of, strict=True)]
                lengths = list(torch._foreach_norm(products))
                torch._foreach_clamp_min_(lengths, least)
                torch._foreach_div_(products, lengths)
                torch._foreach_copy_(out, products)


def _size(norm: _SpectralNorm, weight: Tensor) -> Tensor:
    """u^T W v, the spectral norm of `weight` by the vectors as they are."""
    return torch.vdot(norm._u, torch.mv(norm._reshape_weight_to_matrix(weight), norm._v))


class _Normalised(torch.autograd.Function):
    """A weight over its norm, as `_SpectralNorm.forward` has it, in two thirds of the launches: it copies no vectors,
    which must therefore stay as they are until the gradient is taken, and its gradient uses its value."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, norm: _SpectralNorm) -> Tensor:
        size = _size(norm, weight)
        value = weight / size
        ctx.dim = norm.dim
        ctx.save_for_backward(norm._u, norm._v, size, value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # torch's own signature: one gradient an output
        (grad,), (u, v, size, value) = grads, ctx.saved_tensors
        along = (grad * (value / size)).sum()
        rank_one = torch.outer(u * along, v).view(value.movedim(ctx.dim, 0).shape).movedim(0, ctx.dim)
        return grad / size - rank_one, None


def _plain_copy(energy: BaseEnergyFunction) -> BaseEnergyFunction:
    """A copy in evaluation mode, without parametrisations, with the weights of 2D convolutions channels-last, and on a
    GPU with the convolutions that it computes fastest."""
    module = copy.deepcopy(energy).eval().requires_grad_(False)
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            _unparametrise(layer)
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if any(parameter.is_cuda for parameter in module.parameters()):
        _quicken(module)
    return module


def _cast_body(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the linear and convolutional layers to `dtype`, except for those of heads."""
    heads: list[nn.Module] = [layer for layer in module.modules() if isinstance(layer, EnergyHead)]
    heads += [energy.latent for energy in module.modules() if isinstance(energy, LatentEnergy)]
    kept = {layer for head in heads for layer in head.modules()}
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and layer not in kept:
            layer.to(dtype)


def _quicken(module: nn.Module) -> None:
    """Has the 2D convolutions of `module` computed as `_QuickConv2d`."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d:  # a subclass may compute something else
            layer.__class__ = _QuickConv2d


class _QuickConv2d(nn.Conv2d):
    """A convolution as a GPU computes it fastest. Over few channels it is a product of matrices: cuDNN's kernels want 8
    channels or more, and took a tenth of a chain of grey images. The bias is added by itself, in the type of the
    product: a compiler that sees one operation writes the sum to memory for the backward pass, beside what it makes of
    it."""

    def forward(self, x: Tensor) -> Tensor:
        taps = 9 * self.in_channels
        plain = self.padding_mode == "zeros" and self.groups == 1 and self.stride == self.dilation == (1, 1)
        if taps <= 32 and plain and self.kernel_size == (3, 3) and self.padding == (1, 1):
            h = self._product(x, taps)
        else:
            h = self._conv_forward(x, self.weight, None)
        return h if self.bias is None else h + self.bias.to(h.dtype).view(-1, 1, 1)

    def _product(self, x: Tensor, taps: int) -> Tensor:
        """The convolution with windows of 3x3 pixels, (B, C, H, W) -> (B, D, H, W): what lies under the window at each
        pixel, in a multiple of 8 numbers, times the weights."""
        (b, _, height, width), d = x.shape, self.out_channels
        extra = -taps % 8
        windows: Tensor = _Windows.apply(x.to(self.weight.dtype).permute(0, 2, 3, 1))
        weights = functional.pad(self.weight.permute(1, 2, 3, 0).reshape(taps, d), (0, 0, 0, extra))
        values = functional.pad(windows.flatten(3), (0, extra)).flatten(0, 2) @ weights
        return values.view(b, height, width, d).permute(0, 3, 1, 2)


class _Windows(torch.autograd.Function):
    """The 3x3 pixels around each, 0 beyond the edge: (B, H, W, C) -> (B, H, W, C, 3, 3). Linear; its derivative is the
    adjoint map, `_Overlaps`, so both can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        return functional.pad(pixels, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # torch's own signature: one gradient an output
        pixels: Tensor = _Overlaps.apply(*grads)
        return pixels


class _Overlaps(torch.autograd.Function):
    """For each pixel the sum of what windows hold for it: the adjoint of `_Windows`."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor) -> Tensor:
        _, height, width, *_ = windows.shape
        framed = functional.pad(windows, (0, 0, 0, 0, 0, 0, 1, 1, 1, 1))
        parts = [framed[:, 2 - i :, 2 - j :, :, i, j][:, :height, :width] for i, j in product(range(3), range(3))]
        return sum(parts[1:], parts[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        windows: Tensor = _Windows.apply(*grads)
        return windows


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


IMAGE_NETWORKS: dict[str, type[NetworkEnergy]] = {
    "conv": ConvolutionalEnergyFunction,
    "resnet": ResNetEnergyFunction,
    "wide_resnet": WideResNetEnergyFunction,
    "unet": UNetEnergyFunction,
    "transformer": TransformerEnergyFunction,
}


def build_energy(config: EnergyConfig, shape: tuple[int, ...], seed: int) -> BaseEnergyFunction:
    """The energy of `config.energy` for images of `shape` (C, H, W) or vectors of `shape` (D,).

    Its initial weights depend on `seed` alone, and torch's global generator is left as it was. Raises ConfigError if
    the kind does not go with the shape, or if a class of the user can't be imported or made.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        return _build(config, tuple(shape))


def _build(config: EnergyConfig, shape: tuple[int, ...]) -> BaseEnergyFunction:
    if isinstance(config, sections.HybridConfig):
        prior, network = _gaussian(config.prior, shape), _network(config.network, shape, "energy.network")
        return HybridEnergyFunction(prior=prior, network=network, weight=config.weight)
    if isinstance(config, sections.GaussianConfig):
        return _gaussian(config, shape, full=config.covariance == "full", trainable=True)
    return _network(config, shape, "energy")


def _network(config: Network, shape: tuple[int, ...], key: str, levels: int = 0) -> BaseEnergyFunction:
    """The network of the section that `key` names. `levels`: the last planes of `shape` that tell a noise level."""
    if isinstance(config, sections.ImportConfig):
        return _imported(config, key)
    if config.noise_conditional is not None:
        plain = config.model_copy(update={"noise_conditional": None})
        network = _network(plain, (shape[0] + PLANES, *shape[1:]), key, PLANES)
        settings = config.noise_conditional.model_dump(exclude={"initialiser"})
        proposes = config.noise_conditional.initialiser
        initialiser = None if proposes is None else _initialiser(proposes, shape, config.num_classes or 0)
        return NoiseConditionalEnergy(network, shape, **settings, initialiser=initialiser)
    if config.latent is not None:
        plain = config.model_copy(update={"latent": None})
        network, encoder = (_network(plain, shape, key) for _ in range(2))
        assert isinstance(network, NetworkEnergy) and isinstance(encoder, NetworkEnergy), "networks of the project's"
        return LatentEnergy(network, encoder, config.latent.dim)
    settings = config.model_dump(exclude={"kind", "noise_conditional", "latent"})
    where = f"{key}.kind={config.kind} with data.shape={list(shape)}"
    if isinstance(config, sections.MLPConfig):
        return MLPEnergyFunction(math.prod(shape), **settings)
    if isinstance(config, sections.GraphConfig):
        return _graph(shape, key, where, **settings)
    if len(shape) != 3:
        raise ConfigError(f"{where}: it takes images (C, H, W); use {key}.kind=mlp or graph for vectors")
    channels, height, width = shape
    if isinstance(config, sections.UNetConfig):
        settings["planes"] = channels - levels
    return IMAGE_NETWORKS[config.kind](channels=channels, height=height, width=width, **settings)


def _initialiser(config: sections.InitialiserConfig, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network of `NoiseConditionalEnergy.propose`. Its output is 0 at first: it proposes as for Gaussian data."""
    inputs = shape[0] + PLANES + classes
    if len(shape) == 3:
        channels, height, width = shape
        sizes = (config.features, config.blocks)
        return UNetField(UNetEnergyFunction(inputs, height, width, *sizes, head="norm", planes=channels))
    dims = [inputs] + [config.hidden_dim] * config.num_layers
    last = nn.Linear(config.hidden_dim, shape[0])
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*(m for a, b in pairwise(dims) for m in (nn.Linear(a, b), nn.SiLU())), last)


def _gaussian(
    config: sections.GaussianPriorConfig, shape: tuple[int, ...], full: bool = False, trainable: bool = False
) -> GaussianEnergy:
    variance = config.std**2
    cov = variance * torch.eye(math.prod(shape)) if full else torch.tensor(variance)
    return GaussianEnergy(torch.full(shape, config.mean), cov, trainable=trainable)


def _graph(
    shape: tuple[int, ...], key: str, where: str, point_dim: int, neighbours: int | None, **settings: Any
) -> BaseEnergyFunction:
    """A graph of pixels for images, of points for vectors."""
    if len(shape) == 3:
        if neighbours is not None:
            raise ConfigError(f"{where}: {key}.neighbours={neighbours} is for point sets; use null: the pixels around")
        return PixelGraphEnergyFunction(*shape, **settings)
    if shape[0] % point_dim:
        raise ConfigError(f"{where}: {key}.point_dim={point_dim} does not divide a vector of {shape[0]} into points")
    try:
        return PointGraphEnergyFunction(shape[0] // point_dim, point_dim, neighbours=neighbours, **settings)
    except ValueError as error:
        raise ConfigError(f"{where}: {key}.{error}") from error


class UNetVelocity(nn.Module):
    """v(x, t) of images (B, C, H, W) and times (B,): the output of a U-Net of x, and of a plane of t behind it if the
    U-Net has an input channel more."""

    def __init__(self, network: UNetEnergyFunction):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.network.shape[0] > x.shape[1]:
            x = torch.cat([x, t.to(x.dtype).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)
        return self.network.field(x)


def read_field(file: str, config: EnergyConfig, shape: tuple[int, ...]) -> UNetVelocity:
    """The field of a safetensors file: the `state_dict` of a `UNetEnergyFunction` with the sizes of `config`, whose
    `field` points at data from images of `shape` (C, H, W), or also knows the time, as `UNetVelocity` has it.

    Raises ValueError for another energy and for weights of other sizes, OSError and SafetensorError for the file.
    """
    if not isinstance(config, sections.UNetConfig):
        raise ValueError(f"the weights of a file are those of a U-Net, and energy.kind={config.kind}")
    tensors = load_file(file)
    timed = int(any(w.shape[1] > shape[0] for name, w in tensors.items() if name.startswith("stem.") and w.ndim == 4))
    plain = config.model_copy(update=dict.fromkeys(("num_classes", "latent", "noise_conditional")) | {"head": "dot"})
    with torch.random.fork_rng(devices=[]):  # its initial weights, which are replaced
        network = _network(plain, (shape[0] + timed, *shape[1:]), "energy", timed)
    assert isinstance(network, UNetEnergyFunction)
    network.load_field(tensors)
    return UNetVelocity(network)


# Classes and functions of the user (energy.kind=import, loss.field)


def import_named(path: str) -> object:
    """What `path`, module:name, names. Raises what the import raises, and AttributeError."""
    module, name = path.split(":")
    with _working_directory_first():
        return getattr(importlib.import_module(module), name)


def _imported(config: sections.ImportConfig, key: str) -> BaseEnergyFunction:
    """An instance of the class that `config.path` names."""
    where = f"{key}.path={config.path!r} with {key}.settings={config.settings}"
    try:
        with _working_directory_first():  # also while the class is made: its constructor may import more
            energy = _energy_class(import_named(config.path), where)(**config.settings)
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{where}: {error}; the module must be importable: installed, or in the directory where the command runs"
        ) from error
    if config.num_classes:
        energy.num_classes = config.num_classes
    _refuse_mixing_layers(energy, config.path)
    return energy


@contextmanager
def _working_directory_first() -> Iterator[None]:
    """Imports look in the working directory first, as under `python -m`. A console script and train.py look only
    in their own folder."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _energy_class(found: object, where: str) -> type[BaseEnergyFunction]:
    """`found`, if it is a class of energies. An nn.Module that is not derived from BaseEnergyFunction becomes one, with
    the same parameters and the same names for them."""
    # Checked before it is called: `subprocess:Popen` with its settings would be a program started by a config.
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"{where}: it is no class of torch.nn.Module; derive it from BaseEnergyFunction")
    if issubclass(found, BaseEnergyFunction):
        return found
    return type(found.__name__, (found, BaseEnergyFunction), {"__module__": found.__module__})


def _refuse_mixing_layers(energy: nn.Module, where: str) -> None:
    """Raises ConfigError if a layer makes the energy of one sample depend on the others, or on chance."""
    for name, layer in energy.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}: it makes the energy of an image depend on "
                "the others in its batch; use GroupNorm, LayerNorm or spectral normalisation"
            )
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ConfigError(
                f"{where}: {name} is a {type(layer).__name__}: it makes the energy random, while chains "
                "sample the one without it; use weight decay or spectral normalisation"
            )
