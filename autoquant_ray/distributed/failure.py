"""What to do when a worker dies, a shard fails or a cluster does not start: decisions, no Ray."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from autoquant_ray.errors import NonFiniteError, one_line

logger = logging.getLogger(__name__)

MAX_STARTS = 3
_TIMED_OUT = re.compile(r"timed out|within \d+ (s\b|seconds)|deadline exceeded", re.IGNORECASE)


class Decision(Enum):
    """What happens to a shard that a worker failed to compute."""

    RETRY = "retry"
    QUARANTINE = "quarantine"
    FAIL = "fail"


@dataclass
class FailurePolicy:
    """One budget per kind of failure.

    A killed worker says nothing about its shard (out of memory, preemption, a crash), so the
    shard goes to another worker; a shard that has killed ``max_kills_per_shard`` workers is
    quarantined. A shard with a NaN or infinity, which would come back on any worker, is
    quarantined at once. Any other error is a defect or a wrong input that would repeat on every
    shard: the run fails, with the finished shards kept.

    Attributes:
        max_replacements: Workers that may be started in place of dead ones.
        max_kills_per_shard: Deaths after which a shard is quarantined.
    """

    max_replacements: int
    max_kills_per_shard: int = 3
    num_replacements: int = 0
    kills: dict[int, int] = field(default_factory=dict)

    def on_worker_death(self, shard: int | None) -> Decision:
        """A worker died; ``shard`` is what it worked on, None if its result was not needed."""
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


def is_timeout(error: BaseException) -> bool:
    """Whether the start of a local cluster took too long, as it does on a busy machine.

    Ray raises :class:`TimeoutError`, :class:`RuntimeError` or plain :class:`Exception` for it,
    depending on the process that it waited for; only the text tells that it was a timeout.
    """
    return isinstance(error, TimeoutError) or _TIMED_OUT.search(str(error)) is not None


def start_in_time(
    start: Callable[[], object], clean_up: Callable[[], object], max_starts: int = MAX_STARTS
) -> None:
    """Start something; where that times out, try again.

    Args:
        start: Starts it.
        clean_up: Removes what a start that timed out has left.
        max_starts: Tries in all.

    Raises:
        RuntimeError: No start was in time.
        Exception: What ``start`` raised for any other reason, at once.
    """
    for tries in range(1, max_starts + 1):
        try:
            start()
        except Exception as error:
            if not is_timeout(error):
                raise
            clean_up()
            if tries == max_starts:
                raise RuntimeError(f"{one_line(error)} ({tries} times)") from None
            logger.warning("Ray did not start in time, trying again: %s", one_line(error))
        else:
            return
