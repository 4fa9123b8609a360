"""What a process sets up for itself: threads and memory before torch loads, its log, its workers, its exit code."""

import ctypes
import logging
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from ebm.errors import ConfigError, UserError, printable
from ebm.runtime.files import replace

if TYPE_CHECKING:
    import torch

EXIT_CODE = "exit_code"  # the file of a run directory that holds what its last start ended with
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def prepare_process() -> None:
    """Call before the first import of torch. What the user's environment says already stands."""
    # Idle OpenMP threads sleep instead of spinning: where a core is shared (loader workers, other jobs), spinning makes
    # a chain of small convolutions 10 to 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # cuBLAS gives the same bits every time only with workspaces of its own, and reads this when CUDA starts (NVIDIA's
    # "cuBLAS: results reproducibility"). It costs 32 MiB of GPU memory.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # glibc takes each large activation from the kernel anew and gives it back: faulting its pages in costs a chain on
    # the CPU a fifth of its time (benchmarks/results/chain.json). Kept, they are used again.
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class _Lines(logging.Handler):
    """Writes messages as plain lines to stdout, or to stderr. Output that can't be written (a log file on a full disk,
    a pipe that nobody reads any more) is lost: no message may end a run."""

    def __init__(self, to_stderr: bool):
        super().__init__()
        self._to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if self._to_stderr else sys.stdout
        try:
            tqdm.write(printable(self.format(record)), file=stream)  # above a progress bar, where there is one
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed, or can't encode the text
            pass


def configure_logging(rank: int | None = None) -> None:
    """Show what the library logs.

    `rank`: of a training process, whose log is its output on stdout: rank 0 shows INFO and above, any other WARNING and
    above, with its rank before them. None: a command that prints its result; warnings go to stderr. With EBM_LOG=debug
    in the environment every process shows everything."""
    debug = os.environ.get("EBM_LOG", "").lower() == "debug"
    handler = _Lines(to_stderr=rank is None)
    handler.setLevel(logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING)
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    logger = logging.getLogger("ebm")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.handlers = [handler, *(other for other in logger.handlers if not isinstance(other, _Lines))]


def show_error(error: UserError) -> None:
    """Tell the user on stderr, if it can still be written, what a command ended with."""
    with suppress(OSError, ValueError):
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)


def flush_output() -> None:
    """Call last in a process. Output that can't be written is dropped here; the interpreter's own flush would replace
    the exit code by 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Drop what `stream` still holds."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # a stream without a file, or a closed one: nothing is left to flush
        pass


# The main process decides when to stop. A batch system signals every process of a job, and so does a terminal that
# closes; workers that died at once would take the data from under the step that is still to be finished and saved.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

SOCKET_PATH = 107  # bytes that the path of a socket may have on Linux
SOCKET_NAME = len("/pymp-12345678/listener-12345678")  # what multiprocessing puts after TMPDIR


def worker_context() -> ForkServerContext:
    """Returns a context to start workers with. Its fork server begins to load now; plain fork is no choice, since the
    training process has threads and perhaps CUDA. The server starts with STOP_SIGNALS blocked, which it and its workers
    inherit. Raises ConfigError where it can't be started."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) + SOCKET_NAME > SOCKET_PATH:
        raise ConfigError(
            f"TMPDIR={folder}: longer than {SOCKET_PATH - SOCKET_NAME} bytes, too long for the sockets of worker "
            "processes; set TMPDIR to a shorter path, such as /tmp"
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ebm.data.reader", "ebm.data.shards"])
    with signals_blocked():
        resource_tracker.ensure_running()  # unblocks some of them itself, so it goes first
    with signals_blocked():
        forkserver.ensure_running()
    return context


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes that are started within the block do not get STOP_SIGNALS."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(number: int = 0) -> None:
    """Prepare a worker process: it uses one thread, ignores STOP_SIGNALS, and ends when the main process does."""
    import torch  # prepare_process, above, comes before it

    torch.set_num_threads(1)
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one CPU thread within the block. For small tensors, waking other threads takes longer than the work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def to_device(x: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Returns `x` on `device`. To a GPU it is copied from pinned memory, without a wait of the host, on a stream of
    its own: the host is ahead of the device, so a batch is copied while the step before it is still computed."""
    if device.type != "cuda":
        return x.to(device)
    import torch

    stream, current = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copy = x.pin_memory().to(device, non_blocking=True)
    current.wait_stream(stream)
    copy.record_stream(current)  # its memory is the copies' stream's, which must not use it again before `current` has
    return copy


@cache
def _copy_stream(device: "torch.device") -> "torch.cuda.Stream":
    import torch

    return torch.cuda.Stream(device)


def leave_code(code: int, run_dir: Path | None = None) -> bool:
    """Write an exit code that says what to do to `run_dir`/exit_code and to EBM_EXIT_FILE, for scripts: launchers turn
    every code but 0 into 1. Call it as soon as the code is known, since what follows may hang or be killed.

    `run_dir`: only of a run that this process owns. Returns whether the file in it was written."""
    if code == 1:  # a crash, which another start may get over: no file
        return False
    line, own = f"{code}\n", None if run_dir is None else run_dir / EXIT_CODE
    file = os.environ.get("EBM_EXIT_FILE")
    # In launch/train.sbatch the scripts' file is the run's own, which is never to be seen half written.
    if file and (own is None or os.path.realpath(file) != os.path.realpath(own)):
        with suppress(OSError):
            Path(file).write_text(line)
    if own is None:
        return False
    try:
        replace(own, line.encode())  # whole: every rank writes it, and reads it next
        return own.read_text() == line
    except OSError:
        return False


def under_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether `accelerate launch` or torchrun started this process. To these, any code but 0 is a crash, which
    they answer with a traceback and exit code 1, or with a restart."""
    return "ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment
