"""What holds for every kind of loss: its config, its labels, its random numbers, its arithmetic."""

import sys
from typing import get_args

import pytest
import torch
from gaussians import Network, seeded
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import nn

from ebm import losses
from ebm.config import MLPConfig
from ebm.config.energies import UNetConfig
from ebm.config.losses import LossConfig
from ebm.energies import MLPEnergyFunction, UNetEnergyFunction
from ebm.errors import ConfigError
from ebm.losses import field_of, loss_of
from ebm.losses.contrastive import GaussianNoise, UniformNoise
from ebm.losses.flow_matching import flow_loss

CHAIN = {"step_size": [9.0, 0.1], "noise_scale": [9.0, 0.2], "grad_clamp": 0.5, "bounds": None, "boundary": "clamp"}
CHAIN |= {"num_steps": 2}
LAST = CHAIN | {"step_size": 0.1, "noise_scale": 0.2}
del LAST["num_steps"]

KINDS = {
    "contrastive": ({}, losses.contrastive_divergence, {"l2": 0.1}),
    "contrastive_l2": ({"kind": "contrastive", "l2": 0.3}, losses.contrastive_divergence, {"l2": 0.3}),
    "improved_contrastive": (
        {"kl_steps": 2, "kl_weight": 0.5, "entropy_weight": 0.2},
        losses.improved_contrastive_divergence,
        {"kl_steps": 2, "kl_weight": 0.5, "entropy_weight": 0.2, "l2": 0.1, **LAST},
    ),
    "score_matching_exact": (
        {"kind": "score_matching", "method": "exact", "temperature": 0.5},
        losses.implicit_score_matching,
        {"trace": "exact", "temperature": 0.5},
    ),
    "score_matching": (
        {"num_projections": 3, "temperature": 0.5},
        losses.implicit_score_matching,
        {"trace": "hutchinson", "num_projections": 3, "temperature": 0.5},
    ),
    "score_matching_sliced": (
        {"kind": "score_matching", "method": "sliced", "variance_reduction": False, "num_projections": 2, "l2": 0.1},
        losses.sliced_score_matching,
        {"variance_reduction": False, "num_projections": 2, "l2": 0.1},
    ),
    "denoising": (
        {"sigma": 0.4, "temperature": 0.5},
        losses.denoising_score_matching,
        {"sigma": 0.4, "temperature": 0.5},
    ),
    "multilevel_denoising": (
        {"sigma": 0.4, "sigma_min": 0.2, "sigma_max": 0.8, "temperature": 0.5},
        losses.multilevel_denoising,
        {"sigma": 0.4, "sigma_min": 0.2, "sigma_max": 0.8, "temperature": 0.5},
    ),
    "noise_contrastive": (
        {"noise_mean": 0.1, "noise_std": 1.5, "ratio": 2},
        losses.noise_contrastive,
        {"noise": GaussianNoise(0.1, 1.5), "ratio": 2},
    ),
    "noise_contrastive_uniform": (
        {"kind": "noise_contrastive", "noise": "uniform", "noise_bounds": (-4, 5)},
        losses.noise_contrastive,
        {"noise": UniformNoise(-4, 5)},
    ),
    "energy_discrepancy": (
        {"time": 0.3, "num_samples": 3, "stabiliser": 0.5},
        losses.energy_discrepancy,
        {"time": 0.3, "num_samples": 3, "stabiliser": 0.5},
    ),
    "recovery": ({"l2": 0.2}, losses.recovery_likelihood, {"l2": 0.2}),
    "energy_matching": (
        {"warmup_steps": 4, "flow_weight": 0.5, "contrastive_weight": 0.3, "floor": 0.2, "trim": 0.3},
        losses.energy_matching,
        {"flow_weight": 0.5, "contrastive_weight": 0.3, "floor": 0.2, "trim": 0.3, "separate_batch": True},
    ),
    "equilibrium": (
        {"gradient_scale": 3.0, "decay_start": 0.7},
        losses.equilibrium_matching,
        {"gradient_scale": 3.0, "decay_start": 0.7},
    ),
}
JEM = {
    "jem": ({"contrastive_weight": 0.4}, losses.joint_energy, {"contrastive_weight": 0.4, "l2": 0.1}),
    "jem_bounded": ({"kind": "jem", "bounded": True}, losses.joint_energy, {"bounded": True, "l2": 0.1}),
    "jem_joint": ({"kind": "jem", "joint": True}, losses.joint_energy, {"joint": True, "l2": 0.1}),
}


