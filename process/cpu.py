"""What makes work on a CPU faster: memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(keep: bool = True) -> None:
    """From now on, memory that tensors free stays with this process, for the next ones; to be called when the weights are there.

    A step frees and takes the same gigabytes again, and a page that is new costs many times the arithmetic on it.
    benchmarks/RESULTS.md has figures. Does nothing where the C library is not glibc.

    keep: False brings back glibc's own way
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0 if keep else 65536)  # large tensors from the heap, too
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 128 * 1024)  # which never shrinks
