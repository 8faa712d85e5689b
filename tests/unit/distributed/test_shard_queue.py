"""Which shard a free worker gets, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autoquant_ray.distributed.shard_queue import ShardQueue
from autoquant_ray.distributed.task import ShardTask


def tasks(count: int) -> Iterator[ShardTask]:
    return (ShardTask(shard=shard, first_sample=shard, samples=[]) for shard in range(count))


def take(queue: ShardQueue, now_s: float) -> int | None:
    task = queue.take(now_s)
    return None if task is None else task.shard


@pytest.fixture
def tail() -> ShardQueue:
    """Three shards finished in 10 s each; shards 3 and 4 run since seconds 0 and 5."""
    queue = ShardQueue(tasks(5))
    assert [take(queue, now_s) for now_s in (0, 0, 0, 0, 5)] == [0, 1, 2, 3, 4]
    for shard in range(3):
        queue.finish(shard, 0, 10)
    return queue


def test_queue_gives_shards_in_order_then_nothing() -> None:
    queue = ShardQueue(tasks(2))
    assert [take(queue, 0), take(queue, 0), take(queue, 1000)] == [0, 1, None]
    assert not queue.is_done
    queue.finish(0, 0, 1000)
    queue.finish(1, 0, 1000)
    assert queue.is_done


def test_queue_lost_shard_comes_before_fresh_ones() -> None:
    queue = ShardQueue(tasks(3))
    assert [take(queue, 0), take(queue, 1)] == [0, 1]
    queue.lose(0, 0)
    assert [take(queue, 2), take(queue, 2)] == [0, 2]


def test_queue_reads_one_shard_ahead_and_no_more() -> None:
    pulled = []
    queue = ShardQueue(task for task in tasks(9) if not pulled.append(task.shard))
    take(queue, 0)
    for _ in range(3):
        queue.read_ahead()
    assert pulled == [0, 1]
    assert take(queue, 0) == 1
    assert pulled == [0, 1]


def test_queue_copies_only_what_is_unusually_long(tail: ShardQueue) -> None:
    assert take(tail, 17) is None
    assert tail.seconds_to_copy(17) == 0.5
    assert take(tail, 17.5) == 3
    assert tail.num_copies(3) == 2
    assert tail.seconds_to_copy(17.5) == 5


def test_queue_gives_the_longest_first_and_at_most_two_copies(tail: ShardQueue) -> None:
    assert [take(tail, 100), take(tail, 100), take(tail, 100)] == [3, 4, None]
    assert tail.seconds_to_copy(200) is None


def test_queue_first_result_ends_all_copies(tail: ShardQueue) -> None:
    assert take(tail, 100) == 3
    tail.finish(3, 100, 110)
    tail.finish(4, 5, 110)
    assert tail.is_done


def test_queue_lost_copy_leaves_the_other_running(tail: ShardQueue) -> None:
    assert take(tail, 100) == 3
    tail.lose(3, 0)
    assert tail.num_copies(3) == 1
    assert [take(tail, 101), take(tail, 101)] == [4, None]
    assert take(tail, 117.5) == 3


def test_queue_shard_with_all_copies_lost_is_tried_again(tail: ShardQueue) -> None:
    assert take(tail, 100) == 3
    tail.lose(3, 100)
    tail.lose(3, 0)
    assert take(tail, 101) == 3
    assert tail.num_copies(3) == 1


def test_queue_tiny_shards_are_not_copied() -> None:
    queue = ShardQueue(tasks(4))
    assert [take(queue, 0) for _ in range(4)] == [0, 1, 2, 3]
    for shard in range(3):
        queue.finish(shard, 0, 0.01)
    assert take(queue, 0.9) is None
    assert take(queue, 1.0) == 3


def test_queue_without_three_finished_shards_copies_nothing() -> None:
    queue = ShardQueue(tasks(3))
    assert [take(queue, 0) for _ in range(3)] == [0, 1, 2]
    queue.finish(0, 0, 1)
    queue.finish(1, 0, 1)
    assert take(queue, 1e6) is None
    assert queue.seconds_to_copy(1e6) is None


def test_queue_given_up_shard_is_gone(tail: ShardQueue) -> None:
    tail.give_up(3)
    tail.give_up(4)
    assert tail.is_done


def test_queue_serves_an_owner_its_own_shard_first_and_others_what_nobody_owns() -> None:
    queue = ShardQueue(tasks(4), owners={0: "a", 1: "b", 3: "b"}, window=4)
    taken = [queue.take(0.0, worker) for worker in ("b", "c", "b", "a")]
    assert [task.shard for task in taken if task] == [1, 2, 3, 0]


def test_queue_gives_an_owned_shard_away_rather_than_let_a_worker_wait() -> None:
    queue = ShardQueue(tasks(2), owners={0: "a", 1: "a"}, window=2)
    taken = [queue.take(0.0, "b"), queue.take(0.0, "a")]
    assert [task.shard for task in taken if task] == [0, 1]
