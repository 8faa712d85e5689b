"""The folder of an export: written beside its place, renamed at the end, with the modes of a file
that a person makes."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from autoquant_ray.errors import ConfigError, StoreError, StoreLostError, one_line
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.filesystems import disk_error
from autoquant_ray.runs.names import RUN_FILE


def require_outside_runs(path: Path, given: str, option: str = "out") -> None:
    """Check that something is not written into a run directory, which a new scan would clear.

    Args:
        path: What is to be written.
        given: As it was given, for the error.
        option: Which option it is.

    Raises:
        ConfigError: A folder above it, or itself, is a run.
    """
    resolved = path.resolve()
    for folder in (resolved, *resolved.parents):
        if not (folder / RUN_FILE).is_file():
            continue
        with suppress(StoreError):
            RunDirectory(str(folder)).require_run()
            raise ConfigError(
                f"`{option}` {given} is inside the run {folder}, which holds its own files only; "
                "give a folder outside of it"
            )


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A temporary folder that takes its place when the context ends well, else goes.

    What killed exports to the same place have left is removed first: a living one holds a lock on
    its folder.

    Args:
        target: A new or empty folder.

    Raises:
        StoreError: It cannot be written.
        StoreLostError: The disk is full or fails.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except OSError as error:
        if (lost := disk_error(error, target)) is not None:
            raise StoreLostError(f"{lost}, then start again") from None
        raise StoreError(f"`out` {target} cannot be written: {one_line(error)}") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        _open_up(folder)
        folder.rename(target)
    except Exception as error:
        if (lost := disk_error(error, target)) is not None:
            raise StoreLostError(f"{lost}, then start again") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name[:80]}.exporting-"


def _remove_leftovers(target: Path) -> None:
    for path in target.parent.iterdir():
        if not path.name.startswith(_prefix(target)) or not path.is_dir():
            continue
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue  # of an export that is at work
        finally:
            os.close(lock)


def _open_up(folder: Path) -> None:
    """Give files and folders the modes of new ones; writers of weights make them private."""
    umask = os.umask(0)
    os.umask(umask)
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o777 & ~umask)
        for name in files:
            os.chmod(os.path.join(place, name), 0o666 & ~umask)
