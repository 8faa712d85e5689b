"""The stages of a scan. Each reads files, writes files, and is skipped when it is up to date.

The pool decides which worker gets which shard, and the scorer in the worker computes the scores. A
stage's parts (one file per shard) are never recomputed while they are intact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoquant_ray.allocate.options import solve_options
from autoquant_ray.allocate.problem import Problem
from autoquant_ray.allocate.search import check_feasible
from autoquant_ray.arrays import Mask
from autoquant_ray.config.scan import ScanConfig
from autoquant_ray.distributed.pool import Outcome, WorkerPool
from autoquant_ray.distributed.task import ShardTask
from autoquant_ray.plan.plan import Plan
from autoquant_ray.plan.silent_experts import note_silent_experts, silent_experts
from autoquant_ray.quantize.calibration import Calibration
from autoquant_ray.runs.directory import RunDirectory
from autoquant_ray.runs.names import (
    PLAN_FILE,
    RESAMPLING_FILE,
    SAMPLES,
    SCORES,
    SENSITIVITY_FILE,
    part_name,
)
from autoquant_ray.runs.parts import Parts
from autoquant_ray.runs.state import RunState
from autoquant_ray.runs.weight_hashes import hash_groups
from autoquant_ray.stages import row_shares
from autoquant_ray.stages import stopping as stopping_stage
from autoquant_ray.stages.aggregate import aggregate_parts, is_complete_part, score_part
from autoquant_ray.stages.domain_scores import write_domain_scores
from autoquant_ray.stages.shards import Work, collect, intact_parts, read_tasks, tasks_of
from autoquant_ray.stages.shared_rounding import for_workers

logger = logging.getLogger(__name__)


def write_plan(state: RunState, plan: Plan, fingerprint: str, weights: Path | None = None) -> None:
    """Write ``plan.parquet``, and the summary and hashes that spare later commands the model.

    Args:
        state: The run.
        plan: What to write.
        fingerprint: Of the stage.
        weights: Folder of the model's safetensors files, if it has any.
    """
    if state.is_done("plan", fingerprint):
        return
    with state.stage("plan", fingerprint):
        silent = silent_experts(state.plan) if state.record.plan is not None else []
        state.record.plan = plan.summary()
        note_silent_experts(state.plan, silent)  # until scores are added up again
        if weights is not None:
            modules = {g.name: [m.name for m in g.modules] for g in plan.groups if not g.is_cache}
            state.record.weights = hash_groups(weights, modules)
        state.directory.write_table(PLAN_FILE, plan.rows())


def is_scored(state: RunState, plan: Plan, fingerprint: str) -> bool:
    """Whether every shard that the result is made of has a whole scores part.

    A finished score stage that lost parts is opened again.
    """
    if not state.is_done("score", fingerprint):
        return False
    done = intact_parts(state, SCORES, _is_complete(plan))
    if set(done) >= set(state.used_shards):
        return True
    state.reopen("score", "aggregate")
    return False


def score(
    state: RunState, pool: WorkerPool, plan: Plan, calibration: Calibration, fingerprint: str
) -> None:
    """Sensitivity sums of every shard -> ``scores/shard-*.parquet``.

    With ``stop_when_stable``, of the first shards until the allocation is stable. Workers go on
    with later shards while that is decided; what they return is dropped. With ``sample_rows``
    auto, the first shards are scored on all rows before the others, which wait for them.
    """
    import ray

    rule = stopping_stage.make_rule(state, plan)

    def is_enough(shard: int) -> bool:
        return rule is not None and stopping_stage.is_enough(state, rule, shard)

    state.record.stopping = None
    with state.stage("score", fingerprint):
        calibration = for_workers(state.directory, calibration)
        work = _ScoreWork(state, pool, plan, ray.put(calibration), is_enough)
        done, shares = intact_parts(state, SCORES, _is_complete(plan)), None
        if state.config.get("sample_rows") == "auto":
            done, shares = work.share_rows(done)
        if not any(is_enough(shard) for shard in sorted({*done, *state.left_out})):
            work.collect(done, tasks_of(state, done), shares)
        if rule is not None:
            stopping_stage.keep_used(state, rule)


class _ScoreWork:
    """Gives shards to the workers and writes their scores.

    Args:
        state: The run.
        pool: The workers.
        plan: The run's plan.
        calibration: Reference of it.
        is_enough: Whether a shard makes enough of them; asked once per shard.
    """

    def __init__(
        self,
        state: RunState,
        pool: WorkerPool,
        plan: Plan,
        calibration: Any,
        is_enough: Callable[[int], bool],
    ) -> None:
        self._state = state
        self._pool = pool
        self._plan = plan
        self._calibration = calibration
        self._is_enough = is_enough

    def share_rows(self, done: Sequence[int]) -> tuple[list[int], Any]:
        """Score the first shards on all rows where they are not; the other shards' shares.

        Args:
            done: Shards whose parts are whole.

        Returns:
            Shards whose parts fit, and a reference of the shares.
        """
        import ray

        state, plan = self._state, self._plan
        while True:  # a shard that fails is left out, and another becomes one of the first
            first = row_shares.first_shards(state)
            parts = Parts(state.directory, SCORES, [s for s in first if s in set(done)])
            fit = {int(t.column("shard")[0].as_py()) for t in parts if row_shares.is_trial(t)}
            missing = [shard for shard in first if shard not in fit]
            if not missing:
                break
            self.collect(done, read_tasks(state.directory, SAMPLES, missing), None, is_last=False)
            done = intact_parts(state, SCORES, _is_complete(plan))
        has_GF = _scored_pairs(plan)
        shares_GF = row_shares.shares_of_run(state, first, has_GF)
        others = [shard for shard in done if shard not in set(first)]
        kept = [*first, *row_shares.drop_other_shares(state, others, shares_GF[has_GF])]
        return sorted(kept), ray.put(shares_GF)

    def collect(
        self, done: Sequence[int], tasks: Iterator[ShardTask], shares: Any, is_last: bool = True
    ) -> None:
        """Write parts as they arrive.

        Args:
            done: Shards that have theirs.
            tasks: Shards to score.
            shares: Reference of the shares of their rows; None without.
            is_last: Whether to stop where there are enough.
        """
        plan, arguments = self._plan, () if shares is None else (shares,)
        formats, experts = [format_.name for format_ in plan.formats], {*plan.single_experts}
        work = Work(
            stage="score",
            tasks=tasks,
            submit=lambda worker, task: worker.score.remote(task, self._calibration, *arguments),
            num_done=len(done),
            write=partial(_write_part, self._state.directory, plan.score_keys, formats, experts),
            is_enough=self._is_enough if is_last else lambda _shard: False,
        )
        collect(self._state, self._pool, work)


def _scored_pairs(plan: Plan) -> Mask:
    """Groups and formats ``(G, F)`` that a part has rows of."""
    keys = set(plan.score_keys)
    return np.array([[(g.name, f.name) in keys for f in plan.formats] for g in plan.searched])


def _write_part(
    directory: RunDirectory,
    keys_K: Sequence[tuple[str, str]],
    formats: Sequence[str],
    experts: Collection[str],
    outcome: Outcome,
) -> str:
    """Write a shard's scores; returns the path."""
    shard, groups = outcome.task.shard, dict.fromkeys(group for group, _ in keys_K)
    num_rows = zip(groups, outcome.result.sums.num_rows_G, strict=True)
    if unseen := [group for group, rows in num_rows if not rows and group not in experts]:
        logger.warning("shard %d gave no gradient to %s", shard, ", ".join(unseen[:3]))
    part = score_part(shard, keys_K, formats, outcome.result)
    return directory.write_table(part_name(SCORES, shard), part)


def aggregate(state: RunState, config: ScanConfig, fingerprint: str) -> None:
    """Add up the shards' parts into ``sensitivity.parquet``."""
    if state.is_done("aggregate", fingerprint):
        return
    directory = state.directory
    with state.stage("aggregate", fingerprint):
        plan_rows = directory.read_table(PLAN_FILE).to_pylist()
        parts = Parts(directory, SCORES, state.used_shards)
        result = aggregate_parts(parts, plan_rows, config.estimator)
        directory.write_table(RESAMPLING_FILE, result.buckets)
        write_domain_scores(state, plan_rows, config.estimator, result.left_out)
        note_silent_experts(state.plan, result.left_out)
        directory.write_table(SENSITIVITY_FILE, result.rows)
        state.record.used = stopping_stage.used_data(state, state.used_shards)


def check_budget(plan: Plan, config: ScanConfig) -> None:
    """Refuse a budget that cannot be met, before any work.

    Raises:
        InfeasibleBudgetError: With the reachable range.
    """
    check_feasible(Problem.from_plan(plan.rows(), plan.summary()), solve_options(config))


def _is_complete(plan: Plan) -> Callable[[int, Any], bool]:
    keys = plan.score_keys
    return lambda shard, table: is_complete_part(table, shard, keys)
