"""Freed memory is used again: no new pages for the next tensor of the same size."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
if sys.argv[1] == "reused":
    from autoquant_ray.distributed.host_memory import reuse_freed_memory
    reuse_freed_memory()
import torch
torch.ones(2**24).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    """Pages that eight tensors of 64 MiB, one after the other, make the kernel give."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's allocator of Linux")
def test_freed_memory_is_used_again() -> None:
    assert page_faults("reused") < page_faults("fresh") / 10


HOLES = """
import sys
import torch
from autoquant_ray.distributed.host_memory import trim_heap
def anonymous_mib():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024
for _ in range(2):
    torch.ones(2**22), torch.ones(2**21)  # once freed, they teach glibc what its heap may hold
before, kept = anonymous_mib(), []
for size in range(40):
    large = [torch.ones(2**21 + size * 2**12) for _ in range(2)]
    kept.append(torch.ones(2**10))
    del large
if sys.argv[1] == "trimmed":
    trim_heap()
print(anonymous_mib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_room_between_small_tensors_is_given_back() -> None:
    def grown_mib(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", HOLES, how], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    assert grown_mib("trimmed") <= 2
    assert grown_mib("plain") > 8
