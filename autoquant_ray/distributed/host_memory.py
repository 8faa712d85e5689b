"""Settings of the C library's allocator for a process that does nothing but compute on the CPU.

By default glibc gives every large tensor fresh pages and returns them when it is freed, so that the
kernel zeroes gigabytes of pages again and again; on small matrices that costs about a tenth of the
time. ``benchmarks/vs_modelopt.py`` uses the same settings as the workers.

What lies in its heap (tensors of up to 32 MiB) it keeps all the same, the more the more small ones
stay between them: who must be small gives that back with :func:`trim_heap`.
"""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt(3): parameters are numbered in malloc.h; values are C ints.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1

ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Lets torch ask for huge pages; it reads the variable once, when it makes its first tensor."""


def reuse_freed_memory() -> None:
    """Keep freed memory for the next tensor, and use huge pages.

    Call it before torch is imported; it holds for the whole process. Without glibc only the huge
    pages are asked for. Memory that is kept is at most the process's own peak.
    """
    os.environ.update(ENVIRONMENT)
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library keeps it and can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
