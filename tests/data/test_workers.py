"""Decoding processes: what they do when they are killed or fail, the parts of large windows, memory, pinned batches."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import tracemalloc

import numpy as np
import psutil
import pytest
import torch
from runs import Run, command

from ebm.data import ShardReader
from ebm.data.items import ArraySource, Conversion
from ebm.data.reader import PART, Workers
from ebm.data.shards import write_shards
from ebm.errors import DataError


def make(path, n=90, side=64):
    images = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return write_shards(ArraySource("test", images, np.arange(n) % 10), path, samples_per_shard=30, progress=False)


def reader(manifest, workers=1, **options) -> ShardReader:
    settings = {"seed": 0, "num_streams": 2, "streams": [0, 1], "per_stream": 4, "window": 40} | options
    return ShardReader(manifest, manifest.shape, workers=workers, **settings)


def drain(one: ShardReader) -> None:
    for _ in range(200):
        next(one)


def blocked(pid: int) -> bool:
    """Whether a thread of a process waits in a write to a pipe."""
    for thread in psutil.Process(pid).threads():
        with open(f"/proc/{pid}/task/{thread.id}/syscall") as file:
            if file.read().split()[0] == "1":  # write, on x86-64
                return True
    return False


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the number of one system call")
def test_a_worker_that_is_killed_in_the_middle_of_a_message(tmp_path):
    one = reader(make(tmp_path, n=300), workers=1, window=300, per_stream=4)
    next(one)
    (worker,) = one._workers._processes
    deadline = time.monotonic() + 20
    while not blocked(worker.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(
        DataError, match=rf"\(pid {worker.pid}\) was killed by signal 9. Out of memory\? Lower data.window"
    ):
        drain(one)
    assert time.monotonic() - start < 10
    one.close()


def test_a_worker_that_is_killed_while_it_is_waited_for(tmp_path):
    one = reader(make(tmp_path))
    next(one)
    (worker,) = one._workers._processes
    os.kill(worker.pid, signal.SIGSTOP)  # whoever reads now waits
    killer = threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(DataError, match="killed by signal 9"):
        drain(one)
    one.close()
    assert not multiprocessing.active_children()


def test_a_run_whose_worker_is_killed_ends_with_code_4_within_seconds(digits, tmp_path):
    arguments = command(1, tmp_path / "run", digits, data__workers=1, train__steps=10**6)
    script = next(i for i, argument in enumerate(arguments) if argument.endswith("train.py"))
    run = Run([sys.executable, *arguments[script:]], tmp_path / "log")
    assert run.until_step(tmp_path / "run", 12)
    rank = psutil.Process(run.process.pid)
    (worker,) = (process for process in rank.children(recursive=True) if process.parent() != rank)
    worker.kill()
    start = time.monotonic()
    assert run.wait(60) == 4
    assert time.monotonic() - start < 30 and "Out of memory?" in run.log.read_text()


def fail(request):
    raise KeyError(request)


def test_what_should_not_happen_in_a_worker_is_raised_with_its_traceback():
    workers = Workers(fail, 1)
    workers.ask(0, "a request")
    with pytest.raises(RuntimeError, match=r"(?s)data worker 0 failed:.*KeyError: 'a request'"):
        workers.take(0)
    workers.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_parts_of_windows_do_not_change_the_sequence(tmp_path, monkeypatch, workers):
    """Seven samples a part, in windows of 40, from wherever a reader goes on."""
    manifest = make(tmp_path, side=8)
    whole = reader(manifest, workers=0)
    batches, positions = [], []
    for _ in range(30):
        positions.append(dict(whole.positions))
        batches.append(next(whole))
    monkeypatch.setattr("ebm.data.reader.PART", 7 * 3 * 8 * 8)
    for start in (0, 5) if workers else (0, 1, 5, 12):
        one = reader(manifest, workers=workers, positions=positions[start])
        for expected in batches[start:]:
            found = next(one)
            assert found.keys == expected.keys and torch.equal(found.images, expected.images)
            assert torch.equal(found.labels, expected.labels)
        assert one.positions == whole.positions
        assert not workers or one._workers is not None
        one.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_window_takes_the_memory_of_its_files_not_of_its_pixels(tmp_path, workers):
    """60 images of 1024 x 1024 in one window, 180 MiB, in small files: this process holds two parts of it at most."""
    ramp = np.add.outer(np.arange(1024), np.arange(1024))
    images = np.stack([(ramp // (i + 4))[..., None].repeat(3, 2).astype(np.uint8) for i in range(12)])

    class Many:
        classes, left_out, origin = None, (), None

        def __len__(self):
            return 60

        def item(self, i):
            return ArraySource("test", images, None).item(i % 12)._replace(key=f"{i:06d}")

    manifest = write_shards(Many(), tmp_path, workers=1, conversion=Conversion(format="jpg"), progress=False)
    for traced in (False, True):  # the first time loads the decoders
        one = reader(manifest, workers, num_streams=1, streams=[0], per_stream=4, window=60)
        if traced:
            tracemalloc.start()
        for _ in range(17):
            next(one)
        one.close()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert PART < peak < 3 * PART, f"{peak >> 20} MiB"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs CUDA")
def test_pinned_batches_are_the_same(tmp_path):
    manifest = make(tmp_path, side=8)
    plain, pinned = reader(manifest, 0), reader(manifest, 0, pin_memory=True)
    for _ in range(5):
        a, b = next(plain), next(pinned)
        assert b.images.is_pinned() and b.labels.is_pinned() and not a.images.is_pinned()
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
