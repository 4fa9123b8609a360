"""Diagnostics against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebm.evaluation.metrics import auc
from ebm.training.state import Meters

levels = st.lists(st.integers(-4, 4), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(levels, levels)
def test_auc_is_the_share_of_pairs(pos, neg):
    """Few levels, so many ties."""
    pairs = [1.0 if n > p else 0.5 if n == p else 0.0 for p in pos for n in neg]
    value = auc(torch.tensor(pos, dtype=torch.float32), torch.tensor(neg, dtype=torch.float32))
    assert value.ndim == 0 and value.item() == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_at_its_ends():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0])
    assert auc(low, high) == 1 and auc(high, low) == 0 and auc(low, low) == 0.5
    assert auc(low.flip(0), torch.stack([high, high], 1)[:, 0]) == 1  # unsorted, strided


def test_auc_of_large_batches_is_exact():
    """Ranks of large batches don't fit in float32."""
    n = 5000
    assert auc(torch.arange(0, 2 * n, 2.0), torch.arange(1, 2 * n, 2.0)).item() == (n + 1) / (2 * n)


class OneProcess:
    """A world of one rank, whose mean over the ranks is the value."""

    @staticmethod
    def mean(values):
        return values


class TwoProcesses:
    """As seen by the one rank of two: the other holds the same means plus 2."""

    @staticmethod
    def mean(values):
        return (values + values + 2) / 2


def test_meters_are_means_over_steps():
    meters = Meters()
    for step in range(1, 5):
        meters.add({"a": torch.tensor(float(step)), "b": torch.tensor(10.0 * step, dtype=torch.float64)})
    assert meters.read(OneProcess) == {"a": 2.5, "b": 25.0}
    meters.add({"a": torch.tensor(7.0)})
    assert meters.read(OneProcess) == {"a": 7.0}  # it started over
    for _ in range(3):
        meters.add({"a": torch.tensor(1.0)})
    assert meters.read(TwoProcesses) == {"a": 2.0}


def test_meters_count_each_name_apart():
    meters = Meters()
    for step in range(4):
        meters.add({"a": torch.tensor(1.0)} | ({"b": torch.tensor(3.0)} if step == 3 else {}))
    assert meters.read(OneProcess) == {"a": 1.0, "b": 3.0}


def test_meters_keep_no_hold_on_what_they_are_given():
    meters, value = Meters(), torch.tensor(1.0)
    meters.add({"a": value})
    value.fill_(100.0)
    meters.add({"a": torch.tensor(3.0)})
    assert meters.read(OneProcess) == {"a": 2.0}


def test_meters_show_a_non_finite_step():
    meters = Meters()
    meters.add({"a": torch.tensor(torch.nan)})
    meters.add({"a": torch.tensor(1.0)})
    assert torch.tensor(meters.read(OneProcess)["a"]).isnan()
