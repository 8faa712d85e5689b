"""Nights of a job, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nights import Scans, make_nightly

from autoquant_ray.compare.nightly import Night, run_night


@pytest.fixture
def scans(make_model: Any, write_run: Any) -> Scans:
    return Scans(make_model, write_run)


@pytest.fixture
def night(tmp_path: Path, scans: Scans) -> Callable[..., Night]:
    """Run the night of a day of November 2026."""

    def run(day: int, scan: Any = scans, keep: int | None = None, **changes: Any) -> Night:
        date = f"2026-11-{day:02d}"
        return run_night(
            make_nightly(**changes), str(tmp_path / "runs"), scan, keep=keep, date=date
        )

    return run
