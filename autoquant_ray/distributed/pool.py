"""A pool of workers that pull shards: reassigns lost shards, replaces dead workers.

Results come in the order in which they are finished; whoever needs an order sorts by shard.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from autoquant_ray.distributed.failure import Decision, FailurePolicy
from autoquant_ray.distributed.placement import Placement
from autoquant_ray.distributed.worker import ShardTask, start_worker
from autoquant_ray.errors import AutoQuantError, ClusterError, WorkerError, one_line

logger = logging.getLogger(__name__)

Submit = Callable[[Any, ShardTask], Any]
"""Calls an actor's method with a task and returns the reference of its result."""
OnEvent = Callable[..., None]

_START_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of one shard.

    Attributes:
        task: The shard.
        result: What the worker returned; None if quarantined.
        reason: Why it was quarantined; None if it was not.
    """

    task: ShardTask
    result: Any = None
    reason: str | None = None


class WorkerPool:
    """Starts workers, feeds them, and closes them on exit.

    Args:
        spec: Engine spec, sent to every worker.
        placement: How many workers, and what each reserves.
        on_event: Called with an event name and details at every state change.
    """

    def __init__(self, spec: Any, placement: Placement, on_event: OnEvent) -> None:
        self._spec = spec
        self._placement = placement
        self._on_event = on_event
        self._policy = FailurePolicy(max_replacements=10 + 3 * placement.num_workers)
        self._workers: dict[Any, int] = {}
        self._loading: dict[Any, Any] = {}
        self._num_started = 0

    def __enter__(self) -> Self:
        for _ in range(self._placement.num_workers):
            self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in [*self._workers, *self._loading.values()]:
            ray.kill(worker)
        self._workers.clear()
        self._loading.clear()

    def run(self, tasks: Iterable[ShardTask], submit: Submit) -> Generator[Outcome, None, None]:
        """Compute every task once.

        May be closed early: the results of the calls in flight are dropped, the workers finish
        them or are killed when the pool is closed.

        Args:
            tasks: Pulled one at a time, when a worker is free.
            submit: How to start a task on a worker.

        Raises:
            AutoQuantError: An error that would repeat on other workers; finished tasks were
                yielded before.
            WorkerError: All workers are gone and the replacement budget is spent.
        """
        self._policy.kills.clear()
        waiting = iter(tasks)
        retries: deque[ShardTask] = deque()
        busy: dict[Any, tuple[Any, ShardTask]] = {}
        exhausted = False
        while True:
            working = {worker for worker, _ in busy.values()}
            for worker in [w for w in self._workers if w not in working]:
                task = retries.popleft() if retries else next(waiting, None)
                if task is None:
                    exhausted = True
                    break
                busy[submit(worker, task)] = (worker, task)
            if not busy and exhausted and not retries:
                return
            self._require_workers(busy)
            for reference in self._wait([*busy, *self._loading]):
                if reference in self._loading:
                    self._finish_loading(reference)
                    continue
                worker, task = busy.pop(reference)
                outcome = self._settle(reference, worker, task)
                if outcome is None:
                    retries.append(task)
                else:
                    yield outcome

    def _start(self) -> None:
        worker = start_worker(self._placement.cpus_per_worker, self._placement.gpus_per_worker)
        self._num_started += 1
        self._loading[worker.load.remote(self._spec)] = worker

    def _wait(self, references: list[Any]) -> list[Any]:
        timeout = None if self._workers else _START_TIMEOUT_S
        ready, _ = ray.wait(references, num_returns=1, timeout=timeout)
        if not ready:
            raise ClusterError(
                f"no worker started within {_START_TIMEOUT_S:g} s; the cluster has "
                f"{ray.cluster_resources()}"
            )
        return list(ready)

    def _finish_loading(self, reference: Any) -> None:
        worker = self._loading.pop(reference)
        try:
            process_id = ray.get(reference)
        except RayTaskError as error:
            raise _own_error(error) from None
        except RayError as error:
            self._on_death(worker, None, error)
        else:
            self._workers[worker] = process_id
            self._on_event("worker_ready", pid=process_id)

    def _settle(self, reference: Any, worker: Any, task: ShardTask) -> Outcome | None:
        """Take a finished call's result; None means that the shard must be tried again."""
        try:
            return Outcome(task=task, result=ray.get(reference))
        except RayTaskError as error:
            own = _own_error(error)
            if self._policy.on_error(own) is Decision.FAIL:
                raise own from None
            reason = str(own)
        except RayError as error:  # the worker, its node, or its result is gone
            decision = self._on_death(worker, task, error)
            if decision is Decision.RETRY:
                return None
            reason = f"killed {self._policy.max_kills_per_shard} workers"
        self._on_event("shard_quarantined", shard=task.shard, reason=reason)
        return Outcome(task=task, reason=reason)

    def _on_death(self, worker: Any, task: ShardTask | None, error: RayError) -> Decision:
        shard = None if task is None else task.shard
        self._workers.pop(worker, None)
        ray.kill(worker)
        decision = self._policy.on_worker_death(shard)
        reason = one_line(error)
        logger.warning("a worker died (shard %s): %s", shard, reason)
        self._on_event("worker_died", shard=shard, decision=decision.value, reason=reason)
        if self._policy.take_replacement():
            self._start()
        return decision

    def _require_workers(self, busy: dict[Any, Any]) -> None:
        if not self._workers and not self._loading and not busy:
            raise WorkerError(
                f"all workers died ({self._num_started} were started); finished shards are kept, "
                "start again with --resume"
            )


def _own_error(error: RayTaskError) -> AutoQuantError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, AutoQuantError):
        return cause
    return WorkerError(one_line(error, limit=500))
