"""A Ray cluster for each test process, and the command line as a real process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from local_ray import local_cluster
from warm_commands import WarmProcess, run_warm


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """Four CPUs (whatever the machine has) for tests in which no node is killed."""
    with local_cluster(num_cpus=4) as address:
        yield address


@pytest.fixture(scope="module")
def ray_local(cluster_address: str) -> Iterator[None]:
    """This process is a driver on the shared cluster."""
    ray.init(address=cluster_address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def start_command() -> Any:
    """Start the command line in a session of its own, with what it imports imported already."""

    def start(*arguments: Any, ray_is_warm: bool = True) -> WarmProcess:
        return WarmProcess([str(argument) for argument in arguments], os.environ, ray_is_warm)

    return start


@pytest.fixture(scope="session")
def run_command() -> Any:
    """Run the command line to its end."""

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return run_warm([str(argument) for argument in arguments], os.environ)

    return run


@pytest.fixture(scope="session")
def scan_arguments(model_folder: Any, text_file: Path, cluster_address: str) -> Any:
    """Arguments of a small scan into a run directory; of two workers unless ``extra`` says more."""

    def build(out: Path, *extra: Any, family: str = "llama") -> list[Any]:
        return [
            "scan",
            model_folder(family),
            "--data",
            text_file,
            "--out",
            out,
            "--formats",
            "wint4_afp16:max,wint8_aint8",
            "--bits",
            "8",
            "--shard-samples",
            "2",
            "--workers",
            "2",
            "--address",
            cluster_address,
            *extra,
        ]

    return build


class ScanWatch:
    """What a run directory tells while its scan goes on, and scans that lose a process."""

    @staticmethod
    def events(run: Path, name: str) -> list[dict[str, Any]]:
        """The events of one kind so far."""
        path = run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if event["event"] == name]

    def scored(self, run: Path) -> list[int]:
        """Shards scored so far, in the order in which they ended."""
        return [e["shard"] for e in self.events(run, "shard_done") if e["stage"] == "score"]

    @staticmethod
    def wait_for(condition: Callable[[], bool], process: Any) -> None:
        """Poll until the condition holds; fails if the process ends first."""
        while not condition():
            try:
                process.wait(timeout=0.02)
            except subprocess.TimeoutExpired:
                continue
            assert condition(), "the process ended before the condition held"
            return

    def kill_worker(self, run: Path, scan: WarmProcess, after: int) -> None:
        """Let a scan run to its end; its first worker is killed once so many shards are scored."""
        with scan:
            self.wait_for(lambda: len(self.scored(run)) >= after, scan)
            os.kill(self.events(run, "worker_ready")[0]["pid"], signal.SIGKILL)
            _, stderr = scan.communicate()
        assert scan.returncode == 0, stderr
        assert len(self.events(run, "worker_died")) == 1

    def kill_driver(self, run: Path, scan: WarmProcess, after: int) -> dict[str, int]:
        """Kill a scan once so many shards are scored; its parts and their times."""
        with scan:
            self.wait_for(lambda: len(self.scored(run)) >= after, scan)
            children = psutil.Process(scan.pid).children(recursive=True)
            scan.kill()
        psutil.wait_procs(children)
        return self.part_times(run)

    @staticmethod
    def part_times(run: Path) -> dict[str, int]:
        """Score parts -> when they were written, in nanoseconds."""
        return {path.name: path.stat().st_mtime_ns for path in (run / "scores").glob("shard-*")}


@pytest.fixture(scope="session")
def watch() -> ScanWatch:
    """Watch and disturb scans."""
    return ScanWatch()
