"""The benchmark of the driver, small: two nodes of four fake GPUs, and a worker that never ends."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from warm_commands import warm_ray

from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.placement import place_workers
from autoquant_ray.distributed.pool import WorkerPool
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.runs.names import SCORES
from autoquant_ray.runs.parts import Parts
from autoquant_ray.stages import score as stages
from autoquant_ray.stages.aggregate import aggregate_parts, score_part

NUM_SHARDS, NUM_WORKERS = 200, 8


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """``benchmarks/driver_scale.py``, which workers cannot import."""
    path = Path(__file__).parents[2] / "benchmarks" / "driver_scale.py"
    spec = importlib.util.spec_from_file_location("driver_scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        patch.setitem(sys.modules, "driver_scale", module)
        spec.loader.exec_module(module)
        cloudpickle.register_pickle_by_value(module)
        yield module
        cloudpickle.unregister_pickle_by_value(module)


def test_score_on_two_nodes_with_a_straggler_counts_every_shard_once(
    benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScanConfig(model="none", data="none", out=str(tmp_path / "run"), bits=8)
    state = benchmark.make_run(config, NUM_SHARDS, num_samples=2)
    plan = benchmark.make_plan()
    spec = benchmark.WaitingSpec(wait_s=0.05, slow_flag=str(tmp_path / "slow"), slowdown=1e6)
    events: list[tuple[str, Any]] = []
    num_tasks_alive = []

    def on_event(event: str, **details: Any) -> None:
        events.append((event, details.get("shard")))
        if event == "shard_done" and len(events) % 20 == 0:
            num_tasks_alive.append(sum(isinstance(o, ShardTask) for o in gc.get_objects()))

    monkeypatch.setattr(state.directory, "append_event", on_event)
    with warm_ray(), benchmark.cluster(2, 4) as resources:
        placement = place_workers(config, resources, device="cuda", worker_bytes=1)
        assert (placement.num_workers, placement.gpus_per_worker) == (NUM_WORKERS, 1)
        with WorkerPool(spec, placement, on_event) as pool:
            stages.score(state, pool, plan, Calibration(), "fingerprint")

    done = Counter(shard for event, shard in events if event == "shard_done")
    assert done == Counter(range(NUM_SHARDS))
    copies = Counter(shard for event, shard in events if event == "shard_copied")
    assert set(copies.values()) == {1}  # the straggler's; on a busy machine others' last ones too
    assert 0 < max(num_tasks_alive) <= NUM_WORKERS + 4
    assert state.directory.list_parts(SCORES) == list(range(NUM_SHARDS))
    assert totals(Parts(state.directory, SCORES, range(NUM_SHARDS))) == totals(
        in_one_process(benchmark, plan)
    )


def in_one_process(benchmark: Any, plan: Any) -> list[Any]:
    """The same parts without workers."""
    keys, formats = plan.score_keys, [format_.name for format_ in plan.formats]
    scorer = benchmark.WaitingScorer(0.0)
    samples = [range(512)] * 2
    return [
        score_part(shard, keys, formats, scorer.score(samples, 2 * shard, {}, shard))
        for shard in range(NUM_SHARDS)
    ]


def totals(parts: Any) -> list[dict[str, Any]]:
    """What the aggregation makes of parts; compared exactly."""
    keys = zip(*(parts[0].column(name).to_pylist() for name in ("group", "format")), strict=True)
    costs = {"is_searched": True, "weight_bits": 4.0, "weight_bytes": 1.0}
    plan_rows = [{"group": g, "format": f} | costs for g, f in keys]
    return aggregate_parts(parts, plan_rows, "token").rows
