"""Decoding processes. Each has a pipe of its own for what it decoded, which ends with it: a process that the kernel
kills, also in the middle of a message, is noticed at once.
"""

import atexit
import fcntl
import os
import queue
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from ebm.errors import DataError
from ebm.runtime.process import init_worker, worker_context

PIPE = 1 << 20  # bytes that a pipe holds, where the system allows it: fewer switches between two processes


class Answer(NamedTuple):
    """What a worker sends: `value` with an array of this shape and type to follow, or an error."""

    value: Any
    shape: tuple[int, ...] | None = None
    dtype: str = ""
    fault: str = ""  # the traceback of what should not happen


class Workers:
    """`count` processes. Each calls `decode(request) -> (value, array or None)` for its requests, one after the other,
    and sends the results in the same order."""

    def __init__(self, decode: Callable[[Any], tuple[Any, np.ndarray | None]], count: int):
        context = worker_context()
        self._processes, self._requests, self._answers = [], [], []
        for _ in range(count):
            requests, ours = context.Pipe(duplex=False)
            answers, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(decode, requests, theirs), daemon=True)
            process.start()
            requests.close()
            theirs.close()  # the last copy is the worker's, so the pipe ends with it
            self._processes.append(process)
            self._requests.append(ours)
            self._answers.append(answers)
        # A process that ends without close() would wait for ever for workers that ignore SIGTERM.
        atexit.register(self._kill)

    def ask(self, worker: int, request: Any) -> None:
        try:
            self._requests[worker].send(request)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._lost(worker) from error

    def take(self, worker: int) -> tuple[Any, np.ndarray | None]:
        """The next result of a worker. Raises DataError where it is gone, RuntimeError where it failed."""
        try:
            answer: Answer = self._answers[worker].recv()
            if answer.fault:
                raise RuntimeError(f"data worker {worker} failed:\n{answer.fault}")
            if answer.shape is None:
                return answer.value, None
            array = np.empty(answer.shape, answer.dtype)
            _read_into(self._answers[worker].fileno(), array)
            return answer.value, array
        except (EOFError, ConnectionResetError) as error:
            raise self._lost(worker) from error

    def close(self) -> None:
        self._kill()
        for process in self._processes:
            process.join(timeout=5)
        for connection in (*self._requests, *self._answers):
            connection.close()
        atexit.unregister(self._kill)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()

    def _lost(self, worker: int) -> DataError:
        process = self._processes[worker]
        process.join(timeout=5)
        code = process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return DataError(
            f"data worker {worker} (pid {process.pid}) {how}. Out of memory? Lower data.window or data.workers"
        )


def _read_into(fd: int, array: np.ndarray) -> None:
    """Fills an array from a pipe. Raises EOFError where the pipe ends before."""
    view = _bytes_of(array)
    while view.nbytes:
        count = os.readv(fd, [view])
        if count == 0:
            raise EOFError
        view = view[count:]


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data)


def _write_from(fd: int, array: np.ndarray) -> None:
    view = _bytes_of(np.ascontiguousarray(array))
    while view.nbytes:
        view = view[os.write(fd, view) :]


def _serve(decode: Callable[[Any], tuple[Any, np.ndarray | None]], requests: Connection, answers: Connection) -> None:
    """A worker's life. A thread sends, so that the next request is decoded while this result waits for its reader."""
    init_worker()
    with suppress(OSError):  # the user may have used up their share of larger pipes
        fcntl.fcntl(answers.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
    results: queue.SimpleQueue[tuple[Answer, np.ndarray | None]] = queue.SimpleQueue()
    threading.Thread(target=_send_all, args=(results, answers), daemon=True).start()
    while True:
        try:
            request = requests.recv()
        except EOFError:  # the reader was closed
            os._exit(0)
        try:
            value, array = decode(request)
            shape, dtype = (None, "") if array is None else (array.shape, array.dtype.str)
            results.put((Answer(value, shape, dtype), array))
            del value, array  # the queue's copies are freed when they are sent
        except MemoryError:
            results.put((Answer(DataError("a data worker ran out of memory; lower data.window")), None))
        except Exception:  # raised in the main process
            results.put((Answer(None, fault=traceback.format_exc()), None))


def _send_all(results: "queue.SimpleQueue[tuple[Answer, np.ndarray | None]]", answers: Connection) -> None:
    try:
        while True:
            answer, array = results.get()
            answers.send(answer)
            if array is not None:
                _write_from(answers.fileno(), array)
            del answer, array
    except OSError:  # the reader is gone, and so is the reason to go on
        os._exit(0)
