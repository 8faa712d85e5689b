"""The raylet of the cluster that a command started for itself is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

SLOW = ("--shard-samples", "1", "--label-draws", "12", "--workers", "1")


def test_scan_whose_node_dies_says_so_and_goes_on_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_command: Any,
    run_command: Any,
    scan_arguments: Any,
    watch: Any,
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = run_command(*scan_arguments(whole, *SLOW))
    assert done.returncode == 0, done.stderr
    for name, value in {"period_ms": 500, "timeout_ms": 10_000, "failure_threshold": 2}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))  # as other tests do without
    # Workers that import for long: once it has some, Ray ends a driver without a node by itself.
    words = scan_arguments(run, *SLOW, "--address", "local")
    with start_command(*words, ray_is_warm=False) as scan:
        watch.wait_for(lambda: watch.events(run, "stage_started")[1:], scan)
        (raylet,) = (p for p in psutil.Process(scan.pid).children() if p.name() == "raylet")
        raylet.kill()
        _, stderr = scan.communicate()
    assert scan.returncode == 2, stderr
    (error,) = (line for line in stderr.splitlines() if line.startswith("error: "))
    assert "the Ray node of this command has died" in error
    assert "--resume" in error
    assert not (run / ".lock").exists()

    done = run_command(*scan_arguments(run, *SLOW, "--resume"))
    assert done.returncode == 0, done.stderr
    assert (run / "sensitivity.parquet").read_bytes() == (
        whole / "sensitivity.parquet"
    ).read_bytes()
