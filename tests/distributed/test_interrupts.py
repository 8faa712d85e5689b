"""SIGTERM and Ctrl-C on a real scan: what is in flight is kept, within the grace period."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from warm_commands import WarmProcess

# Many draws make a shard slow enough that a signal lands in the middle of the scan.
SLOW = ("--shard-samples", "1", "--label-draws", "12", "--workers", "1")
NUM_SHARDS = 12


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> bytes:
    run: Path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command(*scan_arguments(run, *SLOW))
    assert done.returncode == 0, done.stderr
    return (run / "sensitivity.parquet").read_bytes()


@pytest.fixture
def start(tmp_path: Path, start_command: Any, scan_arguments: Any) -> Any:
    """Start a scan."""

    def start(*extra: Any, **options: Any) -> WarmProcess:
        scan: WarmProcess = start_command(
            *scan_arguments(tmp_path / "run", *SLOW, "--address", "local", *extra), **options
        )
        return scan

    return start


@pytest.fixture
def start_cold(tmp_path: Path, scan_arguments: Any) -> Any:
    """Start a scan whose workers import everything: its process has a thread, and is not forked."""
    thread = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    run = "from autoquant_ray.cli.main import main; main(prog_name='autoquant-ray')"

    def start(*extra: Any) -> subprocess.Popen[str]:
        arguments = scan_arguments(tmp_path / "run", *SLOW, "--address", "local", *extra)
        return subprocess.Popen(
            [sys.executable, "-c", f"import threading; {thread}; {run}", *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture
def resume(tmp_path: Path, run_command: Any, scan_arguments: Any) -> Callable[[], bytes]:
    """Go on with the scan to its end; the bytes of its scores."""

    def resume() -> bytes:
        done = run_command(*scan_arguments(tmp_path / "run", *SLOW, "--resume"))
        assert done.returncode == 0, done.stderr
        return (tmp_path / "run" / "sensitivity.parquet").read_bytes()

    return resume


@contextmanager
def frozen_worker(watch: Any, run: Path, scan: WarmProcess) -> Iterator[None]:
    """The scan's only worker gets no further once a shard is scored."""
    watch.wait_for(lambda: watch.scored(run), scan)
    worker = watch.events(run, "worker_ready")[0]["pid"]
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("sent", ["SIGTERM", "Ctrl-C"])
def test_scan_asked_to_stop_keeps_the_shard_in_flight(
    sent: str,
    undisturbed: bytes,
    tmp_path: Path,
    start: Any,
    start_cold: Any,
    resume: Any,
    watch: Any,
) -> None:
    run = tmp_path / "run"
    # A terminal's Ctrl-C reaches only workers that are of the scan's own session: none is forked.
    starting = start if sent == "SIGTERM" else start_cold
    with starting("--grace-s", "100000") as scan:
        watch.wait_for(lambda: watch.scored(run), scan)
        if sent == "SIGTERM":
            scan.send_signal(signal.SIGTERM)
        else:  # a terminal sends it to the workers too
            os.killpg(scan.pid, signal.SIGINT)
        _, stderr = scan.communicate()
    assert scan.returncode == 130, stderr
    (request,) = watch.events(run, "stop_requested")
    scored = watch.scored(run)
    assert set(request["shards"]) <= set(scored)
    assert watch.events(run, "worker_died") == []
    # The second was in flight when the first was noted, and the signal came after that.
    assert 2 <= len(scored) < NUM_SHARDS
    last = stderr.splitlines()[-1]
    assert f"{len(scored)} of {NUM_SHARDS} shards" in last
    assert "--resume" in last
    parts = watch.part_times(run)
    assert sorted(parts) == [f"shard-{shard:06d}.parquet" for shard in sorted(scored)]
    assert list(run.rglob("*.tmp")) == []
    assert not (run / ".lock").exists()

    assert resume() == undisturbed
    assert parts.items() <= watch.part_times(run).items()


def test_scan_worker_slower_than_the_grace_period_is_not_waited_for(
    undisturbed: bytes, tmp_path: Path, start: Any, resume: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    with start("--grace-s", "1") as scan, frozen_worker(watch, run, scan):
        scan.send_signal(signal.SIGTERM)
        _, stderr = scan.communicate()
    assert scan.returncode == 130, stderr
    (request,) = watch.events(run, "stop_requested")
    assert set(request["shards"]) - set(watch.scored(run))
    assert resume() == undisturbed


def test_scan_second_signal_stops_at_once(
    undisturbed: bytes, tmp_path: Path, start: Any, resume: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    with start("--grace-s", "100000") as scan, frozen_worker(watch, run, scan):
        scan.send_signal(signal.SIGTERM)
        watch.wait_for(lambda: watch.events(run, "stop_requested"), scan)
        scan.send_signal(signal.SIGTERM)
        _, stderr = scan.communicate()
    assert scan.returncode == 130, stderr
    assert "--resume" in stderr.splitlines()[-1]
    assert resume() == undisturbed


def test_scan_asked_to_stop_while_workers_load_waits_for_nothing(
    tmp_path: Path, start_cold: Any, watch: Any
) -> None:
    run = tmp_path / "run"
    # Forked workers would be ready too soon.
    with start_cold("--grace-s", "100000") as scan:
        watch.wait_for(
            lambda: any(e["stage"] == "calibrate" for e in watch.events(run, "stage_started")), scan
        )
        scan.send_signal(signal.SIGTERM)
        _, stderr = scan.communicate()
    assert scan.returncode == 130, stderr
    assert f"0 of {NUM_SHARDS} shards" in stderr.splitlines()[-1]
    assert watch.events(run, "worker_ready") == []
