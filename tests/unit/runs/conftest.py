"""A finished run with every file of the contract."""

from __future__ import annotations

from typing import Any

import pytest

from autoquant_ray.allocate.options import SolveOptions
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.solve import solve_run


@pytest.fixture
def finished(make_run: Any) -> RunDirectory:
    """A run with every file of the contract: the scan's own solution and one at 6 bits."""
    directory: RunDirectory = make_run()
    maxima = [{"module": "lm_head", "statistic": "input_amax", "value": 1.5}]
    directory.write_table("calibration.parquet", maxima)
    solve_run(directory, SolveOptions(bits=8), folder="")
    solve_run(directory, SolveOptions(bits=6))
    return directory