def parsed(values: dict):
    return TypeAdapter(LossConfig).validate_python(values)


def config_of(name: str, **more):
    return parsed({"kind": name} | (KINDS | JEM)[name][0] | more)


class Classifier(nn.Module):
    """One network a class, by `class_energies` and as E(x, y)."""

    def __init__(self, num_classes: int = 3):
        super().__init__()
        self.parts = nn.ModuleList([Network(2, seed) for seed in range(num_classes)])

    def class_energies(self, x):
        return torch.stack([part(x) for part in self.parts], dim=1)

    def forward(self, x, y):
        return self.class_energies(x).gather(1, y[:, None]).squeeze(1)


def batch(seed: int = 0, size: int = 8):
    """x_pos, x_neg, y_pos, y_neg"""
    g = seeded(seed)
    x = torch.randn(2, size, 2, dtype=torch.float64, generator=g)
    y = torch.randint(3, (2, size), generator=g)
    return x[0], x[1] + 0.5, y[0], y[1]


def gradients(loss, energy):
    return torch.autograd.grad(loss, list(energy.parameters()), materialize_grads=True)


def compute(name, energy, x_pos, x_neg, y_pos=None, y_neg=None, generator=None, **more):
    loss = loss_of(config_of(name, **more))
    return loss(energy, x_pos, x_neg, step=5, y_pos=y_pos, y_neg=y_neg, generator=generator, chain=CHAIN)


def test_every_kind_is_here():
    union = {kind.model_fields["kind"].default for kind in get_args(get_args(LossConfig)[0])}
    # Of energies with a noise level, and with a latent: test_noise_levels_loss.py, test_contrastive.py.
    elsewhere = {"dual_score_matching", "contrastive_latent"}
    assert {config_of(name).kind for name in KINDS | JEM} == union - elsewhere


@pytest.mark.parametrize("name", [*KINDS, *JEM])
def test_the_config_s_function_with_its_settings(name):
    x_pos, x_neg, y_pos, y_neg = batch()
    _, function, settings = (KINDS | JEM)[name]
    found = compute(name, Classifier(), x_pos, x_neg, y_pos, y_neg, seeded(1))
    expected = function(Classifier(), x_pos, x_neg, y_pos=y_pos, y_neg=y_neg, generator=seeded(1), **settings)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.terms.keys() == expected.terms.keys()
    pairs = [(term, expected.terms[name]) for name, term in found.terms.items()]
    for term, other in [*pairs, (found.e_pos, expected.e_pos), (found.e_neg, expected.e_neg)]:
        assert (term is None) == (other is None)
        if term is not None:
            assert torch.equal(term, other) and term.dtype == torch.float32 and not term.requires_grad


@pytest.mark.parametrize("name", [*KINDS, *JEM])
def test_terms_are_scalars_and_energies_are_fields(name):
    """What is logged is a scalar a name; the energies of the batches are fields, of one number a state."""
    x_pos, x_neg, y_pos, y_neg = batch()
    output = compute(name, Classifier(), x_pos, x_neg, y_pos, y_neg, seeded(1), gradient_penalty=0.1)
    assert all(term.ndim == 0 for term in output.terms.values()) and not {"e_pos", "e_neg"} & output.terms.keys()
    data = 4 if name == "energy_matching" else 8  # half of them are the flow's
    assert output.e_pos is None or output.e_pos.shape == (data,)
    assert output.e_neg is None or (output.e_neg.ndim == 1 and len(output.e_neg) % 8 == 0)


