"""The estimate of --dry-run, beside the operations that a real step counts."""

import pytest
import torch
from test_step import VARIANTS, new_state  # noqa: F401 - a fixture

from ebm.training.cost import FlopCounter, estimate, measure_cost, oldest_chains
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


def test_the_age_of_chains_is_told(new_state):  # noqa: F811
    """A run of 60 steps, 2 of them without chains, that move 64 of 256 chains by 2 steps each."""
    config = new_state(*VARIANTS["noise_levels"]).config
    assert oldest_chains(config) == 58 * 2 * 64 // 256
    assert estimate(config)["age of its chains"] == "up to 29 steps at the end of the run"


def test_the_cost_does_not_depend_on_a_global_generator(new_state):  # noqa: F811
    before = torch.get_rng_state()
    measure_cost(new_state().config)
    assert torch.equal(torch.get_rng_state(), before)
