"""Events -> metrics, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from autoquant_ray.distributed.metrics import METRICS, Metric, Record, RunMetrics
from autoquant_ray.runs.directory import RunDirectory

LABELS = ("run_id", "stage")


class Recorded:
    """Keeps what was recorded, as Prometheus would: the value per name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.now_s = 0.0

    def make(self, metric: Metric) -> Record:
        def record(value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == metric.tags
            assert value > 0 or metric.kind == "gauge"
            key = (metric.name.removeprefix("autoquant_"), *tags.values())
            before = self.values.get(key, 0.0) if metric.kind == "counter" else 0.0
            self.values[key] = before + value

        return record


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def metrics(recorded: Recorded) -> RunMetrics:
    return RunMetrics("r", recorded.make, lambda: recorded.now_s)


def done(shard: int, num_tokens: int) -> dict[str, Any]:
    return {
        "stage": "score",
        "shard": shard,
        "num_tokens": num_tokens,
        "seconds": 1.0,
        "pid": 7,
    }


def test_metrics_count_shards_and_tokens_per_stage(metrics: RunMetrics, recorded: Recorded) -> None:
    metrics("stage_started", stage="calibrate")
    metrics("shard_done", **done(0, 100))
    metrics("stage_done", stage="calibrate", seconds=1.0)
    metrics("stage_started", stage="score")
    recorded.now_s = 4.0
    metrics("shard_done", **done(0, 100))
    metrics("shard_done", **done(1, 60))
    assert recorded.values == {
        ("stage", "r", "calibrate"): 0,
        ("stage", "r", "score"): 1,
        ("shards_done", "r", "calibrate"): 1,
        ("shards_done", "r", "score"): 2,
        ("tokens", "r", "calibrate"): 100,
        ("tokens", "r", "score"): 160,
        ("tokens_per_second", "r", "calibrate"): 0,
        ("tokens_per_second", "r", "score"): 40,
    }


def test_metrics_shard_without_tokens_is_counted(metrics: RunMetrics, recorded: Recorded) -> None:
    metrics("stage_started", stage="score")
    metrics("shard_done", **done(0, 0))
    assert recorded.values["shards_done", "r", "score"] == 1
    assert ("tokens", "r", "score") not in recorded.values


def test_metrics_tell_deaths_retries_and_quarantine_apart(
    metrics: RunMetrics, recorded: Recorded
) -> None:
    metrics("stage_started", stage="score")
    metrics("worker_ready", pid=1, num_workers=1)
    metrics("worker_ready", pid=2, num_workers=2)
    metrics("worker_died", shard=3, decision="retry", reason="", num_workers=1)
    metrics("worker_died", shard=None, decision="retry", reason="", num_workers=1)
    metrics("worker_died", shard=3, decision="quarantine", reason="", num_workers=0)
    metrics("shard_quarantined", shard=3, reason="")
    metrics("shard_failed", shard=4, decision="quarantine", reason="")
    metrics("shard_quarantined", shard=4, reason="")
    assert recorded.values == {
        ("stage", "r", "score"): 1,
        ("workers_alive", "r"): 0,
        ("shards_failed", "r", "score"): 3,
        ("shards_retried", "r", "score"): 1,
        ("shards_quarantined", "r", "score"): 2,
    }


@pytest.mark.parametrize("event", ["stage_done", "stage_stopped"])
def test_metrics_ended_stage_is_at_rest(
    event: str, metrics: RunMetrics, recorded: Recorded
) -> None:
    metrics("stage_started", stage="score")
    metrics("worker_ready", pid=1, num_workers=1)
    recorded.now_s = 1.0
    metrics("shard_done", **done(0, 5))
    assert recorded.values["tokens_per_second", "r", "score"] == 5
    metrics(event, stage="score")
    metrics("workers_stopped")
    for name in (("stage", "r", "score"), ("tokens_per_second", "r", "score")):
        assert recorded.values[name] == 0
    assert recorded.values["workers_alive", "r"] == 0


@pytest.mark.parametrize("where", ["make", "record"])
def test_metrics_that_fail_are_off_and_the_event_is_written(
    where: str, tmp_path: Any, recorded: Recorded
) -> None:
    num_failures = 0

    def fail(*_: Any) -> Any:
        nonlocal num_failures
        num_failures += 1
        raise RuntimeError("no metrics here")

    make: Callable[[Metric], Record] = fail if where == "make" else lambda _metric: fail
    directory = RunDirectory(str(tmp_path))
    directory.listener = RunMetrics("r", make)
    directory.append_event("stage_started", stage="score")
    directory.append_event("stage_done", stage="score", seconds=1.0)
    assert directory.read_bytes("events.jsonl").count(b"\n") == 2
    assert num_failures == 1


def test_metric_names_follow_the_rules_of_ray_and_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("autoquant_")
        assert metric.name.replace("_", "").isalpha()
        assert not metric.name.endswith("_total")  # Ray adds it
        assert metric.exported_name.endswith("_total") == (metric.kind == "counter")
