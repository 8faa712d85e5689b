"""Work on shards: tasks, parts as they arrive, and which parts are whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from autoquant_ray.data.sample_parts import samples_of
from autoquant_ray.distributed.interrupts import stop_on_signal
from autoquant_ray.distributed.pool import Outcome, Submit, WorkerPool
from autoquant_ray.distributed.progress import Throughput, progress
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.errors import Interrupted, StoreError, WorkerError
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import SAMPLES, part_name
from autoquant_ray.runs.parts import map_ahead
from autoquant_ray.runs.state import RunState


def read_tasks(directory: RunDirectory, folder: str, shards: Iterable[int]) -> Iterator[ShardTask]:
    """Shards in the form that workers take, each read only when it is asked for.

    Args:
        directory: The run.
        folder: Folder of the sample parts.
        shards: Their numbers.
    """
    for shard in shards:
        table = directory.read_table(part_name(folder, shard))
        yield ShardTask(
            shard=shard,
            first_sample=table.column("sample")[0].as_py(),
            samples=samples_of(table),
        )


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage gives to the pool.

    Attributes:
        stage: Its name.
        tasks: Shards to do.
        submit: How to start a task on a worker.
        num_done: Shards that were done before.
        write: Writes a shard's part.
        is_enough: Whether the stage may end after this shard; asked once per shard.
    """

    stage: str
    tasks: Iterator[ShardTask]
    submit: Submit
    num_done: int
    write: Callable[[Outcome], str]
    is_enough: Callable[[int], bool] = lambda _shard: False


def collect(state: RunState, pool: WorkerPool, work: Work) -> None:
    """Write each shard's part as it arrives, until there are enough; note quarantined shards.

    Raises:
        Interrupted: SIGTERM or Ctrl-C; what was in flight has been written, as far as it ended
            within the grace period.
    """
    throughput = Throughput()
    total, num_kept = state.num_shards - len(state.left_out), work.num_done
    with (
        stop_on_signal(pool.grace_s) as stop,
        closing(pool.run(work.tasks, work.submit, stop)) as outcomes,
        progress(work.stage, total, work.num_done) as advance,
    ):
        for outcome in outcomes:
            shard, num_tokens = outcome.task.shard, 0
            if outcome.reason is not None:
                logger.warning("shard %d is quarantined: %s", shard, outcome.reason)
                state.quarantine(shard, work.stage, outcome.reason)
            else:
                state.require_lease()
                work.write(outcome)
                num_tokens = note_done(state.directory, work.stage, outcome)
                num_kept += 1
            advance(f"{throughput.add(num_tokens):,.0f} tokens/s, {outcome.num_workers} worker(s)")
            if work.is_enough(shard):
                break
    if stop.is_made:
        raise Interrupted(
            f"interrupted: stage {work.stage} has {num_kept} of {total} shards, all kept; go on "
            "with `resume`"
        )
    if len(state.left_out) == state.num_shards:
        reason = state.record.quarantined[0]["reason"]
        raise WorkerError(f"every shard failed, the first with: {reason}")


def note_done(directory: RunDirectory, stage: str, outcome: Outcome) -> int:
    """Write the event of a shard whose part is written; returns its number of tokens.

    Requests of benchmark tasks have none: their texts are cut into tokens by the workers.
    """
    samples = outcome.task.samples if isinstance(outcome.task, ShardTask) else ()
    num_tokens = sum(map(len, samples))
    directory.append_event(
        "shard_done",
        stage=stage,
        shard=outcome.task.shard,
        num_tokens=num_tokens,
        seconds=round(outcome.seconds, 3),
        pid=outcome.process_id,
    )
    return num_tokens


def tasks_of(state: RunState, done: Sequence[int]) -> Iterator[ShardTask]:
    """Shards still to do."""
    skip = set(done) | state.left_out
    shards = (shard for shard in range(state.num_shards) if shard not in skip)
    return read_tasks(state.directory, SAMPLES, shards)


def intact_parts(
    state: RunState, folder: str, is_complete: Callable[[int, Any], bool]
) -> list[int]:
    """Shards whose part is there and whole; a damaged part is deleted with a warning."""

    def is_intact(shard: int) -> bool:
        try:
            return is_complete(shard, state.directory.read_table(part_name(folder, shard)))
        except StoreError:
            return False

    intact = []
    shards = state.directory.list_parts(folder)
    for shard, whole in zip(shards, map_ahead(is_intact, shards), strict=True):
        if whole:
            intact.append(shard)
            continue
        name = part_name(folder, shard)
        logger.warning("%s is damaged; shard %d is done again", name, shard)
        state.directory.append_event("part_damaged", part=name)
        state.directory.delete(name)
    return intact
