"""One thread a test process: small tensors gain nothing from more, and every machine then adds in the same order."""

import logging
import signal

import pytest
import torch

torch.set_num_threads(1)

# A shell ignores these for what it starts in the background, and so does nohup; the tests' runs would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Folders and files whose tests take longest, most of them waiting for processes that they start.
LONG = (
    *("launch", "test_kinds", "test_losses_mutations", "runtime", "training", "tracking", "test_gpu_kit"),
    *("test_benchmarks", "commands", "report", "data", "inference", "evaluation"),
)


def pytest_collection_modifyitems(items):
    """Long files begin first, so that none runs alone at the end while the other workers have nothing to do."""

    def place(item) -> int:
        names = {item.path.parent.name, item.path.stem}
        return min((LONG.index(name) for name in names if name in LONG), default=len(LONG))

    items.sort(key=place)


@pytest.fixture
def shown(caplog, capsys):
    """What the process logs, as rank 0 shows it: the output since the last call."""
    from ebm.runtime.process import configure_logging

    logger = logging.getLogger("ebm")
    before = logger.handlers, logger.level
    configure_logging(0)
    yield lambda: capsys.readouterr().out
    logger.handlers, logger.level = before


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache directory, of the tests and the processes that they start: rulers are kept there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Shards of the training digits, to be read alone."""
    from ebm.data.shards import ensure_shards

    path = tmp_path_factory.mktemp("digits") / "train"
    ensure_shards(str(path), "digits", "train")
    return path
