"""Worker processes: a fork server that imports torch once, and that outlives the signals of a batch system."""

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker

import torch

# The main process decides when to stop: a batch system signals every process of a job, and workers that died at once
# would take the data from under the step that is still to be finished and saved.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def worker_context() -> multiprocessing.context.BaseContext:
    """A context to start workers with; its fork server begins to load now. Not fork: the training process has threads
    and perhaps CUDA. The server starts with SIGNALS blocked, which it and its workers inherit."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ebm.data.reader", "ebm.data.shards"])
    with _blocked():
        resource_tracker.ensure_running()  # unblocks some of them itself, so it goes first
    with _blocked():
        forkserver.ensure_running()
    return context


@contextmanager
def _blocked():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(number: int = 0) -> None:
    """Called first in a worker: one thread, deaf to SIGNALS, and gone when the main process is."""
    torch.set_num_threads(1)
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
