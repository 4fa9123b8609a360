"""One thread a test process: small tensors gain nothing from more, and every machine then adds in the same order."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Shards of the training digits, to be read alone."""
    from ebm.data.shards import ensure_shards

    path = tmp_path_factory.mktemp("digits") / "train"
    ensure_shards(str(path), "digits", "train")
    return path
