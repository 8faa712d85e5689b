"""Two drivers that start on one run at the same moment: the lease lets one of them work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_of_two_drivers_started_together_one_scans(
    flag: str, tmp_path: Path, start_command: Any, run_command: Any, scan_arguments: Any, watch: Any
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = run_command(*scan_arguments(whole))
    assert done.returncode == 0, done.stderr
    words = scan_arguments(run, flag)
    with start_command(*words) as first, start_command(*words) as second:
        ends = [scan.communicate()[1] for scan in (first, second)]
    refused = [
        stderr for scan, stderr in zip((first, second), ends, strict=True) if scan.returncode
    ]
    assert sorted([first.returncode, second.returncode]) in ([0, 2], [0, 0]), ends
    for stderr in refused:
        last = stderr.splitlines()[-1]
        assert "is in use by process" in last or "exists already" in last, stderr
    assert (run / "sensitivity.parquet").read_bytes() == (
        whole / "sensitivity.parquet"
    ).read_bytes()
    scored = watch.scored(run)
    assert sorted(scored) == sorted(set(scored))  # nothing was done twice
    assert not (run / ".lock").exists()
