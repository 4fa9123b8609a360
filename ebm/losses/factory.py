"""Makes the loss that a config asks for, and the trained velocity that it may be distilled from; computes it with its
gradient: on a GPU both passes are one graph."""

import copy
import gc
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ebm.config import losses as kinds
from ebm.config.energies import EnergyConfig
from ebm.energies.factory import import_named, read_field
from ebm.errors import ConfigError
from ebm.losses.contrastive import (
    GaussianNoise,
    UniformNoise,
    contrastive_divergence,
    contrastive_latent,
    energy_discrepancy,
    improved_contrastive_divergence,
    joint_energy,
    marginal,
    noise_contrastive,
    recovery_likelihood,
)
from ebm.losses.flow_matching import Field, energy_matching, equilibrium_matching, flow_pairs, velocity
from ebm.losses.output import LossOutput, gradient_penalty, interpolate
from ebm.losses.score_matching import (
    denoising_score_matching,
    dual_score_matching,
    implicit_score_matching,
    multilevel_denoising,
    sliced_score_matching,
)
from ebm.samplers.engine import numbers_of
from ebm.streams import Generators, Philox, StreamSources

log = logging.getLogger(__name__)

Views = Callable[[Tensor, Generators], Tensor]
# What a field that can't be found, read or computed raises.
FIELD_ERRORS = (ImportError, AttributeError, TypeError, ValueError, LookupError, RuntimeError, OSError, SafetensorError)


def loss_of(
    config: kinds.LossConfig, views: Views | None = None, field: Field | None = None
) -> Callable[..., LossOutput]:
    """The function of a section `LossConfig`: loss(energy, x_pos, x_neg, *, step, y_pos, y_neg, generator, chain,
    pairs).

    `x_neg` are chains that started where `config.negatives_at(step)` says; None where it says None. `chain` has the
    settings they ran with (`ebm.samplers.settings_of`), with which improved contrastive divergence continues them, and
    where recovery likelihood has an initialiser what it started from. `views` draws another view of each of (B, C, H,
    W) images, which contrastive_latent needs. `field`: what `field_of` made of loss.field. `pairs`: of `pairs_of`,
    where the loss shall not compute them itself.
    """
    assert (field is None) == (config.trained_field is None), "the trainer makes the field that the config names"
    objective = objective_of(config, views, field)
    at_interpolates = isinstance(config, kinds.ContrastiveFamily) and config.gradient_penalty_at == "interpolates"

    def loss(
        energy: Any,
        x_pos: Tensor,
        x_neg: Tensor | None = None,
        *,
        step: int,
        y_pos: Tensor | None = None,
        y_neg: Tensor | None = None,
        generator: Generators = None,
        chain: Mapping[str, Any] | None = None,
        pairs: Tensor | None = None,
    ) -> LossOutput:
        x_neg = x_neg if config.negatives_at(step) else None
        settings = {"l2": config.l2, "y_pos": y_pos, "y_neg": y_neg, "generator": generator}
        if isinstance(config, kinds.ImprovedContrastiveConfig):
            assert chain is not None
            settings |= _last_step(chain)
        if isinstance(config, kinds.DualScoreMatchingConfig) and chain is not None and "lowest_share" in chain:
            settings |= {name: chain[name] for name in ("log_variances", "lowest_share")}
        if isinstance(config, kinds.RecoveryConfig) and chain is not None:
            settings |= {name: chain[name] for name in ("centres", "spacing") if name in chain}
        if pairs is not None:
            settings["pairs"] = pairs
        plain = objective(energy, x_pos, x_neg, **settings)
        if not config.gradient_penalty:
            return plain
        x = interpolate(x_pos, x_neg, generator) if at_interpolates and x_neg is not None else x_pos
        of_x, y = (marginal(energy), None) if config.kind == "jem" else (energy, y_pos)
        penalty = gradient_penalty(of_x, x, y)
        terms = plain.terms | {"penalty": penalty.detach().float()}
        return plain._replace(loss=plain.loss + config.gradient_penalty * penalty, terms=terms)

    return loss