@pytest.mark.parametrize("name", [*KINDS, *JEM])
def test_parts_with_generators_are_batches(name):
    """A batch in two parts gives the mean of what the parts alone give, so that a run's losses are those of any number
    of processes."""
    energy, (x_pos, x_neg, y_pos, y_neg) = Classifier(), batch()
    more = {} if name.startswith(("recovery", "energy_m")) else {"gradient_penalty": 0.2}
    whole = compute(name, energy, x_pos, x_neg, y_pos, y_neg, [seeded(1), seeded(2)], **more).loss
    parts = []
    for part, seed in ((slice(0, 4), 1), (slice(4, 8), 2)):
        x = (x_pos[part], x_neg[part], y_pos[part], y_neg[part])
        parts.append(compute(name, energy, *x, [seeded(seed)], **more).loss)
    mean = (parts[0] + parts[1]) / 2
    torch.testing.assert_close(whole, mean)
    for a, b in zip(gradients(whole, energy), gradients(mean, energy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", KINDS)
def test_labels_stay_with_their_states(name):
    """A class-conditional energy, on data of one class at a time, is the energy of that class."""
    energy, (x_pos, x_neg, _, _) = Classifier(), batch()
    y = torch.full((8,), 1)
    found = compute(name, energy, x_pos, x_neg, y, y, seeded(1), gradient_penalty=0.1)
    expected = compute(name, energy.parts[1], x_pos, x_neg, generator=seeded(1), gradient_penalty=0.1)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("name", ["noise_contrastive", "energy_discrepancy"])
def test_labels_of_draws_are_their_datum_s(name):
    seen = {}

    def energy(x, y):
        seen["y"] = y
        return x.sum(1)

    x_pos, x_neg, y_pos, _ = batch()
    compute(name, energy, x_pos, x_neg, y_pos, generator=seeded(1))
    times = {"noise_contrastive": 2, "energy_discrepancy": 3}[name]
    assert torch.equal(seen["y"], torch.cat([y_pos, y_pos.repeat_interleave(times)]))


class FloatClassifier(MLPEnergyFunction):
    """What a run trains: spectral norm, float32 head, three classes."""

    def __init__(self):
        super().__init__(2, 16, spectral_norm=True, num_classes=3)

    def class_energies(self, x):
        return torch.stack([self(x, torch.full((len(x),), k)) for k in range(3)], dim=1)


@pytest.mark.parametrize("name", [*KINDS, *JEM])
def test_bfloat16(name):
    """Under autocast the loss is float32, its gradient finite and near that without."""
    x_pos, x_neg, y_pos, y_neg = batch(size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = FloatClassifier().train()
    found = []
    for cast in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=cast),
            torch.nn.utils.parametrize.cached(),
        ):
            energy.eval()  # the same spectral norms both times
            output = compute(name, energy, x_pos.float(), x_neg.float(), y_pos, y_neg, seeded(1))
        assert output.loss.dtype == torch.float32
        found.append(torch.cat([g.flatten() for g in gradients(output.loss, energy)]))
    full, half = found
    assert half.isfinite().all() and not torch.equal(full, half)
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("name", [*KINDS, *JEM])
def test_one_evaluation_of_spectral_norm_a_loss(name):
    """As the trainer calls it: in training mode, weights cached, so that all forwards see one and the same energy."""
    x_pos, x_neg, y_pos, y_neg = (t.float() if t.is_floating_point() else t for t in batch())
    energy = FloatClassifier().train()
    with torch.nn.utils.parametrize.cached():
        loss = compute(name, energy, x_pos, x_neg, y_pos, y_neg, seeded(1)).loss
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in energy.parameters())
    assert sum(float(p.grad.norm()) for p in energy.parameters() if p.grad is not None) > 0


def test_inner_gradients_are_not_lost_in_float16():
    """|dE/dx| of 1e-9 is below float16's smallest number, and no loss scale multiplies it."""
    w = torch.full((2, 1), 3e-5, requires_grad=True)
    x = torch.ones(4, 2)

    def energy(x):
        return (x @ w @ w.T[:, :1])[:, 0]

    with torch.autocast("cpu", torch.float16):
        loss = losses.gradient_penalty(energy, x)
    assert loss.item() == pytest.approx(2 * (3e-5**2) ** 2 / 2, rel=1e-4, abs=0)


def test_gradient_penalty_of_the_config():
    energy, (x_pos, x_neg, y_pos, y_neg) = Network(), batch()
    plain = compute("contrastive", energy, x_pos, x_neg)
    at_data = compute("contrastive", energy, x_pos, x_neg, gradient_penalty=0.4)
    torch.testing.assert_close(at_data.loss - plain.loss, 0.4 * losses.gradient_penalty(energy, x_pos))
    torch.testing.assert_close(at_data.terms["penalty"], losses.gradient_penalty(energy, x_pos).detach().float())
    settings = {"gradient_penalty": 0.4, "gradient_penalty_at": "interpolates"}
    between = compute("contrastive", energy, x_pos, x_neg, generator=seeded(1), **settings)
    x = losses.interpolate(x_pos, x_neg, seeded(1))
    torch.testing.assert_close(between.loss - plain.loss, 0.4 * losses.gradient_penalty(energy, x))
    classes = Classifier()
    jem = [compute("jem", classes, x_pos, x_neg, y_pos, y_neg, gradient_penalty=p).loss for p in (0.0, 0.4)]
    torch.testing.assert_close(jem[1] - jem[0], 0.4 * losses.gradient_penalty(losses.marginal(classes), x_pos))


