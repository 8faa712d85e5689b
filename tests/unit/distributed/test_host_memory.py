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
