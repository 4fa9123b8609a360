"""The estimate of --dry-run, beside the operations that a real step counts."""

import pytest
import torch
from safetensors.torch import save_file
from test_step import VARIANTS, new_state  # noqa: F401 - a fixture

from ebm.config import load_config
from ebm.energies import UNetEnergyFunction
from ebm.training.cost import FlopCounter, chain_ages, estimate, flops, measure_cost, oldest_chains
from ebm.training.step import train_step

KINDS = {
    name: VARIANTS[name]
    for name in (
        "default",
        "conditional",
        "tempering",
        "hmc",
        "mala",
        "jem",
        "recovery",
        "recovery_levels",
        "noise_levels",
    )
}
KINDS |= {name: VARIANTS[name] for name in ("sliced", "denoising", "noise_contrastive", "energy_discrepancy")}
KINDS["noise_levels"] = [*VARIANTS["noise_levels"], "loss.warmup_steps=0"]
KINDS["score_matching_exact"] = ["loss.kind=score_matching", "loss.method=exact"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_costs_what_it_is_said_to(new_state, kind):  # noqa: F811
    state = new_state(*KINDS[kind], "train.batch_size=16", "data.streams=4")
    cost = measure_cost(state.config)
    batch = next(state.reader)
    with FlopCounter() as counter:
        train_step(state, batch)
    assert (cost.chain + cost.loss) * 16 == pytest.approx(counter.total, rel=0.05)
    assert (cost.chain > 0) == (state.buffer is not None or kind.startswith("recovery"))
    assert "(0% in the chain)" in estimate(state.config)["step"] or cost.chain


def test_a_field_costs_its_forward(new_state, tmp_path):  # noqa: F811
    """On a datum each; the real step counts the same."""
    field = UNetEnergyFunction(1, 8, 8, (4, 8))
    save_file(field.state_dict(), tmp_path / "field.safetensors")
    settings = ["energy.kind=unet", "energy.features=[4,8]", "loss.kind=equilibrium", "train.batch_size=16"]
    plain = measure_cost(new_state(*settings).config)
    state = new_state(*settings, f"loss.field={tmp_path}/field.safetensors")
    cost = measure_cost(state.config)
    assert cost.loss - plain.loss == pytest.approx(flops(lambda: field.field(torch.zeros(1, 1, 8, 8))), rel=0.01)
    batch = next(state.reader)
    with FlopCounter() as counter:
        train_step(state, batch)
    assert cost.loss * 16 == pytest.approx(counter.total, rel=0.05)


def test_the_age_of_chains_is_told(new_state):  # noqa: F811
    """A run of 60 steps, 2 of them without chains, that move 64 of 256 chains by 2 steps each."""
    config = new_state(*VARIANTS["noise_levels"]).config
    assert oldest_chains(config) == 58 * 2 * 64 // 256
    assert estimate(config)["age of its chains"] == "up to 29 steps at the end of the run"
    assert estimate(config)["replay buffer"].startswith("256 chains, ")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("buffer.size=480", "up to 32 steps at the end of the run"),  # restarts after 2 / .05 = 40
        ("buffer.size=384", "up to 40 steps at the end of the run"),
        ("buffer.size=256", "up to 60 steps at the end of the run; a chain restarts after 40 on average"),
        ("buffer.size=auto buffer.age=38", "up to 38 steps at the end of the run"),  # 404 chains
        ("buffer.size=256 buffer.reinit_prob=0", "up to 60 steps at the end of the run"),
        (  # probabilities that fall from .1 to .025, whose mean is .075 / ln 4
            "buffer.size=256 buffer.reinit_spread=4 buffer.reinit_prob=.0542",
            "up to 60 steps at the end of the run; a chain restarts after 20 (first slot) to 80 (last) on average",
        ),
    ],
)  # fmt: skip
def test_restarts_are_told_where_they_come_first(settings, told):
    """A run of 120 steps that move 64 chains by 2 steps each."""
    given = ["train.steps=120", "train.batch_size=64", "sampler.num_steps=2", "buffer.reinit_prob=.05"]
    assert chain_ages(load_config(None, [*given, *settings.split()])) == told


def test_the_cost_does_not_depend_on_a_global_generator(new_state):  # noqa: F811
    before = torch.get_rng_state()
    measure_cost(new_state().config)
    assert torch.equal(torch.get_rng_state(), before)
