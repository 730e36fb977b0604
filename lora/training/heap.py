"""glibc settings that keep the memory a step frees in the process, for the next step.

By default glibc returns freed memory beyond 64 MB to the system after every training step on a CPU,
and gets it back page by page: some 70,000 page faults a step of SmolLM2-135M, 6 % of its time.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MAX_FROM_HEAP_BYTES = 32 * 2**20
"""The most that glibc allows; larger tensors are mapped by the kernel each time."""
DEFAULT_TRIM_BYTES = 64 * 2**20
"""What glibc's own dynamic threshold arrives at."""
MAX_RETAINED_BYTES = 2**31 - 1


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Inside the context freed memory stays with the process; afterwards it is returned.

    Does nothing where the C library is not glibc. Peak memory does not grow.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, MAX_FROM_HEAP_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, MAX_RETAINED_BYTES)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_BYTES)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
