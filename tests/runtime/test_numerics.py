"""How exactly a GPU computes is set by two keys, for training and for inference; nothing is set on a CPU."""

import os

import pytest
import torch

from ebm.runtime.distributed import set_numerics
from ebm.runtime.process import prepare_process


def flags():
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "matmul": torch.get_float32_matmul_precision(),
        "convolutions": torch.backends.cudnn.allow_tf32,
    }


@pytest.fixture
def restored():
    before, filled = flags(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before["algorithms"])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before["cudnn"], before["benchmark"]
    torch.set_float32_matmul_precision(before["matmul"])
    torch.backends.cudnn.allow_tf32 = before["convolutions"]
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_both_keys_on_a_gpu(exact, tf32):
    set_numerics(torch.device("cuda"), exact, tf32)
    precision = "high" if tf32 else "highest"
    expected = {"algorithms": exact, "cudnn": exact, "benchmark": not exact, "matmul": precision, "convolutions": tf32}
    assert flags() == expected
    assert torch.is_deterministic_algorithms_warn_only_enabled()  # a user's operation may have no other kind


def test_a_cpu_is_left_alone():
    before = flags()
    set_numerics(torch.device("cpu"), True, True)
    assert flags() == before


def test_the_workspace_of_cublas_is_set_unless_the_user_did(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # so that nothing else of this process changes
    prepare_process()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_process()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
