"""The pool of workers as one process: what stages write can be tried without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from autoquant_ray.distributed.pool import Outcome


class Killed(BaseException):
    """The driver is gone."""


class Pool:
    """Stands for the workers.

    Args:
        scorer: Computes.
        last_first: Give the results of the last shards first.
        dies_after: Be killed after so many results.
    """

    grace_s = 0.0
    num_workers = 2

    def __init__(
        self, scorer: Any, *, last_first: bool = False, dies_after: int | None = None
    ) -> None:
        self._scorer = scorer
        self._last_first = last_first
        self._dies_after = dies_after
        self.done: list[int] = []

    def share(self, value: Any) -> Any:
        """As the pool of real workers."""
        return value

    def run(self, tasks: Any, submit: Any, _stop: Any) -> Iterator[Outcome]:
        """As the pool of real workers."""
        worker = SimpleNamespace(
            calibrate=SimpleNamespace(remote=lambda task: self._scorer.calibrate(task.samples)),
            search=SimpleNamespace(
                remote=lambda task, calibration: self._scorer.search(task.samples, calibration)
            ),
            fit=SimpleNamespace(
                remote=lambda task, *shared: self._scorer.fit(task.layers, *shared)
            ),
        )
        for task in sorted(tasks, key=lambda task: task.shard, reverse=self._last_first):
            if len(self.done) == self._dies_after:
                raise Killed
            self.done.append(task.shard)
            yield Outcome(task=task, result=submit(worker, task))
