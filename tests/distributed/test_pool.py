"""The pool with real workers: deaths, quarantine, errors."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from autoquant_ray.distributed.placement import Placement
from autoquant_ray.distributed.pool import WorkerPool
from autoquant_ray.distributed.scoring import ScoringSpec
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.errors import NonFiniteError, WorkerError
from autoquant_ray.formats.menu import resolve_formats
from autoquant_ray.models.find import find_model
from autoquant_ray.models.load import build_skeleton
from autoquant_ray.plan.plan import build_plan
from autoquant_ray.plan.scored_modules import ScoredModule

PLACEMENT = Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0, device="cpu")


@pytest.fixture(scope="module")
def spec(model_folder: Any) -> ScoringSpec:
    ref = find_model(str(model_folder("llama")))
    plan = build_plan(build_skeleton(ref), resolve_formats(("wint8_afp16",), device="cpu"))
    return ScoringSpec(
        model=ref,
        dtype="float32",
        device="cpu",
        num_threads=1,
        modules=(ScoredModule(group=0, planned=plan.groups[0].modules[0]),),
        formats=plan.formats,
        step_tokens=64,
        labels="data",
        label_draws=1,
        seed=0,
    )


def tasks(count: int) -> list[ShardTask]:
    samples = [np.arange(4, dtype=np.int32)]
    return [ShardTask(shard=shard, first_sample=shard, samples=samples) for shard in range(count)]


def call(function: Any) -> Any:
    """Submit a function that runs inside the worker process."""
    return lambda worker, task: worker.__ray_call__.remote(function, task)


def test_pool_shard_that_kills_three_workers_is_quarantined(
    ray_local: None, spec: ScoringSpec
) -> None:
    def poisonous(worker: Any, task: ShardTask) -> int:
        if task.shard == 1:
            os._exit(1)
        return task.shard

    seen: list[str] = []
    with WorkerPool(spec, PLACEMENT, lambda event, **_: seen.append(event)) as pool:
        outcomes = list(pool.run(tasks(3), call(poisonous)))
    assert sorted(o.result for o in outcomes if o.reason is None) == [0, 2]
    (quarantined,) = [o for o in outcomes if o.reason is not None]
    assert quarantined.task.shard == 1
    assert quarantined.reason == "killed 3 workers"
    assert seen.count("worker_died") == 3
    assert seen.count("shard_quarantined") == 1


def test_pool_error_of_the_program_stops_with_the_shard_named(
    ray_local: None, spec: ScoringSpec
) -> None:
    with (
        WorkerPool(spec, PLACEMENT, lambda *_, **__: None) as pool,
        pytest.raises(WorkerError, match="scoring shard 0: AttributeError"),
    ):
        list(pool.run(tasks(2), lambda worker, task: worker.score.remote(task, 17)))


def test_pool_non_finite_shard_is_quarantined_without_retry(
    ray_local: None, spec: ScoringSpec
) -> None:
    def unstable(worker: Any, task: ShardTask) -> int:
        if task.shard == 0:
            raise NonFiniteError("shard 0: the loss is nan")
        return task.shard

    with WorkerPool(spec, PLACEMENT, lambda *_, **__: None) as pool:
        outcomes = list(pool.run(tasks(2), call(unstable)))
    assert [(o.task.shard, o.reason) for o in outcomes] == [
        (0, "shard 0: the loss is nan"),
        (1, None),
    ]