def test_where_chains_start():
    starts = {name: config_of(name).negatives_at(5) for name in KINDS | JEM}
    chained = {"contrastive", "contrastive_l2", "improved_contrastive", "jem", "jem_bounded", "jem_joint"}
    assert {name for name, start in starts.items() if start == "persistent"} == chained
    assert starts["recovery"] == "recovery" and starts["energy_matching"] == "noise"
    assert {starts[name] for name in starts.keys() - chained - {"recovery", "energy_matching"}} == {None}
    assert config_of("jem", negatives="noise").negatives_at(1) == "noise"
    assert [config_of("energy_matching").negatives_at(step) for step in (1, 4, 5)] == [None, None, "noise"]


def test_energy_matching_is_the_flow_alone_at_first():
    x_pos, x_neg, _, _ = batch()
    loss = loss_of(config_of("energy_matching"))
    flow = loss(Network(), x_pos, None, step=4, generator=seeded(1))
    assert set(flow.terms) == {"flow"}
    torch.testing.assert_close(loss(Network(), x_pos, x_neg, step=4, generator=seeded(1)).loss, flow.loss)
    assert "contrast" in loss(Network(), x_pos, x_neg, step=5, generator=seeded(1)).terms


class Recorded(nn.Module):
    """A field of two components with weights and dropout, which keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.seen = nn.Linear(2, 2), nn.Dropout(0.5), []

    def forward(self, x, t):
        y = self.linear(x)
        self.seen.append((x.requires_grad, x.dtype, t.shape, y.dtype, torch.is_grad_enabled()))
        return self.drop(y)


def inward(x, t):
    return -x


wrong_shape, broken, infinite, number = (lambda x, t: t), (lambda x, t: x.nothing), (lambda x, t: x / 0), 3
recorded = Recorded()
CPU = torch.device("cpu")


@pytest.fixture
def importable(monkeypatch):
    """This file as a module that loss.field can name."""
    monkeypatch.setitem(sys.modules, "fields_of_mine", sys.modules[__name__])


def test_a_field_is_the_flow_s_until_there_are_chains(importable):
    x_pos, x_neg, _, _ = batch()
    config = config_of("energy_matching", field="fields_of_mine:inward")
    loss, plain = loss_of(config, field=field_of(config, MLPConfig(), (2,), CPU)), loss_of(config_of("energy_matching"))
    expected = 0.5 * flow_loss(Network(), x_pos, generator=seeded(1), field=inward)
    torch.testing.assert_close(loss(Network(), x_pos, x_neg, step=4, generator=seeded(1)).loss, expected)
    later = [each(Network(), x_pos, x_neg, step=5, generator=seeded(1)).loss for each in (loss, plain)]
    torch.testing.assert_close(*later)
    config = config_of("equilibrium", field="fields_of_mine:inward")
    found = loss_of(config, field=field_of(config, MLPConfig(), (2,), CPU))(
        Network(), x_pos, step=9, generator=seeded(1)
    )
    settings = {"gradient_scale": 3.0, "decay_start": 0.7, "field": inward}
    expected = losses.equilibrium_matching(Network(), x_pos, generator=seeded(1), **settings).loss
    torch.testing.assert_close(found.loss, expected)
    assert field_of(config_of("equilibrium"), MLPConfig(), (2,), CPU) is None


def test_a_module_as_field_is_copied_frozen_and_computes_under_autocast(importable):
    recorded.seen.clear()
    config = config_of("equilibrium", field="fields_of_mine:recorded")
    field = field_of(config, MLPConfig(), (2,), CPU)
    assert field is not recorded and not any(p.requires_grad for p in field.parameters()) and not field.training
    assert recorded.training and all(p.requires_grad for p in recorded.parameters())
    field.seen.clear()
    energy, x = MLPEnergyFunction(2), torch.randn(8, 2, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(config, field=field)(energy, x, step=1, generator=seeded(1)).loss
    loss.backward()
    assert field.seen == [(False, torch.float32, (8,), torch.bfloat16, False)]
    assert all(p.grad is None for p in field.parameters()) and any(p.grad is not None for p in energy.parameters())


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("no_module_of_mine:v", "No module named 'no_module_of_mine'"),
        ("fields_of_mine:missing", "has no attribute 'missing'"),
        ("fields_of_mine:wrong_shape", r"takes x \[2, 2\] and t \[2\] to \[2\]"),
        ("fields_of_mine:broken", "give module:function"),
        ("fields_of_mine:infinite", "not finite"),
        ("fields_of_mine:number", "of type int, not a function"),
        ("fields_of_mine:Recorded", "a class, not a function"),
        ("subprocess:Popen", "a class, not a function"),
        ("nowhere.safetensors", r"energy\.kind=mlp"),
    ],
)
def test_fields_that_are_refused(importable, field, words):
    with pytest.raises(ConfigError, match=words) as caught:
        field_of(config_of("equilibrium", field=field), MLPConfig(), (2,), CPU)
    assert str(caught.value).startswith(f"loss.field={field}") and "or FILE.safetensors" in str(caught.value)


def test_a_field_knows_no_classes(importable):
    with pytest.raises(ConfigError, match=r"energy\.num_classes=3: set one of them to null"):
        field_of(config_of("equilibrium", field="fields_of_mine:inward"), MLPConfig(num_classes=3), (2,), CPU)


@pytest.mark.parametrize("timed", [0, 1])
@pytest.mark.parametrize("head", ["vit", "quadratic"])
def test_a_field_of_a_file(tmp_path, timed, head):
    """The output of a U-Net with the energy's sizes, whatever the energy's head; with a channel more it is given t."""
    field = UNetEnergyFunction(2 + timed, 8, 8, (4, 8), planes=2)
    save_file(field.state_dict(), tmp_path / "v.safetensors")
    config = config_of("equilibrium", field=str(tmp_path / "v.safetensors"))
    x, t = torch.randn(3, 2, 8, 8, generator=seeded(0)), torch.tensor([0.1, 0.5, 0.9])
    before = torch.get_rng_state()
    found = field_of(config, UNetConfig(features=(4, 8), head=head), (2, 8, 8), CPU)
    assert torch.equal(torch.get_rng_state(), before) and not any(p.requires_grad for p in found.parameters())
    inputs = torch.cat([x, t.view(3, 1, 1, 1).expand(3, 1, 8, 8)], 1) if timed else x
    torch.testing.assert_close(found(x, t), field.eval().field(inputs))
    for sizes, words in (({"features": (4, 4)}, "other weights"), ({"blocks": 2}, "other weights")):
        with pytest.raises(ConfigError, match=words):
            field_of(config, UNetConfig(**{"features": (4, 8), "head": head} | sizes), (2, 8, 8), CPU)
    with pytest.raises(ConfigError, match="other weights"):
        field_of(config, UNetConfig(features=(4, 8), head=head), (4, 8, 8), CPU)


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (b"no weights", "header")])
def test_a_file_that_is_no_field(tmp_path, content, words):
    file = tmp_path / "v.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        field_of(config_of("equilibrium", field=str(file)), UNetConfig(), (1, 8, 8), CPU)
    assert str(caught.value).startswith(f"loss.field={file}: ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "equilibrium", "field": "field.pt"}, "must be module:function, .* or FILE.safetensors"),
        ({"kind": "equilibrium", "field": "a:b:c"}, "must be module:function"),
        ({"kind": "denoising", "field": "a:b"}, "Extra inputs"),
        ({"kind": "denoising", "num_sigmas": 3}, "Extra inputs"),
        ({"kind": "multilevel_denoising", "sigma_min": 0.2}, "must lie between sigma_min=0.2 and sigma_max=1.2"),
        ({"kind": "multilevel_denoising", "sigma": 2.0}, "must lie between sigma_min=0.05 and sigma_max=1.2"),
        ({"kind": "noise_contrastive", "noise_bounds": (1, -1)}, "low < high"),
        ({"kind": "score_matching", "method": "approx"}, "'exact', 'hutchinson' or 'sliced'"),
        ({"kind": "recovery", "negatives": "noise"}, "Extra inputs"),
        ({"kind": "energy_matching", "trim": 1.0}, "less than 1"),
        ({"kind": "contrastive_divergence"}, "'improved_contrastive'"),
    ],
)
def test_configs_that_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        parsed(values)
