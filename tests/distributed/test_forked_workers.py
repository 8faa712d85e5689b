"""A command's own cluster forks its workers: same bytes, same replacements, nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

FILES = ("calibration.parquet", "sensitivity.parquet", "resampling.parquet", "manifest.parquet")


def contents(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in FILES]


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> list[bytes]:
    """What workers of a cluster that others started write."""
    run: Path = tmp_path_factory.mktemp("cluster") / "run"
    done = run_command(*scan_arguments(run))
    assert done.returncode == 0, done.stderr
    return contents(run)


@pytest.fixture
def start(tmp_path: Path, start_command: Any, scan_arguments: Any) -> Any:
    """Start a scan with a cluster of its own; nothing but this package forks its workers."""

    def start_scan(*extra: Any) -> Any:
        arguments = scan_arguments(tmp_path / "run", "--address", "local", *extra)
        return start_command(*arguments, ray_is_warm=False)

    return start_scan


def test_workers_are_forked_and_write_the_same_bytes(
    tmp_path: Path, start: Any, watch: Any, expected: list[bytes]
) -> None:
    run = tmp_path / "run"
    with start() as scan:
        watch.wait_for(lambda: watch.events(run, "worker_ready"), scan)
        worker = psutil.Process(watch.events(run, "worker_ready")[0]["pid"])
        ancestors = [parent.pid for parent in worker.parents()]
        _, stderr = scan.communicate()
    assert scan.returncode == 0, stderr
    assert ancestors[1] == scan.pid  # the raylet's workers are further away
    assert contents(run) == expected


def test_killed_worker_is_replaced(
    tmp_path: Path, start: Any, watch: Any, expected: list[bytes]
) -> None:
    run = tmp_path / "run"
    watch.kill_worker(run, start("--workers", "1"), after=1)
    pids = [event["pid"] for event in watch.events(run, "worker_ready")]
    assert len(set(pids)) == 2
    assert contents(run) == expected


def test_killed_command_leaves_no_process(
    tmp_path: Path, start: Any, watch: Any, run_command: Any, scan_arguments: Any, expected: Any
) -> None:
    run = tmp_path / "run"
    parts = watch.kill_driver(run, start("--workers", "1"), after=1)
    worker = watch.events(run, "worker_ready")[0]["pid"]
    assert not psutil.pid_exists(worker)
    assert parts
    done = run_command(*scan_arguments(run, "--resume", "--address", "local"))
    assert done.returncode == 0, done.stderr
    assert contents(run) == expected
