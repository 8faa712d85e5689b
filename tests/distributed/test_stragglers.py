"""Slow workers do not hold a stage: copies, losers that live on, losers that die."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import cloudpickle

from autoquant_ray.distributed.placement import Placement
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.distributed.task import ShardTask

# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PLACEMENT = Placement(num_workers=2, cpus_per_worker=1, gpus_per_worker=0, device="cpu")

pytestmark = pytest.mark.usefixtures("ray_local")


class NoModelSpec:
    """Spec of a scorer that is not used."""

    def build(self) -> None:
        """Nothing to load."""


@dataclass
class Pool:
    """A pool of two workers with its events; a file per (call, shard) says who started what."""

    pool: WorkerPool
    events: list[tuple[str, dict[str, Any]]]
    folder: Path

    def run(self, count: int, function: Any) -> Iterator[Outcome]:
        """Run shards; the function gets the folder and the task."""
        tasks = (ShardTask(shard=s, first_sample=s, samples=[]) for s in range(count))
        folder = self.folder

        def submit(worker: Any, task: ShardTask) -> Any:
            return worker.__ray_call__.remote(lambda _worker: function(folder, task))

        return self.pool.run(tasks, submit)

    def named(self, event: str) -> list[dict[str, Any]]:
        """Details of all events of one name."""
        return [details for name, details in self.events if name == event]


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Pool]:
    events: list[Any] = []
    with WorkerPool(
        NoModelSpec(), PLACEMENT, lambda event, **details: events.append((event, details))
    ) as pool:
        yield Pool(pool, events, tmp_path)


def wait_for_file(path: Path) -> None:
    pause = threading.Event()
    while not path.exists():
        pause.wait(0.02)


def number_of_call(folder: Path, shard: int) -> int:
    """Which call of this shard this is, from 0."""
    process_file = folder / f"call-of-{os.getpid()}"
    process_file.write_text(str(os.getpid()))
    for number in itertools.count():
        try:
            os.link(process_file, folder / f"call-{shard}-{number}")
        except FileExistsError:
            continue
        return number
    raise AssertionError


def first_call_of_shard_0_waits(folder: Path, task: ShardTask) -> tuple[int, int]:
    if task.shard == 0 and number_of_call(folder, 0) == 0:
        wait_for_file(folder / "release")
    return task.shard, os.getpid()


def both_at_once(folder: Path, task: ShardTask) -> int:
    """Ends only if two workers run shards 0 and 1 at the same time."""
    (folder / f"met-{task.shard}").touch()
    wait_for_file(folder / f"met-{1 - task.shard}")
    return os.getpid()


def process_of_first_call(two_workers: Pool) -> int:
    """The process that got shard 0 first."""
    path = two_workers.folder / "call-0-0"
    wait_for_file(path)
    return int(path.read_text())


def results(outcomes: Iterator[Outcome]) -> list[Any]:
    return sorted(outcome.result for outcome in outcomes)


def test_pool_slow_worker_holds_neither_this_stage_nor_the_next(two_workers: Pool) -> None:
    first = results(two_workers.run(6, first_call_of_shard_0_waits))
    assert [shard for shard, _ in first] == list(range(6))
    assert two_workers.named("shard_copied") == [{"shard": 0}]
    slow = process_of_first_call(two_workers)
    assert slow not in {process for _, process in first}

    second = results(two_workers.run(6, first_call_of_shard_0_waits))
    assert [shard for shard, _ in second] == list(range(6))
    assert slow not in {process for _, process in second}

    (two_workers.folder / "release").touch()
    assert slow in results(two_workers.run(2, both_at_once))
    assert two_workers.named("worker_died") == []


def test_pool_loser_that_dies_is_replaced_and_blames_no_shard(two_workers: Pool) -> None:
    results(two_workers.run(6, first_call_of_shard_0_waits))
    slow = psutil.Process(process_of_first_call(two_workers))
    slow.send_signal(signal.SIGKILL)
    assert slow.pid not in results(two_workers.run(2, both_at_once))
    (died,) = two_workers.named("worker_died")
    assert died["shard"] is None
    assert len(two_workers.named("worker_ready")) == 3


def test_pool_copy_that_dies_leaves_the_original_running(two_workers: Pool) -> None:
    def copy_dies(folder: Path, task: ShardTask) -> tuple[int, int]:
        if task.shard == 0:
            if number_of_call(folder, 0) == 1:
                os._exit(1)
            wait_for_file(folder / "release")
        return task.shard, os.getpid()

    def on_event(event: str, **details: Any) -> None:
        two_workers.events.append((event, details))
        if event == "worker_died":
            (two_workers.folder / "release").touch()

    with WorkerPool(NoModelSpec(), PLACEMENT, on_event) as pool:
        two_workers.pool = pool
        returned = results(two_workers.run(6, copy_dies))
    assert [shard for shard, _ in returned] == list(range(6))
    assert [died["shard"] for died in two_workers.named("worker_died")] == [0]
    assert two_workers.named("shard_quarantined") == []


def test_pool_copies_that_kill_three_workers_quarantine_the_shard(two_workers: Pool) -> None:
    def copies_die(folder: Path, task: ShardTask) -> int:
        if task.shard == 0:
            if number_of_call(folder, 0) > 0:
                os._exit(1)
            wait_for_file(folder / "release")
        return task.shard

    outcomes = list(two_workers.run(6, copies_die))
    assert sorted(o.result for o in outcomes if o.reason is None) == [1, 2, 3, 4, 5]
    (quarantined,) = [o for o in outcomes if o.reason is not None]
    assert (quarantined.task.shard, quarantined.reason) == (0, "killed 3 workers")
    assert [died["shard"] for died in two_workers.named("worker_died")] == [0, 0, 0]
    (two_workers.folder / "release").touch()
    assert len(set(results(two_workers.run(2, both_at_once)))) == 2


def test_pool_loser_that_fails_is_no_failure(two_workers: Pool) -> None:
    def first_call_fails_late(folder: Path, task: ShardTask) -> int:
        if task.shard == 0 and number_of_call(folder, 0) == 0:
            wait_for_file(folder / "release")
            raise ValueError("too late to matter")
        return task.shard

    assert results(two_workers.run(6, first_call_fails_late)) == list(range(6))
    (two_workers.folder / "release").touch()
    assert len(set(results(two_workers.run(2, both_at_once)))) == 2
    assert two_workers.named("worker_died") == []


def test_pool_closed_early_leaves_workers_usable(two_workers: Pool) -> None:
    outcomes = two_workers.run(1000, first_call_of_shard_0_waits)
    assert next(outcomes).task.shard != 0
    outcomes.close()
    slow = process_of_first_call(two_workers)
    again = results(two_workers.run(6, first_call_of_shard_0_waits))
    assert [shard for shard, _ in again] == list(range(6))
    assert slow not in {process for _, process in again}
    (two_workers.folder / "release").touch()
    assert slow in results(two_workers.run(2, both_at_once))


def test_pool_dropped_generator_that_ends_late_does_not_disturb_the_next(
    two_workers: Pool,
) -> None:
    dropped = two_workers.run(1000, first_call_of_shard_0_waits)
    next(dropped)
    process_of_first_call(two_workers)
    following = two_workers.run(6, first_call_of_shard_0_waits)
    returned = [next(following).result]
    dropped.close()
    returned += [outcome.result for outcome in following]
    assert sorted(shard for shard, _ in returned) == list(range(6))
