"""Settings of the C library's allocator for a process that does nothing but compute on the CPU.

By default glibc gives every large tensor fresh pages and returns them when it is freed, so that the
kernel zeroes gigabytes of pages again and again; on small matrices that costs about a tenth of the
time. ``benchmarks/vs_modelopt.py`` uses the same settings as the workers with a resident model.
Other workers must stay small.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

# mallopt(3): parameters are numbered in malloc.h; values are C ints.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1
_SMALL_BYTES = 2**20

ENVIRONMENT = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Lets torch ask for huge pages; it reads the variable once, when it makes its first tensor."""


def reuse_freed_memory() -> None:
    """Keep freed memory for the next tensor, and use huge pages.

    Call it before torch is imported; it holds for the whole process. Without glibc only the huge
    pages are asked for. Memory that is kept is at most the process's own peak.
    """
    os.environ.update(ENVIRONMENT)
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def return_freed_memory() -> None:
    """Give freed memory back at once: for a process that must stay small, whatever it costs.

    Tensors of 1 MiB or more get pages of their own. glibc would take up to 32 MiB each from its
    heap, where a small tensor that stays keeps the hole of a large one from being filled again.
    """
    mallopt = _mallopt()
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _SMALL_BYTES)


def _mallopt() -> Callable[[int, int], int] | None:
    """The C library's function; None where it has none."""
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return function
