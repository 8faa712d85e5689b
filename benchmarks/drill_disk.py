"""A small disk that fills up or becomes read-only, for the fault drills. Needs root on Linux."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def small_disk(path: Path, size_mib: int = 4) -> Iterator[Path]:
    """A tmpfs.

    Args:
        path: Where to mount it; nothing is there yet.
        size_mib: Its room.

    Raises:
        PermissionError: We may not mount one.
    """
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise PermissionError(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def remount(path: Path, option: str) -> bool:
    """Make it ``ro`` or ``rw``; False while a file is open for writing."""
    command = ["mount", "-o", f"remount,{option}", str(path)]
    return subprocess.run(command, capture_output=True).returncode == 0


def fill(path: Path, but: int) -> None:
    """Write a file that leaves so many bytes of its disk free."""
    status = os.statvfs(path.parent)
    path.write_bytes(b"\0" * (status.f_bavail * status.f_frsize - but))