def objective_of(
    config: kinds.LossConfig, views: Views | None = None, field: Field | None = None
) -> Callable[..., LossOutput]:
    """The loss function of `config`, with the settings that only this kind has."""
    match config:
        case kinds.ContrastiveConfig():
            return contrastive_divergence
        case kinds.ContrastiveLatentConfig():
            assert views is not None, "the trainer gives them"
            function = partial(contrastive_latent, views=views)
            return _with(function, config, "latent_weight", "similarity_temperature")
        case kinds.ImprovedContrastiveConfig():
            return _with(improved_contrastive_divergence, config, "kl_steps", "kl_weight", "entropy_weight")
        case kinds.JEMConfig():
            return _with(joint_energy, config, "joint", "contrastive_weight", "bounded")
        case kinds.RecoveryConfig():
            return recovery_likelihood
        case kinds.EnergyMatchingConfig():
            function = partial(energy_matching, field=field)
            return _with(function, config, "flow_weight", "contrastive_weight", "floor", "trim", "separate_batch")
        case kinds.EquilibriumConfig():
            return _with(partial(equilibrium_matching, field=field), config, "gradient_scale", "decay_start")
        case kinds.ScoreMatchingConfig(method="sliced"):
            names = ("num_projections", "variance_reduction", "temperature")
            return _with(sliced_score_matching, config, *names)
        case kinds.ScoreMatchingConfig():
            function = partial(implicit_score_matching, trace=config.method)
            return _with(function, config, "num_projections", "temperature")
        case kinds.DenoisingConfig():
            return _with(denoising_score_matching, config, "sigma", "temperature")
        case kinds.MultilevelDenoisingConfig():
            return _with(multilevel_denoising, config, "sigma", "sigma_min", "sigma_max", "temperature")
        case kinds.DualScoreMatchingConfig():
            return _with(dual_score_matching, config, "contrastive_weight")
        case kinds.NoiseContrastiveConfig():
            return _with(partial(noise_contrastive, noise=_noise(config)), config, "ratio")
        case kinds.EnergyDiscrepancyConfig():
            return _with(energy_discrepancy, config, "time", "num_samples", "stabiliser")


def field_of(
    config: kinds.LossConfig, energy: EnergyConfig, shape: tuple[int, ...], device: torch.device
) -> Field | None:
    """The velocity v(x (B, *shape), t (B,)) that loss.field names, on `device`; None without any.

    A file holds a U-Net with the sizes of `energy`. A module of the user's is copied; both are frozen, in evaluation
    mode. The field is tried on two states. Raises ConfigError where it can't be found or computed, or where its values
    have another shape or are not finite, and for an energy with classes, which a field does not know.
    """
    path = config.trained_field
    if path is None:
        return None
    if energy.num_classes:
        raise ConfigError(
            f"loss.field={path} knows no classes, and energy.num_classes={energy.num_classes}: set one of them to null"
        )
    try:
        found = read_field(path, energy, shape) if path.endswith(".safetensors") else import_named(path)
        if isinstance(found, type) or not callable(found):
            kind = "a class" if isinstance(found, type) else f"of type {type(found).__name__}"
            raise ValueError(f"it is {kind}, not a function")
        if isinstance(found, nn.Module):
            found = copy.deepcopy(found).eval().requires_grad_(False).to(device)
        x = torch.linspace(-1, 1, 2 * math.prod(shape), device=device).view(2, *shape)
        v = velocity(found, x, torch.tensor([0.25, 0.75], device=device))
        if v.shape != x.shape:
            raise ValueError(f"it takes x {list(x.shape)} and t [2] to {list(v.shape)}")
        if not torch.isfinite(v).all():
            raise ValueError("its values are not finite")
    except FIELD_ERRORS as error:
        raise ConfigError(
            f"loss.field={path}: {error}; give module:function, installed or in the directory where the command runs, "
            "that takes x (B, *data.shape) and t (B,) to v(x, t) of x's shape, or FILE.safetensors with the state_dict "
            "of a U-Net that has this energy's sizes"
        ) from error
    return found


