"""No step reads device memory on the host, and none makes a tensor of the device out of numbers of the host.

Both make the host wait for a GPU. Without one, the operations that would wait are looked for by name.
"""

import pytest
import torch
from test_step import VARIANTS, new_state  # noqa: F401 - a fixture
from torch.utils._python_dispatch import TorchDispatchMode

from ebm.training.step import train_step

WAITS = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal")
WAITS_BY_DESIGN = {"energy_matching": "its optimal transport is solved on the host"}


class Refuse(TorchDispatchMode):
    """Records the operations of a step that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WAITS_BY_DESIGN])
def test_no_operation_of_a_step_waits_for_the_device(new_state, variant):  # noqa: F811
    state = new_state(*VARIANTS[variant])
    batches = [next(state.reader) for _ in range(2)]
    train_step(state, batches[0])  # optimizers make their state at the first step
    with Refuse() as mode:
        train_step(state, batches[1])
    assert mode.found == []


def test_the_search_finds_a_read():
    with Refuse() as mode:
        torch.ones(3).sum().item()
        torch.tensor([1.0, 2.0])
    assert mode.found == ["_local_scalar_dense", "lift_fresh"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WAITS_BY_DESIGN])
def test_no_step_waits_on_a_gpu(new_state, variant):  # noqa: F811
    state = new_state(*VARIANTS[variant])
    for _ in range(3):  # a loss is compared with its graph at the first step, and at the first with chains
        train_step(state, next(state.reader))
    batches = [next(state.reader) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(state.skipped_steps) == 0
