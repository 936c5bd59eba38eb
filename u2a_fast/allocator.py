"""glibc's allocator, told to keep what a step frees until the work is done.

By default it gives large blocks and the end of its heap back to the system, and the next step faults the same pages
in again: 38,000 faults and 5 to 7% of a step of ViT-B + BERT-base on two cores, more of a single block.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER = -1
LARGE = 2**30  # larger blocks are mapped by themselves
GROWN = 2**25  # what the thresholds of glibc grow to by themselves, and the most that it took before 2.35
CHOSEN = frozenset({"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"})

_lock = threading.Lock()
_within = 0  # how many ask for it: the allocator is one for all threads


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory within, and give it back behind the outermost; also a decorator.

    Nothing is done without glibc, or where the environment has chosen otherwise. The peak is that of the largest step.

    >>> with keep_freed_memory():
    ...     total = sum(range(10))
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt = getattr(libc, "mallopt", None)
    if libc is None or mallopt is None or CHOSEN & os.environ.keys():
        yield
        return
    global _within
    with _lock:
        _within += 1
        if _within == 1:
            if not mallopt(M_MMAP_THRESHOLD, LARGE):
                mallopt(M_MMAP_THRESHOLD, GROWN)
            mallopt(M_TRIM_THRESHOLD, NEVER)
    try:
        yield
    finally:
        with _lock:
            _within -= 1
            if _within == 0:
                mallopt(M_MMAP_THRESHOLD, GROWN)
                mallopt(M_TRIM_THRESHOLD, 2 * GROWN)
                libc.malloc_trim(0)
