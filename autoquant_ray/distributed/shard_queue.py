"""Which shard a free worker gets: decisions only, no Ray, no clock of its own.

A shard that was lost with its worker comes first, then a fresh one, by preference one whose layer
inputs the worker has kept from calibration. When neither is left, a free worker gets a copy of the
shard that has been running longest, if that is unusually long: a worker that is several times
slower than the others (a throttled GPU, a busy node) then does not delay the run. The copy that
ends first counts; both would give the same bytes.
"""

from __future__ import annotations

import statistics
from bisect import insort
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from autoquant_ray.distributed.task import Task

MAX_COPIES = 2
"""Calls that may compute the same shard at the same time."""

SLOW_FACTOR = 1.75
"""A shard is slow once it has run this many times the median of the finished ones."""

_MIN_SLOW_S = 1.0
_MIN_FINISHED = 3


@dataclass
class _Running:
    task: Task
    starts_s: list[float] = field(default_factory=list)


class ShardQueue:
    """The shards of one stage: lost, fresh and running.

    Times are in seconds, all of the same monotonic clock.

    Args:
        tasks: Fresh shards, pulled to keep the window full.
        owners: Shard -> the worker that has its layer inputs and gets it by preference.
        window: Fresh shards among which a worker's own are looked for, 1 or more.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        owners: Mapping[int, Hashable] | None = None,
        window: int = 1,
    ) -> None:
        self._fresh = iter(tasks)
        self._owners = {} if owners is None else owners
        self._window = window
        self._next: list[Task] = []
        self._lost: deque[Task] = deque()
        self._running: dict[int, _Running] = {}
        self._sorted_durations_s: list[float] = []

    def read_ahead(self) -> None:
        """Pull the next fresh shards, so that a worker that becomes free need not wait."""
        missing = self._window - len(self._next)
        self._next += islice(self._fresh, missing)

    @property
    def is_done(self) -> bool:
        """Whether nothing is running or waiting; reliable after :meth:`read_ahead`."""
        return not (self._running or self._lost or self._next)

    @property
    def has_fresh(self) -> bool:
        """Whether a shard waits for its first worker; reliable after :meth:`read_ahead`."""
        return bool(self._next)

    def take(self, now_s: float, worker: Hashable = None) -> Task | None:
        """The shard for a worker that is free now; None if there is nothing useful to do."""
        if self._lost:
            task: Task | None = self._lost.popleft()
        else:
            task = self._take_fresh(worker) or self._take_slow(now_s)
        if task is not None:
            self._running.setdefault(task.shard, _Running(task)).starts_s.append(now_s)
        return task

    def num_copies(self, shard: int) -> int:
        """Calls that compute a shard now."""
        return len(self._running[shard].starts_s)

    def finish(self, shard: int, start_s: float, now_s: float) -> None:
        """The call that was started at ``start_s`` returned the result; copies no longer matter."""
        del self._running[shard]
        insort(self._sorted_durations_s, now_s - start_s)

    def give_up(self, shard: int) -> None:
        """The shard is quarantined."""
        del self._running[shard]

    def lose(self, shard: int, start_s: float) -> None:
        """The call that was started at ``start_s`` died; queue the shard if no copy is left."""
        running = self._running[shard]
        running.starts_s.remove(start_s)
        if not running.starts_s:
            del self._running[shard]
            self._lost.append(running.task)

    def seconds_to_copy(self, now_s: float) -> float | None:
        """Time until :meth:`take` would give a copy; None if another event must come first."""
        limit_s = self._slow_after_s()
        starts_s = [r.starts_s[0] for r in self._running.values() if _may_copy(r)]
        if limit_s is None or not starts_s:
            return None
        return max(0.0, min(starts_s) + limit_s - now_s)

    def _take_fresh(self, worker: Hashable) -> Task | None:
        """A shard that the worker owns, else one without an owner, else any."""
        self.read_ahead()
        if not self._next:
            return None
        owners = [self._owners.get(task.shard) for task in self._next]
        for wanted in (worker, None):
            if wanted in owners:
                return self._next.pop(owners.index(wanted))
        return self._next.pop(0)

    def _take_slow(self, now_s: float) -> Task | None:
        if self.seconds_to_copy(now_s) != 0.0:
            return None
        return min(filter(_may_copy, self._running.values()), key=lambda r: r.starts_s[0]).task

    def _slow_after_s(self) -> float | None:
        durations_s = self._sorted_durations_s
        if len(durations_s) < _MIN_FINISHED:
            return None
        return max(_MIN_SLOW_S, SLOW_FACTOR * statistics.median(durations_s))


def _may_copy(running: _Running) -> bool:
    return len(running.starts_s) < MAX_COPIES
