"""The metrics of fresh chains, and how their collapse is told."""

import math

import pytest
import torch
from runs import command, finish, records
from test_step import new_state  # noqa: F401

from ebm.config import load_config
from ebm.data.shards import ensure_shards
from ebm.training.divergence import (
    MAX_HELDOUT_AUC,
    MIN_FRESH_SPREAD,
    ONE_PICTURE,
    FreshReading,
    fresh_signs,
    judged_after,
)
from ebm.training.readings import first_data, relative_spread

# A narrow Gaussian at grey, and chains without noise: all end in the same picture.
COLLAPSED = {
    "energy.kind": "gaussian",
    "energy.std": 0.3,
    "sampler.step_size": 0.03,
    "sampler.noise_scale": 0,
    "sampler.grad_clamp": "null",
    "optim.lr": 1e-6,
}


def test_the_spread_is_a_ratio_of_deviations():
    draws = torch.Generator().manual_seed(0)
    data = torch.randn(4000, 3, 4, 4, generator=draws)
    chains = 0.2 * torch.randn(4000, 3, 4, 4, generator=draws) + torch.randn(3, 4, 4, generator=draws)
    assert relative_spread(chains, data) == pytest.approx(0.2, rel=0.02)
    assert relative_spread(data[:1].expand(9, -1, -1, -1), data) == 0.0


def test_one_picture_under_the_noise_of_its_pixels_is_one_picture():
    """As of 32x32 patches of photographs whose averaged weights were still the initial ones: every chain a cyan field,
    whose pixels differ from chain to chain half as much as photographs do."""
    draws = torch.Generator().manual_seed(0)
    photographs = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4, generator=draws), 32) * 2 - 1
    picture = torch.tensor([-0.9, 0.6, 0.5]).view(3, 1, 1)
    chains = (picture + 0.35 * torch.randn(12, 3, 32, 32, generator=draws)).clamp(-1, 1)
    pixels = chains.var(0).mean().sqrt() / photographs.var(0).mean().sqrt()
    assert pixels > 0.5 and relative_spread(chains, photographs) < ONE_PICTURE
    assert relative_spread(photographs[:32], photographs) > 0.9


def test_fresh_chains_count_once_the_run_is_long_enough():
    config = load_config(None, ["buffer.reinit_prob=0.05", "health.grace=1000"])
    well = FreshReading(spread=1.0, auc=0.5, saturated=0.0, heldout_auc=0.5)
    assert judged_after(config) == 20

    def worst(step: int, **changed: float) -> tuple[float, str]:
        return max((value, name) for name, value in fresh_signs(step, well._replace(**changed), config).items())

    assert not fresh_signs(20, well._replace(spread=0.0), config)
    assert worst(21, spread=ONE_PICTURE / 2) == (pytest.approx(2), "fresh chains are nearly the same picture")
    assert worst(21, spread=MIN_FRESH_SPREAD / 2, auc=0.0, saturated=1.0)[0] < 1  # chains run past the data at first
    assert worst(21)[0] < 1 < worst(21, spread=math.nan)[0]
    assert worst(1001)[0] < 1
    assert worst(1001, spread=MIN_FRESH_SPREAD / 2) == (pytest.approx(2), "fresh chains are alike")
    assert worst(1001, auc=0.0) == (2.0, "fresh chains lie below all data")
    assert worst(1001, auc=1.0) == (2.0, "fresh chains lie above all data")
    assert worst(1001, saturated=2 * config.health.max_saturated) == (2.0, "fresh chains at the bounds")
    remembers = (pytest.approx(1), "the energy remembers its training data")
    assert worst(1001, heldout_auc=MAX_HELDOUT_AUC) == remembers
    assert judged_after(load_config(None, ["optim.warmup_steps=300"])) == 300
    assert judged_after(load_config(None, ["buffer.reinit_prob=0"])) == 0


def test_the_data_of_a_panel_are_the_first_of_each_stream(new_state):  # noqa: F811
    state = new_state("tracking.num_samples=8")
    batch = next(state.reader)
    data, labels = first_data(state, batch)
    each, streams = len(batch.images) // state.config.data.streams, state.config.data.streams
    places = [v * each + i for v in range(streams) for i in range(-(-8 // streams))]
    assert torch.equal(labels, batch.labels[places])
    assert torch.equal(((data + 1) * 127.5).round(), batch.images[places].float())


def test_a_collapsed_run_says_so(tmp_path):
    ensure_shards(str(tmp_path / "shards"), "digits", "train")
    settings = {key.replace(".", "__"): value for key, value in COLLAPSED.items()}
    settings |= {"train__steps": 45, "train__log_every": 15, "buffer__reinit_prob": 0.04}
    settings |= {"tracking__samples_every": 20, "tracking__sample_steps": 50}
    arguments = command(1, tmp_path / "run", tmp_path / "shards", **settings)
    log = finish([a for a in arguments if not a.startswith(("energy.features", "energy.hidden"))], tmp_path / "log")
    rows = {row["step"]: row for row in records(tmp_path / "run" / "metrics.jsonl")}
    assert list(rows) == [15, 20, 30, 40, 45]  # a panel has a line of its own
    assert [step for step, row in rows.items() if "fresh/spread" in row] == [20, 40, 45]
    assert all(rows[step]["fresh/spread"] < 1e-3 for step in (20, 40, 45))
    assert rows[20]["fresh/auc"] == 0.0 and rows[20]["fresh/saturated"] == 0.0
    assert rows[20]["fresh/energy_mean"] == pytest.approx(0, abs=0.05)
    assert rows[20]["health/warning"] < 1000 < rows[40]["health/warning"]
    assert rows[30]["health/warning"] < 1000
    assert log.count("fresh chains are nearly the same picture") == 2
    assert log.count("too early to judge by fresh chains before step 26") == 1
    heldout = [row["heldout/auc"] for row in rows.values() if "heldout/auc" in row]
    assert len(heldout) == 3 and all(0.1 < auc < 0.9 for auc in heldout)  # this energy knows no training data
    assert all(math.isfinite(rows[step]["heldout/energy_mean"]) for step in (20, 40, 45))
    assert all(row["perf/images_per_s"] > 0 for row in rows.values())
