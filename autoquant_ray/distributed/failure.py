"""What to do when a worker dies or a shard fails: decisions only, no actions, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from autoquant_ray.errors import NonFiniteError


class Decision(Enum):
    """Fate of the shard that was in a failed worker's hands."""

    RETRY = "retry"
    QUARANTINE = "quarantine"
    FAIL = "fail"


@dataclass
class FailurePolicy:
    """One budget per kind of failure.

    A killed worker says nothing about its shard (out of memory, preemption, a crash), so the
    shard goes to another worker; a shard that has killed ``max_kills_per_shard`` workers is
    quarantined. A NaN or infinity would come back on any worker: quarantined at once. Any other
    error is a defect or a wrong input that would repeat on every shard: the run fails, with the
    finished shards kept.

    Attributes:
        max_replacements: Workers that may be started in place of dead ones.
        max_kills_per_shard: Deaths after which a shard is quarantined.
    """

    max_replacements: int
    max_kills_per_shard: int = 3
    num_replacements: int = 0
    kills: dict[int, int] = field(default_factory=dict)

    def on_worker_death(self, shard: int | None) -> Decision:
        """A worker died; ``shard`` is what it worked on, None if nobody waited for its result."""
        if shard is None:
            return Decision.RETRY
        self.kills[shard] = self.kills.get(shard, 0) + 1
        if self.kills[shard] >= self.max_kills_per_shard:
            return Decision.QUARANTINE
        return Decision.RETRY

    def on_error(self, error: BaseException) -> Decision:
        """A worker is alive and reported an error for its shard."""
        return Decision.QUARANTINE if isinstance(error, NonFiniteError) else Decision.FAIL

    def take_replacement(self) -> bool:
        """Use one replacement if the budget still has one."""
        if self.num_replacements >= self.max_replacements:
            return False
        self.num_replacements += 1
        return True
