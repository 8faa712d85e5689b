"""The stage that fits scales and roundings of weights: layers, not shards, over all workers.

It writes one part per decoder layer, and one for what is outside of them, and merges them in their
order. A layer's part depends on the merged statistics and the shards, never on the layers that a
worker fits together, nor on what it has in memory together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from autoquant_ray.calibrate.files import read_calibration, rounding_rows
from autoquant_ray.distributed.interrupts import stop_on_signal
from autoquant_ray.distributed.pool import WorkerPool
from autoquant_ray.distributed.progress import progress
from autoquant_ray.distributed.task import LayerTask, ShardTask
from autoquant_ray.errors import DataError, Interrupted, WorkerError
from autoquant_ray.formats.smoothed import is_fitted, needs_hessians
from autoquant_ray.plan.memory import RESULT_BYTES, code_bytes, widest_input
from autoquant_ray.plan.plan import Plan
from autoquant_ray.quantize.calibration import NUM_HALVES, Calibration, can_be_halved
from autoquant_ray.runs.names import DOMAINS_FILE, ROUNDING, ROUNDING_FILE, part_name
from autoquant_ray.runs.state import RunState
from autoquant_ray.stages.shards import intact_parts, tasks_of
from autoquant_ray.wording import few

logger = logging.getLogger(__name__)

TOKENS_PER_CHANNEL = 4
"""Fewer tokens are few for second moments, of all or of a routed expert: the log says so."""

_MOST_NAMES = 4


def fit(
    state: RunState, pool: WorkerPool, plan: Plan, calibration: Calibration, fingerprint: str
) -> Calibration:
    """Scales and roundings of weights -> ``rounding.parquet``; the calibration with them.

    Skipped when no format has any.

    Raises:
        DataError: A rounding needs more shards than there are.
        Interrupted: SIGTERM or Ctrl-C; finished layers are kept.
        WorkerError: A layer failed on every worker that tried it.
    """
    directory = state.directory
    if not any(map(is_fitted, plan.formats)):
        return calibration
    halves = halves_of(state) if any(map(needs_hessians, plan.formats)) else {}
    calibration = replace(calibration, halves=halves)
    if not state.is_done("fit", fingerprint):
        with state.stage("fit", fingerprint):
            layers = range(len(plan.layer_weights) + 1)
            _fit_layers(state, pool, plan, calibration, layers)
            parts = (directory.read_table(part_name(ROUNDING, layer)) for layer in layers)
            directory.write_tables(ROUNDING_FILE, parts)  # one in memory at a time: they are large
    return replace(read_calibration(directory, plan.formats, plan.folds), halves=halves)


def halves_of(state: RunState) -> dict[int, int]:
    """Shard -> the half that it is in: every second shard of each domain.

    Shards of several domains take turns, so the parity of a shard's number would part domains.
    """
    domains = [""] * state.num_shards
    if state.directory.exists(DOMAINS_FILE):
        table = state.directory.read_table(DOMAINS_FILE)
        for shard, domain in zip(*(table.column(n) for n in ("shard", "domain")), strict=True):
            domains[shard.as_py()] = domain.as_py()
    counts: Counter[str] = Counter()
    halves = {}
    for shard, domain in enumerate(domains):
        halves[shard] = counts[domain] % NUM_HALVES
        counts[domain] += 1
    return halves


def _fit_layers(
    state: RunState, pool: WorkerPool, plan: Plan, calibration: Calibration, layers: range
) -> None:
    """Write the parts of layers that have none."""
    done = intact_parts(state, ROUNDING, lambda _layer, _table: True)
    missing = [layer for layer in layers if layer not in set(done)]
    shared, num_kept = pool.share(calibration), len(layers) - len(missing)
    shards = pool.share(_shards(state, plan, calibration.halves))
    blocks = _blocks(plan, missing, pool.num_workers)
    expert_tokens: dict[str, Sequence[int]] = {}
    with (
        stop_on_signal(pool.grace_s) as stop,
        closing(
            pool.run(
                (LayerTask(layers=block) for block in blocks),
                lambda worker, task: worker.fit.remote(task, shared, shards),
                stop,
            )
        ) as outcomes,
        progress("fit", len(layers), num_kept, unit="layers") as advance,
    ):
        for outcome in outcomes:
            if outcome.reason is not None:
                raise WorkerError(f"a rounding failed: {outcome.reason}")
            state.require_lease()
            for layer, fitted in outcome.result.items():
                rows = rounding_rows(fitted.rounding, plan.formats)
                state.directory.write_table(part_name(ROUNDING, layer), rows)
                expert_tokens |= fitted.expert_tokens
                num_kept += 1
                advance(f"{outcome.num_workers} worker(s)")
    _warn_of_few_tokens(state, plan, expert_tokens)
    if stop.is_made:
        raise Interrupted(
            f"interrupted: stage fit has {num_kept} of {len(layers)} layers, all kept; go on with "
            "`resume`"
        )


def _warn_of_few_tokens(
    state: RunState, plan: Plan, expert_tokens: Mapping[str, Sequence[int]]
) -> None:
    """Log which routed experts GPTQ left to plain rounding, and how many it had few tokens for.

    Args:
        state: The run.
        plan: Its plan.
        expert_tokens: Expert -> tokens that it saw of each half.
    """
    least = state.config["min_expert_tokens"]
    plain = sorted(e for e, seen in expert_tokens.items() if not can_be_halved(seen, least))
    if plain:
        logger.warning(
            "%d expert(s) saw fewer than %d tokens (`min_expert_tokens`), or none in one half of "
            "the shards, so GPTQ leaves their weights to plain rounding: %s",
            len(plain),
            least,
            few(plain, _MOST_NAMES),
        )
    enough = TOKENS_PER_CHANNEL * widest_input(plan, of_experts=True)
    thin = [e for e, seen in expert_tokens.items() if sum(seen) < enough and e not in set(plain)]
    if thin:
        logger.warning(
            "%d of %d expert(s) saw fewer than %d tokens, %d per input channel, which are few for "
            "GPTQ; give more `samples`",
            len(thin),
            len(expert_tokens),
            enough,
            TOKENS_PER_CHANNEL,
        )


def _shards(state: RunState, plan: Plan, halves: Mapping[int, int]) -> list[ShardTask]:
    """All shards, if a format needs the second moments of inputs.

    Args:
        state: The run.
        plan: Its plan.
        halves: From :func:`halves_of`.

    Raises:
        DataError: There are fewer shards than halves.
    """
    names = [format_.name for format_ in plan.formats if needs_hessians(format_)]
    if not names:
        return []
    tasks = list(tasks_of(state, ()))
    if len({halves[task.shard] for task in tasks}) < NUM_HALVES:
        raise DataError(
            f"{names[0]} needs two shards of one kind of data, to be scored on tokens that it was "
            f"not fitted to; this data makes {len(tasks)} shard(s); give more `samples`, or a "
            "smaller `shard_samples`"
        )
    num_tokens = sum(len(sample) for task in tasks for sample in task.samples)
    widest = widest_input(plan)
    if num_tokens < TOKENS_PER_CHANNEL * widest:
        logger.warning(
            "%s: %d tokens are few for GPTQ on inputs of %d channels; give more `samples`",
            names[0],
            num_tokens,
            widest,
        )
    return tasks


def _blocks(plan: Plan, layers: Sequence[int], num_workers: int) -> list[tuple[int, ...]]:
    """Layers that a worker fits together; each alone where no pass over the data is needed.

    As many as give every worker a block, and whose codes take no more than 1 GiB.

    Args:
        plan: The plan.
        layers: In order.
        num_workers: How many share them.
    """
    most = max(1, len(layers) // num_workers) if any(map(needs_hessians, plan.formats)) else 1
    weights = [*plan.layer_weights, 0]
    blocks: list[list[int]] = []
    room = 0
    for layer in layers:
        size = code_bytes(plan, weights[layer])
        if not blocks or len(blocks[-1]) >= most or size > room:
            blocks.append([])
            room = RESULT_BYTES
        blocks[-1].append(layer)
        room -= size
    return [tuple(block) for block in blocks]
