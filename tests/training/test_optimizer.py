"""The learning rate's curve, and steps that a non-finite gradient makes void."""

import copy
import math

import pytest
import torch
from torch import nn

from ebm.config import OptimConfig, validate
from ebm.energies.networks import spectrally_normalise
from ebm.errors import DataError
from ebm.runtime.checkpoint import load_scaler
from ebm.training.state import (
    build_optimizer,
    clip_grad_norm,
    learning_rate,
    set_learning_rate,
    step_if,
    update_average,
)

YES, NO = torch.tensor(True), torch.tensor(False)


def config(steps=1000, **optim):
    return validate({"data": {"shards": "d"}, "train": {"steps": steps}, "optim": optim}, "test")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def set_gradients(model, step):
    g = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=g)


def everything(model, optimizer):
    """Copies of all weights and all of the optimizer's tensors."""
    state = [value for parameter in model.parameters() for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


def test_learning_rate_curve():
    c = config(lr=0.1, warmup_steps=99, decay_start=0.5, lr_end=0.2)
    rate = {step: learning_rate(c, step) / 0.1 for step in range(1, 1001)}
    assert rate[1] == pytest.approx(0.01) and rate[50] == pytest.approx(0.5)
    assert rate[99] == pytest.approx(0.99)
    assert all(rate[step] == pytest.approx(1) for step in (100, 300, 500))
    assert rate[750] == pytest.approx(0.6)  # half-way between 1 and .2
    assert rate[625] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert rate[1000] == pytest.approx(0.2)
    assert all(rate[step] < rate[step + 1] for step in range(1, 100))
    assert all(rate[step] >= rate[step + 1] for step in range(100, 1000))


@pytest.mark.parametrize("decay_start", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [2, 7])
def test_short_runs_have_a_finite_rate(steps, decay_start):
    c = config(steps=steps, lr=0.1, decay_start=decay_start, lr_end=0.5)
    rates = [learning_rate(c, step) for step in range(1, steps + 1)]
    assert all(0.05 - 1e-12 <= rate <= 0.1 for rate in rates)
    assert rates[-1] == pytest.approx(0.1 if decay_start == 1 else 0.05)


def test_every_group_gets_the_rate():
    c = config(lr=0.1, warmup_steps=9, weight_decay=0.1)
    optimizer = build_optimizer(c.optim, network())
    set_learning_rate(optimizer, c, 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_weights_decay_and_biases_do_not():
    """Where the gradient is zero, AdamW leaves (1 - lr * decay) of a weight."""
    model = network()
    before = copy.deepcopy(model)
    optimizer = build_optimizer(config(lr=0.1, weight_decay=0.5).optim, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step_if(optimizer, YES)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old * 0.95 if old.ndim > 1 else old)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    groups = build_optimizer(config().optim, model).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model[2].parameters()}


def test_finite_steps_are_adamw():
    model = network()
    reference = copy.deepcopy(model)
    optimizer = build_optimizer(config(lr=0.01, betas=[0.3, 0.9], weight_decay=0.1).optim, model)
    weights, biases = ([p for p in reference.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.3, 0.9), foreach=False, fused=False)
    for step in range(5):
        set_gradients(model, step)
        set_gradients(reference, step)
        step_if(optimizer, YES)
        plain.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_void_step_changes_no_bit():
    """Weights, moments and step counts, and with them the run that follows."""
    model, spared = network(), network()
    settings = config(lr=0.01, betas=[0.5, 0.9], weight_decay=0.1).optim
    optimizer, reference = build_optimizer(settings, model), build_optimizer(settings, spared)
    for step in range(3):
        for m, o in ((model, optimizer), (spared, reference)):
            set_gradients(m, step)
            step_if(o, YES)
    before = everything(model, optimizer)
    assert len(before) == 4 * 4  # weight, step, two moments
    for bad in (torch.nan, torch.inf):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, bad)
        step_if(optimizer, NO)
        assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), before, strict=True))
    for m, o in ((model, optimizer), (spared, reference)):
        set_gradients(m, 9)
        step_if(o, YES)
    after, expected = everything(model, optimizer), everything(spared, reference)
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert not torch.equal(after[0], before[0])


