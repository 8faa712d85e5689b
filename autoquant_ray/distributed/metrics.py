"""The run's events as Ray metrics, which Ray's own endpoint exports to Prometheus.

One object in the driver listens to every event; nothing else in the program counts anything. Ray
puts ``ray_`` before the names and ``_total`` after those of counters. A metric that cannot be
recorded switches the metrics off and never affects the scan.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from autoquant_ray.distributed.progress import Throughput
from autoquant_ray.runs.directory import RunDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        name: As given to Ray.
        kind: A counter only grows; a gauge is the value now.
        tags: Its labels.
        meaning: Shown as its description.
    """

    name: str
    kind: Literal["counter", "gauge"]
    tags: tuple[str, ...] = ("run_id", "stage")
    meaning: str

    @property
    def exported_name(self) -> str:
        """Its name at Ray's metrics endpoint."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


SHARDS_DONE = Metric(
    name="autoquant_shards_done", kind="counter", meaning="Shards whose part was written."
)
SHARDS_FAILED = Metric(
    name="autoquant_shards_failed",
    kind="counter",
    meaning="Attempts at a shard that ended by an error or by the death of their worker.",
)
SHARDS_RETRIED = Metric(
    name="autoquant_shards_retried",
    kind="counter",
    meaning="Failed attempts after which the shard went to another worker.",
)
SHARDS_QUARANTINED = Metric(
    name="autoquant_shards_quarantined",
    kind="counter",
    meaning="Shards left out of the result; the exit code is then 3.",
)
TOKENS = Metric(
    name="autoquant_tokens",
    kind="counter",
    meaning="Tokens calibrated or scored; its rate is the speed now.",
)
TOKENS_PER_SECOND = Metric(
    name="autoquant_tokens_per_second",
    kind="gauge",
    meaning="Tokens over the seconds since the stage started, loading included; 0 once it ended.",
)
WORKERS_ALIVE = Metric(
    name="autoquant_workers_alive",
    kind="gauge",
    tags=("run_id",),
    meaning="Workers that have the model loaded and live.",
)
STAGE = Metric(name="autoquant_stage", kind="gauge", meaning="1 while the stage runs, else 0.")

METRICS = (
    SHARDS_DONE,
    SHARDS_FAILED,
    SHARDS_RETRIED,
    SHARDS_QUARANTINED,
    TOKENS,
    TOKENS_PER_SECOND,
    WORKERS_ALIVE,
    STAGE,
)


class Record(Protocol):
    """Adds to a counter or sets a gauge."""

    def __call__(self, value: float, tags: dict[str, str]) -> None:
        """Record a value; the tags must be exactly the metric's."""


class RunMetrics:
    """Turns events into metrics; call it with every event.

    Args:
        run_id: Tag of everything recorded.
        make: Makes the recorder of one metric; default: Ray's.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        run_id: str,
        make: Callable[[Metric], Record] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_id = run_id
        self._make = make or _ray_record
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._is_on = True
        self._stage = ""
        self._throughput = Throughput(clock)

    def __call__(self, event: str, **details: Any) -> None:
        """Handle an event; kinds that concern no metric are ignored."""
        if not self._is_on:
            return
        try:
            self._take(event, details)
        except Exception as error:  # noqa: BLE001 - a metric is never worth a scan
            self._is_on = False
            logger.debug("metrics are off: %s: %s", type(error).__name__, error)

    def _take(self, event: str, details: dict[str, Any]) -> None:
        if event == "stage_started":
            self._stage = details["stage"]
            self._throughput = Throughput(self._clock)
            self._record(STAGE, 1)
        elif event in ("stage_done", "stage_stopped"):
            self._record(STAGE, 0)
            self._record(TOKENS_PER_SECOND, 0)
        elif event == "shard_done":
            self._record(SHARDS_DONE, 1)
            self._record(TOKENS, details["num_tokens"])
            self._record(TOKENS_PER_SECOND, self._throughput.add(details["num_tokens"]))
        elif event == "shard_quarantined":
            self._record(SHARDS_QUARANTINED, 1)
        elif event == "workers_stopped":
            self._record(WORKERS_ALIVE, 0)
        if event in ("worker_ready", "worker_died"):
            self._record(WORKERS_ALIVE, details["num_workers"])
        if event in ("worker_died", "shard_failed") and details["shard"] is not None:
            self._record(SHARDS_FAILED, 1)
            if details["decision"] == "retry":
                self._record(SHARDS_RETRIED, 1)

    def _record(self, metric: Metric, value: float) -> None:
        if metric.name not in self._records:
            self._records[metric.name] = self._make(metric)
        if value or metric.kind == "gauge":  # Ray refuses to add nothing to a counter
            tags = {"run_id": self._run_id, "stage": self._stage}
            self._records[metric.name](value, {tag: tags[tag] for tag in metric.tags})


@contextmanager
def metrics_of(directory: RunDirectory, run_id: str) -> Iterator[None]:
    """Record the events of a run as metrics while the body runs.

    Args:
        directory: Of the run.
        run_id: Tag of the metrics.
    """
    metrics = RunMetrics(run_id)
    directory.listener = metrics
    try:
        yield
    finally:
        directory.listener = None
        metrics("workers_stopped")  # also where an error ended the run


def _ray_record(metric: Metric) -> Record:
    from ray.util.metrics import Counter, Gauge

    record: Record
    if metric.kind == "counter":
        record = Counter(metric.name, metric.meaning, metric.tags).inc
    else:
        record = Gauge(metric.name, metric.meaning, metric.tags).set
    return record
