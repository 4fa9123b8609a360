"""What a process sets for itself before torch loads: how its threads wait and how it keeps memory."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def prepare_process() -> None:
    """Call before the first import of torch. What the user's environment says already stands."""
    # Idle OpenMP threads sleep instead of spinning: where a core is shared (loader workers, other jobs), spinning makes
    # a chain of small convolutions 10 to 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # glibc takes each large activation from the kernel anew and gives it back: faulting its pages in costs a chain on
    # the CPU a fifth of its time (benchmarks/results/chain.json). Kept, they are used again.
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
