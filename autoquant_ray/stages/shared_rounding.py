"""A run's fitted weights, as workers get them: where to read each layer's, and no codes."""

from __future__ import annotations

from dataclasses import replace

from autoquant_ray.calibrate.stored_rounding import StoredRounding
from autoquant_ray.distributed.shared_tables import SharedTables, all_on_this_machine
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.runs.directory import RunDirectory


def for_workers(directory: RunDirectory, calibration: Calibration) -> Calibration:
    """A calibration whose fitted weights every worker can read.

    From the run's file, where that is on the disk of the only machine; else from Ray's object
    store, a table for each layer.

    Args:
        directory: The run.
        calibration: Of the run; keep what is returned until the workers are done.
    """
    rounding = calibration.rounding
    if not isinstance(rounding, StoredRounding):
        return calibration
    if directory.is_local and all_on_this_machine():
        return calibration
    tables = SharedTables.of(map(rounding.read, range(1 + max(rounding.groups, default=-1))))
    return replace(calibration, rounding=rounding.at(tables))
