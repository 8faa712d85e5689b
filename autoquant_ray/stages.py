"""The stages of a scan. Each reads files, writes files, and is skipped when it is up to date.

Nothing here decides how work is spread; the pool does. Nothing here computes a score; the engine
does. A stage's parts (one file per shard) are never recomputed while they are intact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoquant_ray import stopping_stage
from autoquant_ray.aggregation import aggregate_parts, is_complete_part, score_part
from autoquant_ray.budget import Problem, solve_options
from autoquant_ray.config import ScanConfig
from autoquant_ray.distributed.pool import Outcome, Submit, WorkerPool
from autoquant_ray.distributed.progress import Throughput, progress
from autoquant_ray.distributed.worker import ShardTask
from autoquant_ray.domain_scores import write_domain_scores
from autoquant_ray.errors import Interrupted, StoreError, WorkerError
from autoquant_ray.expert_tokens import note_silent_experts, silent_experts
from autoquant_ray.interrupts import stop_on_signal
from autoquant_ray.parts import Parts, map_ahead
from autoquant_ray.plan import Plan
from autoquant_ray.run_files import SAMPLES, SCORES, part_name
from autoquant_ray.samples_stage import read_tasks
from autoquant_ray.sensitivity import Maxima
from autoquant_ray.served_search import check_feasible
from autoquant_ray.state import RunState
from autoquant_ray.store import RunDirectory
from autoquant_ray.weight_hashes import hash_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage gives to the pool.

    Attributes:
        stage: Its name.
        tasks: Shards to do.
        submit: How to start one on a worker.
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


def write_plan(state: RunState, plan: Plan, fingerprint: str, weights: Path | None = None) -> None:
    """``plan.parquet``, and what later commands need instead of the model: summary, hashes.

    Args:
        state: The run.
        plan: What to write.
        fingerprint: Of the stage.
        weights: Folder of the model's safetensors files, if it has any.
    """
    if state.is_done("plan", fingerprint):
        return
    with state.stage("plan", fingerprint):
        silent = silent_experts(state.values["plan"]) if "plan" in state.values else []
        state.values["plan"] = plan.summary()
        note_silent_experts(state.values["plan"], silent)  # until scores are added up again
        if weights is not None:
            modules = {g.name: [m.name for m in g.modules] for g in plan.groups if not g.is_cache}
            state.values["weights"] = hash_groups(weights, modules)
        state.directory.write_table("plan.parquet", "plan", plan.rows())


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


def score(state: RunState, pool: WorkerPool, plan: Plan, maxima: Maxima, fingerprint: str) -> None:
    """Sensitivity sums of every shard -> ``scores/shard-*.parquet``.

    With ``stop_when_stable``, of the first shards until the allocation is stable. Workers go on
    with later shards while that is being found out; what they find is dropped.
    """
    import ray

    rule = stopping_stage.make_rule(state, plan)
    groups, experts = [group.name for group in plan.searched], {*plan.single_experts}
    keys, formats = plan.score_keys, [format_.name for format_ in plan.formats]

    def write(outcome: Outcome) -> str:
        shard = outcome.task.shard
        num_rows_G = outcome.result.sums.num_rows_G
        known = zip(groups, num_rows_G, strict=True)
        if unseen := [g for g, rows in known if not rows and g not in experts]:
            logger.warning("shard %d gave no gradient to %s", shard, ", ".join(unseen[:3]))
        part = score_part(shard, keys, formats, outcome.result)
        return state.directory.write_table(part_name(SCORES, shard), "scores", part)

    def is_enough(shard: int) -> bool:
        return rule is not None and stopping_stage.is_enough(state, rule, shard)

    state.values.pop("stopping", None)
    with state.stage("score", fingerprint):
        shared_maxima = ray.put(maxima)
        done = intact_parts(state, SCORES, _is_complete(plan))
        if not any(is_enough(shard) for shard in sorted({*done, *state.left_out})):
            work = Work(
                stage="score",
                tasks=tasks_of(state, done),
                submit=lambda worker, task: worker.score.remote(task, shared_maxima),
                num_done=len(done),
                write=write,
                is_enough=is_enough,
            )
            collect(state, pool, work)
        if rule is not None:
            stopping_stage.keep_used(state, rule)


def aggregate(state: RunState, config: ScanConfig, fingerprint: str) -> None:
    """``sensitivity.parquet`` from the shards' parts."""
    if state.is_done("aggregate", fingerprint):
        return
    directory = state.directory
    with state.stage("aggregate", fingerprint):
        plan_rows = directory.read_table("plan.parquet", "plan").to_pylist()
        parts = Parts(directory, SCORES, state.used_shards)
        result = aggregate_parts(parts, plan_rows, config.estimator)
        directory.write_table("resampling.parquet", "resampling", result.buckets)
        write_domain_scores(state, plan_rows, config.estimator, result.left_out)
        note_silent_experts(state.values["plan"], result.left_out)
        directory.write_table("sensitivity.parquet", "sensitivity", result.rows)
        state.values["used"] = stopping_stage.used_data(state, state.used_shards)


def check_budget(plan: Plan, config: ScanConfig) -> None:
    """Refuse a budget that cannot be met, before any work.

    Raises:
        InfeasibleBudgetError: With the reachable range.
    """
    check_feasible(Problem(plan.rows(), plan.summary()), solve_options(config))


def collect(state: RunState, pool: WorkerPool, work: Work) -> None:
    """Write each shard's part as it arrives, until it is enough; note the quarantined ones.

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
            "with --resume"
        )
    if len(state.left_out) == state.num_shards:
        reason = state.values["quarantined"][0]["reason"]
        raise WorkerError(f"every shard failed, the first with: {reason}")


def note_done(directory: RunDirectory, stage: str, outcome: Outcome) -> int:
    """Write the event of a shard whose part is written; returns its number of tokens."""
    num_tokens = sum(map(len, outcome.task.samples))
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
            return is_complete(shard, state.directory.read_table(part_name(folder, shard), folder))
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


def _is_complete(plan: Plan) -> Callable[[int, Any], bool]:
    keys = plan.score_keys
    return lambda shard, table: is_complete_part(table, shard, keys)
