"""The step size in use has one owner: what adapts, times what divergence has left of it, wherever it is used."""

import pytest
import torch
from test_step import advance, new_state  # noqa: F401 - a fixture

from ebm.inference.run import open_run
from ebm.runtime.checkpoint import Saver
from ebm.runtime.run_directory import RunDirectory
from ebm.training import readings
from ebm.training.readings import read_health
from ebm.training.state import snapshot
from ebm.training.step import train_step

ADAPTIVE = {
    "mala": ["sampler.kind=mala", "sampler.num_steps=2"],
    "hmc": ["sampler.kind=hmc", "sampler.num_steps=2"],
    "tempering": ["sampler.kind=tempering", "sampler.num_steps=2"],
}


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_cut_shortens_the_steps_of_a_sampler_that_adapts_them(new_state, kind):  # noqa: F811
    moved = []
    for scale in (1.0, 0.01):
        state = advance(new_state(*ADAPTIVE[kind]), 1)
        state.divergence.step_scale = scale
        adapted = state.adapted_step.item()
        assert state.chain()[1]["step_size"].item() == pytest.approx(scale * adapted)
        assert state.sampler_in_use().step_size == pytest.approx(scale * adapted)
        result = train_step(state, next(state.reader))
        moved.append(result.scalars["sampler/displacement"].item())
        assert scale == 1 or state.adapted_step.item() <= adapted, "a step that was cut does not grow back"
    if kind != "tempering":  # whose swaps move a replica as far as ever
        ratio = 0.01 if kind == "hmc" else 0.1  # lengths of x; for mala squares of them
        assert moved[1] / moved[0] == pytest.approx(ratio, rel=0.5)


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_drift_and_a_run_opened_for_use_have_the_step_in_use(new_state, kind):  # noqa: F811
    state = new_state(*ADAPTIVE[kind], "health.grace=0")
    state.adapted_step.fill_(2e-3)
    state.divergence.step_scale = 0.5
    result = train_step(state, next(state.reader))
    step = 0.5 * state.adapted_step.item()
    last_step = step**2 / 2 if kind == "hmc" else step
    expected = last_step * result.scalars["sampler/grad_norm"].item() / 8 / 2
    assert read_health(state, result).chains.drift == pytest.approx(expected, rel=1e-5)

    run = RunDirectory(state.config, state.world)
    saver = Saver(run.checkpoints, state.world)
    saver.start(state.step, *snapshot(state))
    assert saver.finish(keep=1)
    assert open_run(run.path).config.sampler.step_size == pytest.approx(step)


class Panels:
    """Keeps what `readings.panels` gives to a tracker."""

    def panels(self, step, samples, captions, further):
        self.samples = samples

    def histograms(self, step, values):
        pass


@pytest.mark.parametrize("variant", [["train.mixed_precision=bf16"], ADAPTIVE["mala"]])
def test_pictures_show_what_ebm_sample_draws(new_state, variant):  # noqa: F811
    """In float32, at any precision of training (fp16 gradients would vanish), with the step size in use."""
    state = new_state(*variant, "tracking.num_samples=8", "tracking.sample_steps=20")
    if state.adapted_step is not None:
        state.adapted_step.fill_(3e-4)
    batch = next(state.reader)
    result = train_step(state, batch)
    run = RunDirectory(state.config, state.world)
    saver = Saver(run.checkpoints, state.world)
    saver.start(state.step, *snapshot(state))
    assert saver.finish(keep=1)
    shown = Panels()
    readings.panels(state, batch, result, shown, heldout=None)
    drawn = open_run(run.path).sample(8, steps=20, seed=state.config.run.seed + state.step)
    assert torch.equal(shown.samples["samples/fresh"], drawn)
