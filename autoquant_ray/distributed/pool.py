"""A pool of workers that pull shards.

It reassigns lost shards, replaces dead workers, computes a shard twice rather than wait for a slow
worker at the end of a stage, and lets the shards in flight finish when it is asked to stop.

Calls are never cancelled (``ray.cancel`` can abort the driver, Ray 2.60). A worker that still
computes a copy that is no longer needed joins the next stage when that call ends; killing it would
mean loading the model again, likely on the same slow GPU.

Results come in the order in which they are finished; a caller that needs an order sorts by shard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from autoquant_ray.distributed.crew import Crew, OnEvent, error_of_task
from autoquant_ray.distributed.failure import Decision
from autoquant_ray.distributed.interrupts import StopRequest
from autoquant_ray.distributed.placement import Placement
from autoquant_ray.distributed.progress import Waiting
from autoquant_ray.distributed.shard_queue import ShardQueue
from autoquant_ray.distributed.task import ShardTask, Task
from autoquant_ray.errors import one_line

logger = logging.getLogger(__name__)

Submit = Callable[[Any, Any], Any]
"""Calls an actor's method with a task and returns the reference of its result."""

_POLL_S = 0.5
"""Longest wait between two checks for a request to stop and for a larger cluster."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """End of one shard, or of one layer.

    Attributes:
        task: What was given to :meth:`WorkerPool.run`.
        result: What the worker returned; None if quarantined.
        reason: Why it was quarantined; None if it was not.
        seconds: From the call to its result.
        process_id: The worker that computed it.
        num_workers: Workers alive when it ended.
    """

    task: Any
    result: Any = None
    reason: str | None = None
    seconds: float = 0.0
    process_id: int = 0
    num_workers: int = 0


@dataclass(kw_only=True)
class _Call:
    """A call in flight; ``task`` is None once its result is not wanted."""

    worker: Any
    task: Task | None
    start_s: float
    queue: ShardQueue


class WorkerPool:
    """Starts workers, gives them shards, and kills them on exit.

    Args:
        spec: Scoring or evaluation spec, sent to every worker.
        placement: How many workers, and what each reserves.
        on_event: Called with an event name and details at every state change.
        grace_s: Seconds that shards in flight get when the caller of :meth:`run` asks to stop.
    """

    def __init__(
        self, spec: Any, placement: Placement, on_event: OnEvent, grace_s: float = 0.0
    ) -> None:
        self.grace_s = grace_s
        self._placement = placement
        self._on_event = on_event
        self._crew = Crew(spec, placement, on_event)
        self._calls: dict[Any, _Call] = {}
        self._owners: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._crew.start(self._placement.num_workers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._crew.close()
        self._calls.clear()

    @property
    def num_workers(self) -> int:
        """Workers that were asked for."""
        return self._placement.num_workers

    @staticmethod
    def share(value: Any) -> Any:
        """Put a large value into Ray's object store; pass the returned reference to the calls."""
        return ray.put(value)

    def run(
        self,
        tasks: Iterable[Task],
        submit: Submit,
        stop: StopRequest | None = None,
    ) -> Generator[Outcome, None, None]:
        """Compute every task once; a slow one may be computed twice, its first result counts.

        Calls that are still running at the end, or when the generator is closed early, are not
        cancelled: their workers get no other task until they end, and their results are ignored.

        Args:
            tasks: A few are pulled in advance. A worker gets by preference a shard that it
                finished in an earlier stage.
            submit: How to start a task on a worker.
            stop: Once it is made, no task is started, those in flight are waited for as long as
                it allows, and the generator ends with tasks left: the caller must check it.

        Raises:
            AutoQuantError: An error that would repeat on other workers; finished tasks were
                yielded before.
            WorkerError: All workers are gone and the replacement budget is spent.
            ClusterError: No worker has become ready in time.
        """
        stop = StopRequest(self.grace_s) if stop is None else stop
        self._crew.policy.kills.clear()
        for call in self._calls.values():
            call.task = None  # left by a generator that was dropped and not closed yet
        window = 2 * self._placement.num_workers if self._owners else 1
        queue = ShardQueue(tasks, self._owners, window)
        try:
            yield from self._outcomes(queue, submit, stop)
        finally:
            for call in self._calls.values():
                if call.queue is queue:
                    call.task = None

    def _outcomes(
        self, queue: ShardQueue, submit: Submit, stop: StopRequest
    ) -> Generator[Outcome, None, None]:
        waiting = Waiting()
        while not stop.is_made:
            self._feed(queue, submit)
            queue.read_ahead()
            if queue.is_done:
                return
            if queue.has_fresh:
                self._crew.grow()
            self._crew.require_workers()
            if self._crew.ready:
                waiting.note(f"computing, {len(self._wanted(queue))} in flight")
            else:
                loading = len(self._crew.loading)
                waiting.note(f"waiting for {loading} worker(s), which import torch and the model")
            for reference in self._wait(queue):
                outcome = self._receive(reference, queue)
                if outcome is not None:
                    waiting.restart()
                    if not stop.is_made:
                        self._feed(queue, submit)  # before the caller writes the result
                    yield outcome
        yield from self._drain(queue, stop)

    def _drain(self, queue: ShardQueue, stop: StopRequest) -> Generator[Outcome, None, None]:
        """Receive what is in flight within the grace period; start nothing, not even a worker."""
        self._crew.is_replacing = False
        shards = sorted(call.task.shard for call in self._wanted(queue).values() if call.task)
        self._on_event("stop_requested", shards=shards)
        logger.warning(
            "stopping: waiting up to %g s for %d shard(s) in flight; a second signal stops at once",
            stop.seconds_left(),
            len(shards),
        )
        while (wanted := self._wanted(queue)) and stop.seconds_left() > 0:
            timeout = min(_POLL_S, stop.seconds_left())
            ready, _ = ray.wait([*wanted], num_returns=1, timeout=timeout)
            for reference in ready:
                outcome = self._receive(reference, queue)
                if outcome is not None:
                    yield outcome

    def _wanted(self, queue: ShardQueue) -> dict[Any, _Call]:
        """Calls in flight whose result counts."""
        return {r: c for r, c in self._calls.items() if c.queue is queue and c.task is not None}

    def _feed(self, queue: ShardQueue, submit: Submit) -> None:
        for worker in self._free_workers():
            now_s = time.monotonic()
            task = queue.take(now_s, worker)
            if task is None:
                return
            call = _Call(worker=worker, task=task, start_s=now_s, queue=queue)
            self._calls[submit(worker, task)] = call
            if queue.num_copies(task.shard) > 1:
                self._on_event("shard_copied", shard=task.shard)

    def _free_workers(self) -> list[Any]:
        busy = {call.worker for call in self._calls.values()}
        return [worker for worker in self._crew.ready if worker not in busy]

    def _wait(self, queue: ShardQueue) -> list[Any]:
        timeout = _POLL_S
        if self._free_workers():
            to_copy_s = queue.seconds_to_copy(time.monotonic())
            timeout = timeout if to_copy_s is None else min(timeout, to_copy_s)
        ready, _ = ray.wait([*self._calls, *self._crew.loading], num_returns=1, timeout=timeout)
        return list(ready)

    def _receive(self, reference: Any, queue: ShardQueue) -> Outcome | None:
        """Handle what has arrived: a loaded worker, an unwanted copy, or the end of a shard."""
        if reference in self._crew.loading:
            self._crew.finish_loading(reference)
            return None
        call = self._calls.pop(reference)
        if call.task is None:
            self._discard(reference, call.worker)
            return None
        return self._settle(reference, call, call.task, queue)

    def _discard(self, reference: Any, worker: Any) -> None:
        """Finish a call whose result is not wanted; it matters only if the worker has died."""
        try:
            ray.get(reference)
        except RayTaskError as error:
            logger.info("a copy that was not needed failed: %s", one_line(error))
        except RayError as error:
            self._on_death(worker, None, error)

    def _settle(self, reference: Any, call: _Call, task: Task, queue: ShardQueue) -> Outcome | None:
        """Take a finished call's result; None means that the shard must be tried again."""
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error_of_task(error)
            decision = self._crew.policy.on_error(cause)
            self._on_event(
                "shard_failed", shard=task.shard, decision=decision.value, reason=one_line(cause)
            )
            if decision is Decision.FAIL:
                raise cause from None
            return self._quarantine(task, str(cause), queue)
        except RayError as error:  # the worker, its node, or its result is gone
            if self._on_death(call.worker, task, error) is Decision.RETRY:
                queue.lose(task.shard, call.start_s)
                return None
            reason = f"killed {self._crew.policy.max_kills_per_shard} workers"
            return self._quarantine(task, reason, queue)
        now_s = time.monotonic()
        queue.finish(task.shard, call.start_s, now_s)
        self._ignore_copies(task.shard)
        if isinstance(task, ShardTask):
            self._owners[task.shard] = call.worker
        return Outcome(
            task=task,
            result=result,
            seconds=now_s - call.start_s,
            process_id=self._crew.ready[call.worker],
            num_workers=len(self._crew.ready),
        )

    def _quarantine(self, task: Task, reason: str, queue: ShardQueue) -> Outcome:
        queue.give_up(task.shard)
        self._ignore_copies(task.shard)
        self._on_event("shard_quarantined", shard=task.shard, reason=reason)
        return Outcome(task=task, reason=reason, num_workers=len(self._crew.ready))

    def _ignore_copies(self, shard: int) -> None:
        for call in self._calls.values():
            if call.task is not None and call.task.shard == shard:
                call.task = None

    def _on_death(self, worker: Any, task: Task | None, error: RayError) -> Decision:
        for shard in [s for s, owner in self._owners.items() if owner == worker]:
            del self._owners[shard]  # in place: the running queue reads it too
        return self._crew.bury(worker, None if task is None else task.shard, error)
