"""The workers of a pool: start, load, replace dead ones, start more when the cluster grows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

from autoquant_ray.distributed.failure import Decision, FailurePolicy
from autoquant_ray.distributed.placement import Placement
from autoquant_ray.distributed.worker import start_worker
from autoquant_ray.errors import AutoQuantError, ClusterError, WorkerError, one_line

logger = logging.getLogger(__name__)

OnEvent = Callable[..., None]

_START_TIMEOUT_S = 300.0
_LOOK_S = 2.0


class Crew:
    """Workers by state; a pool gives the ready ones work.

    Args:
        spec: Scoring or evaluation spec, sent to every worker.
        placement: How many workers, and what each reserves.
        on_event: Called with an event name and details at every state change.

    Attributes:
        ready: Worker -> process id, of those that have the model.
        loading: Reference of a pending ``load`` -> its worker, which may still wait for a place.
        policy: Budgets of failures.
        is_replacing: Whether dead workers are replaced.
    """

    def __init__(self, spec: Any, placement: Placement, on_event: OnEvent) -> None:
        self.ready: dict[Any, int] = {}
        self.loading: dict[Any, Any] = {}
        self.policy = FailurePolicy(max_replacements=10 + 3 * placement.num_workers)
        self.is_replacing = True
        self._spec = spec
        self._placement = placement
        self._on_event = on_event
        self._num_started = 0
        self._room = placement.num_workers
        self._next_look_s = self._next_node_look_s = 0.0
        self._none_ready_since_s: float | None = None

    def start(self, count: int) -> None:
        """Start workers; each waits in ``loading`` until the cluster has a place for it."""
        for _ in range(count):
            worker = start_worker(self._placement)
            self._num_started += 1
            self.loading[worker.load.remote(self._spec)] = worker

    def close(self) -> None:
        """Kill all workers."""
        for worker in [*self.ready, *self.loading.values()]:
            ray.kill(worker)
        self.ready.clear()
        self.loading.clear()

    def finish_loading(self, reference: Any) -> None:
        """Move a worker out of ``loading``: it is ready or dead.

        Raises:
            AutoQuantError: It cannot load the model; others could not either.
            RuntimeEnvSetupError: Its environment cannot be set up; the same.
        """
        worker = self.loading.pop(reference)
        try:
            process_id = ray.get(reference)
        except RayTaskError as error:
            raise error_of_task(error) from None
        except RuntimeEnvSetupError:
            raise  # no other worker would get it
        except RayError as error:
            self.bury(worker, None, error)
        else:
            self.ready[worker] = process_id
            self._on_event("worker_ready", pid=process_id, num_workers=len(self.ready))

    def bury(self, worker: Any, shard: int | None, error: RayError) -> Decision:
        """Drop a dead worker, replace it within the budget; returns what to do with its shard."""
        self.ready.pop(worker, None)
        ray.kill(worker)
        decision = self.policy.on_worker_death(shard)
        reason = one_line(error)
        logger.warning("a worker died (shard %s): %s", shard, reason)
        self._on_event(
            "worker_died",
            shard=shard,
            decision=decision.value,
            reason=reason,
            num_workers=len(self.ready),
        )
        if self.is_replacing and self.policy.take_replacement():
            self.start(1)
        return decision

    def grow(self) -> None:
        """Start workers where the cluster has become larger, up to what was asked for.

        Room that it had before is not refilled here: dead workers are replaced within their
        budget, and a replacement waits until the cluster has a place for it.
        """
        now_s = time.monotonic()
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_S
        room = min(
            self._placement.room(self._placement.nodes.resources()), self._placement.max_workers
        )
        size = len(self.ready) + len(self.loading)
        count = min(room - self._room, room - size)
        self._room = room
        if count > 0:
            logger.info("the cluster has grown: %d more worker(s)", count)
            self._on_event("pool_grew", num_wanted=size + count)
            self.start(count)

    def require_workers(self) -> None:
        """Check that there are workers to wait for.

        Raises:
            WorkerError: All workers are gone and the replacement budget is spent.
            ClusterError: No worker has become ready in time, or none can: our own node is dead.
        """
        if self.ready:
            self._none_ready_since_s = None
            return
        self._require_own_node()
        if not self.loading:
            raise WorkerError(
                f"all workers died ({self._num_started} were started); finished shards are kept, "
                "start again with `resume`"
            )
        now_s = time.monotonic()
        if self._none_ready_since_s is None:
            self._none_ready_since_s = now_s
        if now_s - self._none_ready_since_s > _START_TIMEOUT_S:
            raise ClusterError(
                f"no worker started within {_START_TIMEOUT_S:g} s; the cluster has "
                f"{ray.cluster_resources()}; finished shards are kept, start again with `resume`"
            )

    def _require_own_node(self) -> None:
        """Ray places nothing for a driver whose raylet is gone, and lets it wait for ever."""
        now_s = time.monotonic()
        if now_s < self._next_node_look_s:
            return
        self._next_node_look_s = now_s + _LOOK_S
        here = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == here and not node["Alive"] for node in ray.nodes()):
            raise ClusterError(
                "the Ray node of this command has died (its raylet was killed, or the machine ran "
                "out of memory); finished shards are kept, start again with `resume`"
            )


def error_of_task(error: RayTaskError) -> AutoQuantError:
    """What a worker raised: an error of this package as it is, any other as a WorkerError."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, AutoQuantError):
        return cause
    return WorkerError(one_line(error, limit=500))