def pairs_of(config: kinds.LossConfig) -> Callable[..., Tensor] | None:
    """What a loss computes on the host, as a function of (x_pos, x_neg, generator); None if it computes all on the
    device."""
    if isinstance(config, kinds.EnergyMatchingConfig) and config.flow_weight:
        return partial(flow_pairs, separate_batch=config.separate_batch)
    return None


def _with(function: Callable[..., LossOutput], config: kinds.ObjectiveConfig, *names: str) -> Callable[..., LossOutput]:
    """`function` with the values that `config` has under `names`."""
    return partial(function, **{name: getattr(config, name) for name in names})


def _noise(config: kinds.NoiseContrastiveConfig) -> GaussianNoise | UniformNoise:
    if config.noise == "uniform":
        return UniformNoise(*config.noise_bounds)
    return GaussianNoise(config.noise_mean, config.noise_std)


def _last_step(chain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a chain's last step."""
    last = {name: chain[name] for name in ("grad_clamp", "bounds", "boundary")}
    return last | {name: chain[name][-1] for name in ("step_size", "noise_scale")}


# A loss and its gradient


@dataclass(frozen=True)
class LossInputs:
    """What the loss of a step is a function of, beside weights and random numbers; None where there is no such thing.

    `step` counts through `negatives_at` alone. `chain`: as `loss_of` has it. `pairs`: of `pairs_of`; None also where
    the loss computes them itself.
    """

    x_pos: Tensor  # (B, *shape)
    x_neg: Tensor | None  # (n, *shape)
    y_pos: Tensor | None  # (B,) labels
    y_neg: Tensor | None  # (n,)
    step: int
    chain: dict[str, Any]
    pairs: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that there are, also those among the chain's settings, by name."""
        own = {"x_pos": self.x_pos, "x_neg": self.x_neg, "y_pos": self.y_pos, "y_neg": self.y_neg, "pairs": self.pairs}
        found = {name: x for name, x in own.items() if x is not None}
        return found | {f"chain.{name}": x for name, x in self.chain.items() if isinstance(x, Tensor)}

    def cloned(self) -> "LossInputs":
        """The same with copies of the tensors."""
        copies = {name: x.clone() for name, x in self.tensors().items()}
        chain = {name: copies.get(f"chain.{name}", value) for name, value in self.chain.items()}
        x_neg, y_pos, y_neg, pairs = (copies.get(name) for name in ("x_neg", "y_pos", "y_neg", "pairs"))
        return LossInputs(copies["x_pos"], x_neg, y_pos, y_neg, self.step, chain, pairs)


class Graph(Protocol):
    """A function that `replay` computes again, as `ebm.samplers.engine.CapturedFunction` is one."""

    results: Any

    def replay(self, generator: StreamSources) -> None:
        """Computes the function with random numbers from `generator`; `results` then hold its values."""


# (function of sources of random numbers, such sources, device) -> its graph
Capture = Callable[[Callable[[StreamSources], Any], StreamSources, torch.device], Graph]


class _Left(NamedTuple):
    """What the passes of a loss leave behind, beside its value."""

    gradients: list[Tensor | None]  # of each parameter
    buffers: list[Tensor]  # copies
    draws: int  # of the generator


class StepLoss:
    """The loss of a step and its gradient: a forward and a backward pass of `model`. The gradients of its parameters
    must be None before a call, as `zero_grad` leaves them.

    With `capture`, both passes are one graph: launched one by one, their hundreds of kernels take the host longer than
    a GPU. The graph is made at the first call, and again when the shapes of the inputs, the kind of the chains or the
    numbers among their settings are others. It is used only if its loss, energies, gradients and buffers are those of
    the passes on the batch at hand, with the same noise, for which the host waits. Otherwise, and where there can be no
    graph, the passes run as they are, and the log says so once. For a model without state but its parameters and
    buffers.

    Args:
        model: the wrapped `Objective`: (x_pos, x_neg, **settings) -> LossOutput.
        backward: adds the gradient of a loss to the parameters'.
        negatives_at: of the loss' config.
        capture: makes the graph of a function, as `CapturedFunction` does; None: there is none. A call for one of
            several parts of a batch, or with torch's generators, uses none either.
        tolerance: the largest relative difference to the passes that a graph may have.
        pairs: of `pairs_of`: computed before each replay.
    """

    def __init__(
        self,
        model: nn.Module,
        backward: Callable[[Tensor], None],
        negatives_at: Callable[[int], object],
        capture: Capture | None,
        tolerance: float,
        pairs: Callable[..., Tensor] | None,
    ) -> None:
        self.model, self.backward, self.negatives_at = model, backward, negatives_at
        self.capture, self.tolerance, self.pairs = capture, tolerance, pairs
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.buffers = list(model.buffers())
        self.captured: _CapturedLoss | None = None  # the graph in use
        self._key: object = None  # of that graph

    def __call__(self, inputs: LossInputs, generator: StreamSources, parts: int = 1) -> LossOutput:
        """The loss of one of the `parts` of a batch, detached. Its gradient, divided by `parts`, is added to the
        parameters'."""
        if self.capture is None or parts > 1 or not isinstance(generator, Philox):
            return self.passes(inputs, generator, parts)
        key = self._built_in(inputs, generator)
        if self.captured is not None and self._key == key:
            return self.captured(self._paired(inputs, generator), generator)
        self.captured = None  # gives its memory back, before another takes some
        before = self._left(generator)
        expected = self.passes(inputs, generator)
        after = self._left(generator)
        if not all(bool(x.isfinite().all()) for x in (expected.loss, *after.gradients) if x is not None):
            return expected  # a broken batch says nothing of a graph; the next one will
        output, said = self._by_graph(self.capture, key, inputs, generator, before, (expected, after))
        if output is not None:
            log.info("the loss is one CUDA graph: %s", said)
            return output
        log.warning("the loss runs operation by operation: %s", said)
        self.capture = None
        self._restore(after, generator)
        torch.cuda.empty_cache()  # of what the attempt took
        return expected

    def passes(self, inputs: LossInputs, generator: StreamSources, parts: int = 1) -> LossOutput:
        """The same without a graph."""
        settings: dict[str, Any] = {"y_pos": inputs.y_pos, "y_neg": inputs.y_neg, "chain": inputs.chain}
        if inputs.pairs is not None:
            settings["pairs"] = inputs.pairs
        output: LossOutput = self.model(inputs.x_pos, inputs.x_neg, generator=generator, step=inputs.step, **settings)
        self.backward(output.loss / parts)
        return output._replace(loss=output.loss.detach())

    def _built_in(self, inputs: LossInputs, generator: Philox) -> object:
        """All that a replay can't change."""
        layouts = [(name, x.shape, x.stride(), x.dtype) for name, x in inputs.tensors().items()]
        addresses = [tensor.data_ptr() for tensor in (*self.parameters, *self.buffers)]
        kind = self.negatives_at(inputs.step), self.model.training, len(generator)
        return layouts, addresses, kind, numbers_of(inputs.chain)

    def _paired(self, inputs: LossInputs, generator: Philox) -> LossInputs:
        """The inputs with their pairs, of the noise that the loss will draw."""
        if self.pairs is None:
            return inputs
        draws = generator.draws
        pairs = self.pairs(inputs.x_pos, inputs.x_neg, generator)
        generator.draws = draws
        return replace(inputs, pairs=pairs)

    def _by_graph(
        self,
        capture: Capture,
        key: object,
        inputs: LossInputs,
        generator: Philox,
        before: _Left,
        passes: tuple[LossOutput, _Left],
    ) -> tuple[LossOutput | None, str]:
        """The loss by a new graph, which is kept, and how near it is to that of the `passes`; or None, and why."""
        gc.collect()  # passes in a cycle of references: their nodes that add gradients belong to another stream
        generator.draws = before.draws
        inputs = self._paired(inputs, generator)
        try:
            captured = _CapturedLoss(self, capture, inputs, generator)
            self._restore(before, generator)  # the capture's first runs have changed buffers
            output = captured(inputs, generator)
            errors = _errors((output, self._left(generator)), passes)
        except RuntimeError as error:  # a capture that fails, too little memory, and all else that torch raises
            # As text: a handler may keep its records, and the error's frames hold the memory of the capture.
            return None, f"it can't be captured as a CUDA graph: {str(error).partition(chr(10))[0]}"
        said = ", ".join(f"{name} within {error:.1g}" for name, error in errors.items()) + " of the eager ones"
        if not all(error <= self.tolerance for error in errors.values()):  # NaN is no error below it
            return None, f"its CUDA graph is wrong: {said}, which is more than {self.tolerance:g}"
        self.captured, self._key = captured, key
        return output, said

    def _left(self, generator: Philox) -> _Left:
        gradients = [parameter.grad for parameter in self.parameters]
        return _Left(gradients, [buffer.clone() for buffer in self.buffers], generator.draws)

    @torch.no_grad()
    def _restore(self, left: _Left, generator: Philox) -> None:
        for parameter, gradient in zip(self.parameters, left.gradients, strict=True):
            parameter.grad = gradient
        for buffer, value in zip(self.buffers, left.buffers, strict=True):
            buffer.copy_(value)
        generator.draws = left.draws


class _CapturedLoss:
    """The passes of a `StepLoss` as one graph with static inputs; a call copies inputs in, replays, gives the
    parameters their static gradients, and copies the outputs out."""

    def __init__(self, loss: StepLoss, capture: Capture, inputs: LossInputs, generator: Philox):
        self.parameters, self.inputs = loss.parameters, inputs.cloned()

        def passes(sources: StreamSources) -> tuple[LossOutput, list[Tensor | None]]:
            for parameter in self.parameters:
                parameter.grad = None  # the pass then makes gradients, in memory of the graph, and adds to none
            output = loss.passes(self.inputs, sources)
            return output, [parameter.grad for parameter in self.parameters]

        self.graph = capture(passes, generator, inputs.x_pos.device)

    def __call__(self, inputs: LossInputs, generator: Philox) -> LossOutput:
        given = inputs.tensors()
        for name, static in self.inputs.tensors().items():
            static.copy_(given[name])
        self.graph.replay(generator)
        output, gradients = self.graph.results
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        e_pos, e_neg = (None if e is None else e.clone() for e in (output.e_pos, output.e_neg))
        return LossOutput(output.loss.clone(), e_pos, e_neg, {name: x.clone() for name, x in output.terms.items()})


def _errors(ours: tuple[LossOutput, _Left], theirs: tuple[LossOutput, _Left]) -> dict[str, float]:
    """The relative errors of a loss and of all that goes with it. Waits for the device."""
    (output, left), (expected, right) = ours, theirs
    energies = _both([output.e_pos, output.e_neg], [expected.e_pos, expected.e_neg])
    gradients = _both(left.gradients, right.gradients)
    # A loss may be the small difference of large energies, and the gradient of a bias that of large sums: the one is
    # measured by the energies too, the other as part of the whole gradient alone.
    size = sum(float(e.abs().mean()) for _, e in energies) + float(expected.loss.abs())
    matrices = [_error([pair]) for pair in gradients if pair[1].ndim > 1]
    same = [x is None for x in left.gradients] == [x is None for x in right.gradients]
    return {
        "loss": float((output.loss - expected.loss).abs()) / (size or 1.0),
        "energies": _error(energies),
        "gradients": max([_error(gradients), *matrices], key=_rank) if same else math.inf,
        "buffers": _error(_both(left.buffers, right.buffers)),
    }


def _both(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    """The pairs of tensors that both sides have."""
    return [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]


def _error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """|a - b| / |b| of all pairs (a, b) together; |a| where all b are 0."""
    difference, size = (
        math.hypot(*(float(torch.linalg.vector_norm(x.double())) for x in xs))
        for xs in ((a.double() - b for a, b in pairs), (b for _, b in pairs))
    )
    return difference / size if size else difference


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error
