"""Faults on a cluster of several nodes: nothing is lost, nothing counts twice, no byte changes."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from warm_commands import warm_ray

NUM_SHARDS = 12
ALL = range(NUM_SHARDS)


@pytest.fixture(scope="module")
def drills() -> Iterator[Any]:
    """``benchmarks/drills.py``, which measures the same faults."""
    names = ("drills", "drill_kit", "drill_cluster", "drill_disk", "machine", "nodes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        yield importlib.import_module("drills")
        for name in names:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def shared(drills: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster, and a scan that nothing disturbed."""
    with warm_ray(), drills.setting(tmp_path_factory.mktemp("drills")) as setting:
        yield setting


def done(drill: Any, stage: str = "score") -> Counter[int]:
    """How often each shard was noted as done."""
    return Counter(e["shard"] for e in drill.events("shard_done") if e["stage"] == stage)


def assert_unharmed(shared: Any, drill: Any) -> None:
    assert shared.is_unharmed(drill.run)
    for folder in ("scores", "calibration"):
        names = sorted(path.name for path in (drill.run / folder).iterdir())
        assert names == [f"shard-{shard:06d}.parquet" for shard in ALL]
    for shard in ALL:
        part = pq.read_table(drill.run / "scores" / f"shard-{shard:06d}.parquet")
        assert part.column("shard").unique().to_pylist() == [shard]
    assert json.loads((drill.run / "run.json").read_text())["quarantined"] == []


def assert_one_line(stderr: str, *words: str) -> None:
    """The last line of stderr is the error, and there is no traceback."""
    last = stderr.splitlines()[-1]
    assert last.startswith("error: "), stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in last


@pytest.mark.parametrize("stage", ["calibrate", "score"])
def test_node_killed_in_a_stage_costs_no_shard(stage: str, drills: Any, shared: Any) -> None:
    drill = drills.node_killed(shared, stage)
    assert_unharmed(shared, drill)
    (died,) = drill.events("worker_died")
    assert (died["shard"], died["decision"]) == (2, "retry")
    assert done(drill, stage) == Counter(ALL)
    calls = [call for call in drill.calls(stage) if call[0] == 2]
    assert len(calls) == 2
    assert calls[0][2] != calls[1][2]


def test_gpu_lost_with_its_node_is_waited_for(drills: Any, shared: Any) -> None:
    drill = drills.gpu_lost(shared)
    assert_unharmed(shared, drill)
    assert [died["shard"] for died in drill.events("worker_died")] == [2]
    assert done(drill) == Counter(ALL)
    nodes = list(dict.fromkeys(node for _, _, node in drill.calls("score")))
    assert len(nodes) == 2
    assert nodes[1:] == drill.notes


def test_node_that_joins_gets_a_worker(drills: Any, shared: Any) -> None:
    drill = drills.node_joins(shared)
    assert_unharmed(shared, drill)
    assert [event["num_wanted"] for event in drill.events("pool_grew")] == [2]
    assert drill.events("worker_died") == []
    assert done(drill) == Counter(ALL)
    assert drill.notes[0] in {node for _, _, node in drill.calls("score")}


def test_worker_that_takes_too_much_memory_is_killed_by_ray(drills: Any, shared: Any) -> None:
    drill = drills.out_of_memory(shared)
    assert_unharmed(shared, drill)
    died = drill.events("worker_died")
    assert died[0]["shard"] == 2
    assert "memory" in died[0]["reason"]
    assert done(drill) == Counter(ALL)


@pytest.mark.parametrize(("half", "times_run"), [("request", 1), ("response", 2)])
def test_call_that_is_lost_counts_once(half: str, times_run: int, drills: Any, shared: Any) -> None:
    drill = drills.push_lost(shared, half)
    assert_unharmed(shared, drill)
    (died,) = drill.events("worker_died")
    started = Counter(shard for shard, _, _ in drill.calls("score"))
    assert started[died["shard"]] == times_run
    assert done(drill) == Counter(ALL)


def test_driver_killed_before_it_noted_a_part_keeps_it(drills: Any, shared: Any) -> None:
    drill = drills.driver_killed(shared)
    assert_unharmed(shared, drill)
    returncode, parts = drill.notes
    assert returncode == -9
    assert len(parts) == 3
    assert parts.items() <= drills.part_times(drill).items()
    unnoted = Counter(ALL) - done(drill)
    assert sum(unnoted.values()) == 1
    (shard,) = unnoted
    assert f"shard-{shard:06d}.parquet" in parts


def test_second_driver_on_a_run_is_refused(drills: Any, shared: Any) -> None:
    drill = drills.second_driver(shared)
    assert_unharmed(shared, drill)
    for returncode, stderr in drill.notes[0]:
        assert returncode == 2
        assert_one_line(stderr, "is in use by process")
    assert done(drill) == Counter(ALL)
    assert len(drill.calls("score")) == NUM_SHARDS


@pytest.mark.parametrize(
    ("fault", "reason", "remedy"),
    [
        ("disk_full", "No space left on device", "free space"),
        ("disk_read_only", "Read-only file system", "make it writable"),
    ],
)
def test_disk_that_cannot_be_written_stops_with_one_line(
    fault: str, reason: str, remedy: str, drills: Any, shared: Any
) -> None:
    try:
        drill = getattr(drills, fault)(shared)
    except PermissionError as error:
        pytest.skip(str(error))
    assert_unharmed(shared, drill)
    returncode, stderr, parts = drill.notes
    assert returncode == 1
    assert_one_line(stderr, reason, remedy, "--resume")
    assert 0 < len(parts) < NUM_SHARDS
    assert parts.items() <= drills.part_times(drill).items()


def test_sigterm_on_a_cluster_keeps_the_shard_in_flight(drills: Any, shared: Any) -> None:
    drill = drills.driver_stopped(shared)
    assert_unharmed(shared, drill)
    returncode, stderr, parts = drill.notes
    assert returncode == 130
    assert "4 of 12 shards" in stderr.splitlines()[-1]
    assert sorted(parts) == [f"shard-{shard:06d}.parquet" for shard in range(4)]
    assert [event["shards"] for event in drill.events("stop_requested")] == [[3]]
    assert [shard for shard, _, _ in drill.calls("score")] == [0, 1, 2, 3]
    assert done(drill) == Counter(ALL)
