"""The promise: the same input gives byte-identical scores, whoever computed and whoever died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from autoquant_ray.config import ScanConfig
from autoquant_ray.search import run_search

# Many draws make a shard slow enough that a kill lands in the middle of the scan.
SLOW = ("--shard-samples", "1", "--label-draws", "12")


def sensitivity(run: Path) -> bytes:
    return (run / "sensitivity.parquet").read_bytes()


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def scored(run: Path) -> list[int]:
    return [e["shard"] for e in events(run) if e["event"] == "shard_done" and e["stage"] == "score"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Poll until the condition holds; fails if the process ends first."""
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        assert process.poll() is None, "the scan ended before the condition held"
        pause.wait(0.02)
    pytest.fail("the condition never held")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run_command: Any, scan_arguments: Any
) -> Path:
    run: Path = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_command(*scan_arguments(run, *SLOW, "--workers", "1"))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_scan_any_number_of_workers_gives_identical_bytes(
    workers: int,
    ray_local: None,
    undisturbed: Path,
    tmp_path: Path,
    model_folder: Any,
    text_file: Path,
) -> None:
    config = ScanConfig(
        model=str(model_folder("llama")),
        data=str(text_file),
        out=str(tmp_path / "run"),
        formats=("wint4_afp16", "wint8_aint8"),
        bits=8,
        shard_samples=1,
        label_draws=12,
        workers=workers,
    )
    result = run_search(config)
    assert result.quarantined == []
    assert sensitivity(tmp_path / "run") == sensitivity(undisturbed)
    ready = [e for e in events(tmp_path / "run") if e["event"] == "worker_ready"]
    assert 1 <= len({e["pid"] for e in ready}) <= workers


def test_scan_killed_worker_gives_identical_bytes(
    undisturbed: Path, tmp_path: Path, command: Any, scan_arguments: Any
) -> None:
    run = tmp_path / "run"
    arguments = command(*scan_arguments(run, *SLOW, "--workers", "2"))
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as scan:
        wait_for(lambda: len(scored(run)) >= 2, scan)
        pids = [e["pid"] for e in events(run) if e["event"] == "worker_ready"]
        os.kill(pids[0], signal.SIGKILL)
        _, stderr = scan.communicate(timeout=240)
    assert scan.returncode == 0, stderr
    assert [e["event"] for e in events(run)].count("worker_died") == 1
    assert sorted(scored(run)) == list(range(12))
    assert sensitivity(run) == sensitivity(undisturbed)


def test_scan_killed_driver_resumes_without_repeating_finished_shards(
    undisturbed: Path, tmp_path: Path, command: Any, run_command: Any, scan_arguments: Any
) -> None:
    run = tmp_path / "run"
    arguments = command(*scan_arguments(run, *SLOW, "--workers", "1"))
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as scan:
        wait_for(lambda: len(scored(run)) >= 3, scan)
        children = psutil.Process(scan.pid).children(recursive=True)
        scan.send_signal(signal.SIGKILL)
        scan.wait(timeout=60)
    psutil.wait_procs(children, timeout=30)
    finished = {path.name: path.stat().st_mtime_ns for path in (run / "scores").glob("shard-*")}
    assert 3 <= len(finished) < 12
    assert not (run / "sensitivity.parquet").exists()

    before = len(scored(run))
    resumed = run_command(*scan_arguments(run, *SLOW, "--workers", "1", "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    again = scored(run)[before:]
    assert sorted(again) == [s for s in range(12) if f"shard-{s:06d}.parquet" not in finished]
    for name, modified in finished.items():
        assert (run / "scores" / name).stat().st_mtime_ns == modified
    assert sensitivity(run) == sensitivity(undisturbed)


def test_scan_interrupted_by_sigterm_exits_130_and_resumes(
    undisturbed: Path, tmp_path: Path, command: Any, run_command: Any, scan_arguments: Any
) -> None:
    run = tmp_path / "run"
    arguments = command(*scan_arguments(run, *SLOW, "--workers", "1"))
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as scan:
        wait_for(lambda: len(scored(run)) >= 1, scan)
        scan.send_signal(signal.SIGTERM)
        _, stderr = scan.communicate(timeout=120)
    assert scan.returncode == 130
    assert "--resume" in stderr.splitlines()[-1]
    assert run_command(*scan_arguments(run, *SLOW, "--resume")).returncode == 0
    assert sensitivity(run) == sensitivity(undisturbed)
