"""A scan's metrics at Ray's own endpoint, and its events against their schema."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from local_ray import start_local_ray

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.events import ShardDone, WorkerDied, parse_event
from autoquant_ray.scan import run_search

SAMPLE = re.compile(r"^(ray_autoquant_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A cluster that reports its metrics often; yields their address."""
    start_local_ray(num_cpus=2, _system_config={"metrics_report_interval_ms": 300})
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def exported(endpoint: str, run_id: str) -> dict[tuple[str, str], float]:
    """(metric, stage) -> value now, of one run."""
    with urllib.request.urlopen(endpoint) as response:
        text = response.read().decode()
    values = {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags["run_id"] == run_id:
            values[name, tags.get("stage", "")] = float(value)
    return values


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.1)


def scan_config(model: Path, text_file: Path, out: Path) -> ScanConfig:
    return ScanConfig(
        model=str(model),
        data=str(text_file),
        out=str(out),
        formats=("wint8_aint8", "wint4_afp16:max"),
        bits=8,
        shard_samples=1,
        workers=2,
    )


class Pause:
    """Holds a scan right after its first scored shard."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_reached = threading.Event()
        self.go_on = threading.Event()
        append_event = RunDirectory.append_event

        def append_and_wait(directory: RunDirectory, event: str, **details: Any) -> None:
            append_event(directory, event, **details)
            if event == "shard_done" and details["stage"] == "score":
                self.is_reached.set()
                self.go_on.wait()

        monkeypatch.setattr(RunDirectory, "append_event", append_and_wait)


def test_scan_that_loses_a_worker_exports_what_its_events_say(
    endpoint: str,
    model_folder: Any,
    text_file: Path,
    tmp_path: Path,
    watch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    pause = Pause(monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        scan = threads.submit(run_search, scan_config(model_folder("llama"), text_file, run))
        wait_until(lambda: pause.is_reached.is_set() or scan.done())
        run_id = json.loads((run / "run.json").read_text())["run_id"]
        wait_until(
            lambda: ("ray_autoquant_tokens_per_second", "score") in exported(endpoint, run_id)
        )
        now = exported(endpoint, run_id)
        os.kill(watch.events(run, "shard_done")[-1]["pid"], signal.SIGKILL)
        pause.go_on.set()
        scan.result()

    assert now["ray_autoquant_stage", "calibrate"] == 0
    assert now["ray_autoquant_stage", "score"] == 1
    assert now["ray_autoquant_tokens_per_second", "score"] > 0
    assert now["ray_autoquant_workers_alive", ""] >= 1
    assert now["ray_autoquant_shards_done_total", "calibrate"] == 12
    assert now["ray_autoquant_shards_done_total", "score"] == 1

    facts = json.loads((run / "run.json").read_text())
    events = [parse_event(line) for line in (run / "events.jsonl").read_text().splitlines()]
    done = Counter(event.stage for event in events if isinstance(event, ShardDone))
    (death,) = [event for event in events if isinstance(event, WorkerDied)]
    assert done == {"calibrate": 12, "score": 12}

    # Counters stay at the endpoint, exactly; the gauges of a finished scan go.
    num_tokens = facts["dataset"]["num_tokens"]
    expected = {
        ("ray_autoquant_shards_done_total", "calibrate"): 12,
        ("ray_autoquant_shards_done_total", "score"): 12,
        ("ray_autoquant_tokens_total", "calibrate"): num_tokens,
        ("ray_autoquant_tokens_total", "score"): num_tokens,
    }
    if death.shard is not None:  # the kill may meet a worker between two shards
        expected["ray_autoquant_shards_failed_total", "score"] = 1
        expected["ray_autoquant_shards_retried_total", "score"] = 1
    wait_until(lambda: exported(endpoint, facts["run_id"]) == expected)
    assert exported(endpoint, facts["run_id"]) == expected
