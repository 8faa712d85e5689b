"""``history.parquet`` of a folder of runs: one row per run, whichever job made it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from autoquant_ray.errors import HeldError, StoreError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.lease import lease
from autoquant_ray.runs.names import HISTORY_FILE, RUN_FILE

LOCKS = ".locks"
"""Folder of the leases: one folder per job, and one for the history (no job's name has a '_')."""

_HISTORY_LOCK = f"{LOCKS}/_history"
_TRIES = 40
_PAUSE_S = 0.5


def read_history(folder: RunDirectory) -> list[dict[str, Any]]:
    """Rows, oldest date first; empty where there is no history yet.

    Raises:
        StoreError: The file is damaged, or not ours.
    """
    if not folder.exists(HISTORY_FILE):
        return []
    rows: list[dict[str, Any]] = folder.read_table(HISTORY_FILE).to_pylist()
    return rows


def put_row(folder: RunDirectory, row: Mapping[str, Any]) -> None:
    """Add a run's row, or replace the one that it has.

    Raises:
        HeldError: Other jobs kept the file busy for longer than a moment.
        StoreError: The file is damaged or cannot be written.
    """
    for attempt in range(_TRIES):
        try:
            with lease(folder, _HISTORY_LOCK):
                rows = [other for other in read_history(folder) if other["run"] != row["run"]]
                rows = sorted([*rows, dict(row)], key=lambda night: (night["date"], night["run"]))
                folder.write_table(HISTORY_FILE, rows)
                return
        except HeldError:
            if attempt == _TRIES - 1:
                raise
        time.sleep(_PAUSE_S)


def run_folder(folder: RunDirectory, name: str) -> RunDirectory:
    """The run of that name inside the folder."""
    return folder.child(name)


def is_run(directory: RunDirectory) -> bool:
    """Whether a directory holds a run of ours."""
    try:
        directory.require_run()
    except StoreError:
        return False
    return True


def require_runs_folder(folder: RunDirectory) -> None:
    """Check, before anything is written, that a folder is one of runs, empty, or not there yet.

    Raises:
        StoreError: It holds other things.
    """
    if folder.exists(RUN_FILE):
        raise StoreError(f"{folder.uri} is a run itself; give the folder that holds the runs")
    files, folders = folder.list_files(""), folder.list_folders("")
    if HISTORY_FILE in files:
        try:
            read_history(folder)
        except StoreError as error:
            raise StoreError(
                f"{folder.uri} is not a folder of runs: its {HISTORY_FILE} is not ours ({error}); "
                "give another folder"
            ) from None
        return
    # A night that ended before it wrote anything has left an empty folder, or its lock.
    folders = [name for name in folders if run_folder(folder, name).exists()]
    names = [name for name in [*files, *folders] if not name.startswith(".")]
    if names and not any(is_run(run_folder(folder, name)) for name in folders):
        raise StoreError(
            f"{folder.uri} is not a folder of runs: it holds {names[0]!r}, and neither a run nor "
            f"{HISTORY_FILE}; give an empty or a new folder"
        )