def test_scaled_gradients_make_the_same_steps():
    """With the scaler of fp16: the norm is that of the gradient itself, and a void step halves the scale."""
    model, plain = network(), network()
    settings = config(lr=0.01, betas=[0.5, 0.9]).optim
    optimizer, reference = build_optimizer(settings, model), build_optimizer(settings, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for m in (model, plain):
            m.zero_grad()
        plain(x).square().sum().backward()
        scaler.scale(model(x).square().sum()).backward()
        if step == 2:
            for m in (model, plain):
                m[0].weight.grad[0, 0] = torch.inf
        norms = clip_grad_norm(optimizer, 0.5, scaler), clip_grad_norm(reference, 0.5)
        assert norms[0] == norms[1] and norms[0].isfinite() == (step != 2)
        step_if(optimizer, norms[0].isfinite(), scaler)
        step_if(reference, norms[1].isfinite())
        assert scaler.get_scale() == (1024.0 if step < 2 else 512.0)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_scaler_goes_on_from_a_checkpoint(tmp_path):
    """torch's update takes its interval, a number of steps, as an int; state.json is read as floats."""
    scaler, resumed = torch.amp.GradScaler("cpu", growth_interval=3), torch.amp.GradScaler("cpu")
    model = network()
    optimizer = build_optimizer(config().optim, model)

    def update(one):
        one.scale(model(torch.ones(1, 3)).sum()).backward()
        step_if(optimizer, YES, one)

    update(scaler)
    load_scaler(tmp_path, resumed, {name: float(value) for name, value in scaler.state_dict().items()})
    assert resumed.state_dict() == scaler.state_dict()
    for one in (scaler, resumed):
        update(one)
        update(one)
    assert resumed.state_dict() == scaler.state_dict() and scaler.get_scale() == 2 * 65536
    with pytest.raises(DataError, match=r"state.json: 'scaler' has \['scale'\], not"):
        load_scaler(tmp_path, resumed, {"scale": 2.0})


def test_a_void_first_step_changes_no_weight():
    model = network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(config(weight_decay=0.1).optim, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    step_if(optimizer, NO)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(value.eq(0).all() for state in optimizer.state.values() for value in state.values())


def test_the_average_follows_the_weights_and_takes_over_the_buffers():
    model = spectrally_normalise(network())
    average = copy.deepcopy(model).requires_grad_(False)
    expected = [p.detach().double() for p in model.parameters()]
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        model(torch.zeros(1, 3))  # a power iteration moves the buffers
        update_average(average, model, 0.9)
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    torch.testing.assert_close([p.double() for p in average.parameters()], expected)
    assert all(torch.equal(a, b) for a, b in zip(average.buffers(), model.buffers(), strict=True))
    assert len(list(average.buffers())) == 4


@pytest.mark.parametrize(("decay", "warmup", "left"), [(0.999, False, 0.748), (0.999, True, 0.0), (0.5, True, 0.0)])
def test_the_share_of_initial_weights_in_the_average(decay, warmup, left):
    """What is left of initial weights of 1 once the weights are 0: with a warm-up nothing, also after 290 steps."""
    optim = OptimConfig(ema_decay=decay, ema_warmup=warmup)
    model, average = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double().requires_grad_(False)
    for parameters, value in ((model.parameters(), 0.0), (average.parameters(), 1.0)):
        for p in parameters:
            torch.nn.init.constant_(p, value)
    for step in range(1, 291):
        update_average(average, model, optim.average_decay(step))
        if step in (1, 7, 290):
            assert average.weight.item() == pytest.approx(optim.initial_share(step), abs=1e-12)
    assert optim.initial_share(290) == pytest.approx(left, abs=1e-3)
    assert optim.initial_share(0) == 1 and optim.average_decay(10**6) == decay
    first = [optim.average_decay(step) for step in (1, 2, 8)]
    assert first == [min(decay, d) if warmup else decay for d in (2 / 11, 3 / 12, 9 / 18)]
